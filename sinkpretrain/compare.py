"""``sinkpretrain compare``: result and run folders in; one page, the same as markdown, tables and figures out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from sinkpretrain.comparison import numbers, paired, paper
from sinkpretrain.comparison.blocks import Picture, Section
from sinkpretrain.comparison.numbers import Group, Record
from sinkpretrain.comparison.read import Found, find
from sinkpretrain.comparison.render import as_csv, console_table, finite, html, markdown
from sinkpretrain.comparison.sections import (
    all_settings,
    has_paper,
    missing_losses,
    papers_table,
    sections,
    table_3,
)
from sinkpretrain.errors import UserError
from sinkpretrain.figures import save_figure
from sinkpretrain.files import read_json, write_atomically, write_json
from sinkpretrain.provenance import versions

TITLE = "Sink mechanisms compared"
PAGE, RECORDS = "index.html", "comparison.json"


@dataclass(frozen=True)
class Comparison:
    """What was compared, ready to print.

    groups: models that differ in their seed only.
    records: the numbers, by the name of the CSV file that holds them.
    """

    out: Path
    found: Found
    settings: list[str]
    groups: list[Group]
    records: dict[str, list[Record]]
    sections: list[Section]
    paper: bool


def compare(paths: list[Path], out: Path, paper: bool = True) -> Comparison:
    """Compare results and runs, and write a page, tables and figures into ``out``.

    Of results of ``stream`` without their losses (nll.npy stayed on another machine) what results.json has is shown,
    and said, also as a warning.

    Args:
        paths: folders written by ``stream``, ``train``, ``inspect`` or ``zero-shot``, or folders that hold some one or
            two levels down.
        out: gets index.html, which needs no other file; the same as comparison.md and PNG figures; table3.md; CSV
            files and comparison.json with every number.
        paper: put the paper's numbers beside ours, or below where the settings differ.

    Raises:
        UserError: nothing to compare, results over different texts, runs on different data, or losses that are there
            but cannot be read.
    """
    found = find(paths)
    # Everything is read and computed before anything is written, so that a file that is gone leaves nothing half done.
    settings = all_settings(found.results)
    groups = numbers.group(found.results)
    for sentence in missing_losses(groups):
        warnings.warn(sentence, stacklevel=2)
    parts = sections(found, groups, settings, paper)
    comparison = Comparison(out, found, settings, groups, _records(found, groups, settings), parts, paper)
    texts = {PAGE: html(TITLE, subtitle(found), parts), "comparison.md": markdown(TITLE, parts)}
    if found.results:
        texts["table3.md"] = markdown(parts[0].title, [parts[0]])
    texts |= {f"{name}.csv": as_csv(records) for name, records in comparison.records.items() if records}
    before = _written_before(out)
    for picture in pictures(parts):
        save_figure(picture.figure, out / f"{picture.name}.png")
    files = sorted([*texts, *(f"{p.name}.png" for p in pictures(parts))])
    write_json(out / RECORDS, finite(as_json(comparison)) | {"files": files})
    for name, text in texts.items():
        write_atomically(out / name, lambda p, text=text: p.write_text(text, encoding="utf-8"))  # type: ignore[misc]
    for name in before - {*files}:
        (out / name).unlink(missing_ok=True)
    return comparison


def _written_before(out: Path) -> set[str]:
    """Names of the files that an earlier comparison left in the folder: a table or picture that the new one does not
    have would look like its own."""
    try:
        names = read_json(out / RECORDS).get("files", [])
        return {name for name in names if name and Path(name).name == name}
    except (UserError, AttributeError, TypeError):
        return set()  # no comparison yet, or a strange file, which is about to be replaced


def pictures(parts: list[Section]) -> list[Picture]:
    return [block for part in parts for block in part.blocks if isinstance(block, Picture)]


def subtitle(found: Found) -> str:
    """What is on the page, in a line."""
    counts = [
        (len(found.results), "model streamed", "models streamed"),
        (len(found.runs), "training run", "training runs"),
        (len(found.inspections), "model inspected", "models inspected"),
        (len(found.zero_shot), "model on zero-shot tasks", "models on zero-shot tasks"),
    ]
    text = ", ".join(f"{n} {one if n == 1 else many}" for n, one, many in counts if n)
    return f"{text}. Written by sinkpretrain {versions()['sinkpretrain']}."


def _records(found: Found, groups: list[Group], settings: list[str]) -> dict[str, list[Record]]:
    return {
        "provenance": numbers.sources(found),
        "table3": numbers.perplexities(found.results, settings),
        "differences": [*paired.own_differences(groups), *paired.vanilla_differences(groups)],
        "training": [numbers.training(run) for run in found.runs],
        "training_differences": [numbers.training_difference(pair) for pair in numbers.same_batches(found.runs)],
        "streaming_speed": numbers.streaming_speed(found.results),
        "sinks": numbers.inspected(found.inspections),
        "sinks_logged": numbers.logged_sinks(found.runs),
        "zero_shot": [
            {"name": a.name, "mechanism": a.mechanism, "task": task, **entry}
            for a in found.zero_shot
            for task, entry in a.data["tasks"].items()
        ],
    }


def as_json(c: Comparison) -> dict[str, Any]:
    """Every number with where it comes from."""
    return {
        "settings": c.settings,
        "groups": [{"title": g.title, "n": len(g.results), "cells": numbers.cells(g, c.settings)} for g in c.groups],
        **c.records,
        "results": [source for r in c.found.results for source in r.sources],
        "runs": [{"folder": str(r.folder), "name": r.name, "about": r.about} for r in c.found.runs],
        "inspections": [{"folder": str(a.folder)} | a.data for a in c.found.inspections],
        "zero_shot_files": [{"folder": str(a.folder)} | a.data for a in c.found.zero_shot],
        "versions": versions(),
    }


def print_table(c: Comparison, console: Console, title: str = "streaming perplexity") -> None:
    """Table 3 in the terminal."""
    if not c.groups:
        return
    beside = c.paper and has_paper(c.groups, c.settings)
    title += f" (in parentheses: {paper.CITATION})" if beside else ""
    console.print(console_table(table_3(c.groups, c.settings, beside), title, console))
    if c.paper and not beside:
        console.print(console_table(papers_table(), f"for comparison, {paper.CITATION} (160M parameters)", console))


def log_to_wandb(c: Comparison, mode: Literal["online", "offline"], project: str) -> None:
    """The table and the figures as one wandb run."""
    import wandb

    with wandb.init(project=project, job_type="compare", mode=mode, dir=str(c.out)) as run:
        columns = ["mechanism", "name", "setting", "perplexity"]
        rows = [[line[column] for column in columns] for line in c.records["table3"]]
        run.log({"table3": wandb.Table(columns=columns, data=rows)})
        for picture in pictures(c.sections):
            run.log({picture.name: wandb.Image(str(c.out / f"{picture.name}.png"))})
