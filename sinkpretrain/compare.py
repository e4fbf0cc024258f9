"""``sinkpretrain compare``: result and run folders in; Table 3, paired differences and figures out."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from sinkpretrain import metrics, paper
from sinkpretrain.config import RunConfig, load_yaml
from sinkpretrain.errors import UserError
from sinkpretrain.evaluate import FORMAT, RESULTS
from sinkpretrain.figures import loss_figure, perplexity_figure, save_figure
from sinkpretrain.files import read_json, write_atomically, write_json
from sinkpretrain.provenance import versions
from sinkpretrain.sinks import REGISTRY, label
from sinkpretrain.statistics import paired_difference


@dataclass(frozen=True)
class Result:
    """One model over one text, as ``sinkpretrain stream`` left it, in one folder or in several.

    files: the losses of each setting.
    sources: the content of each results file that something is shown from, with its folder.
    """

    folder: Path
    data: dict[str, Any]
    files: dict[str, Path]
    sources: list[dict[str, Any]]

    @property
    def mechanism(self) -> str:
        return str(self.data["model"]["mechanism"])

    @property
    def name(self) -> str:
        return str(self.data["model"]["name"])

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        settings: dict[str, dict[str, Any]] = self.data["settings"]
        return settings

    @property
    def tokens(self) -> dict[str, Any]:
        tokens: dict[str, Any] = self.data["tokens"]
        return tokens

    def ppl(self, setting: str) -> float:
        """Perplexity; JSON has null where it is not a number, or infinite although the mean loss is one."""
        value = self.settings[setting]["ppl"]
        if value is not None:
            return float(value)
        return math.nan if self.settings[setting].get("nll") is None else math.inf

    def nll(self, setting: str) -> NDArray[np.float32]:
        """Losses, float32 [tokens - 1]; raises UserError if the file is gone or holds those of another text."""
        path = self.files[setting]
        try:
            values: NDArray[np.float32] = np.load(path)
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"cannot read the losses {path}: {error}; run stream again.") from error
        if values.shape != (self.tokens["count"] - 1,):
            raise UserError(
                f"{path} holds losses of shape {values.shape}, not the {self.tokens['count'] - 1} of its text; "
                "run stream again."
            )
        return values


@dataclass(frozen=True)
class Run:
    """One training run."""

    folder: Path
    config: RunConfig
    lines: list[dict[str, Any]]

    def curve(self, kind: str) -> tuple[list[int], list[float]]:
        """Steps and losses of the lines of one kind (train, validation)."""
        chosen = [line for line in self.lines if line["kind"] == kind]
        return [line["step"] for line in chosen], [line["loss"] for line in chosen]


@dataclass(frozen=True)
class Comparison:
    """What was compared, ready to print.

    table: one row per result: {"name", "mechanism", setting: perplexity, ...}.
    differences: settings of one model against its own reference setting, paired over tokens.
    """

    out: Path
    results: list[Result]
    runs: list[Run]
    settings: list[str]
    table: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    paper: bool

    @property
    def has_paper(self) -> bool:
        """Whether a number of the paper stands beside one of ours."""
        return self.paper and any(entry["paper"] for g in self.groups for entry in g["cells"].values())


def compare(paths: list[Path], out: Path, paper: bool = True) -> Comparison:
    """Compare results and runs, and write tables and figures into ``out``.

    Args:
        paths: folders written by ``stream`` or ``train``, or folders that hold some one or two levels down.
        out: gets table3.md, table3.csv, comparison.json, perplexity.png and, with runs, loss.png.
        paper: put the paper's numbers beside ours, or below where the settings differ.

    Raises:
        UserError: nothing to compare, results over different texts, or losses that cannot be read.
    """
    results, runs = find(paths)
    settings = sorted({s for r in results for s in r.settings}, key=_setting_order)
    table = [row(r, settings) for r in results]
    # All losses are read, once, before anything is written, so that a file that is gone leaves nothing half done.
    losses = [{s: r.nll(s) for s in r.settings} for r in results]
    pairs = [d for r, nll in zip(results, losses, strict=True) for d in differences(r, nll)]
    comparison = Comparison(out, results, runs, settings, table, group(table, settings), pairs, paper)
    figures = {}
    if results:
        names = [_legend(r, results) for r in results]
        figures["perplexity"] = perplexity_figure(list(zip(names, losses, strict=True)), settings)
    if runs:
        curves = [(r.config.name or r.folder.name, r.curve("train"), r.curve("validation")) for r in runs]
        figures["loss"] = loss_figure(curves)
    write_json(out / "comparison.json", as_json(comparison))
    write_atomically(out / "table3.md", lambda p: p.write_text(markdown(comparison), encoding="utf-8"))
    write_atomically(out / "table3.csv", lambda p: p.write_text(as_csv(comparison), encoding="utf-8"))
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    return comparison


# --- what is read -------------------------------------------------------------------------------------------------


def find(paths: list[Path]) -> tuple[list[Result], list[Run]]:
    """The results and runs at, or up to two levels below, the paths; the same one given twice counts once."""
    results: dict[Path, Result] = {}
    runs: dict[Path, Run] = {}
    for path in paths:
        folders = [path, *sorted(path.glob("*")), *sorted(path.glob("*/*"))]
        found = False
        for folder in folders:
            if (folder / RESULTS).is_file():
                results.setdefault(folder.resolve(), read_result(folder))
                found = True
            if (folder / "config.yaml").is_file() and (folder / metrics.FILE).is_file():
                runs[folder.resolve()] = Run(
                    folder, load_yaml(RunConfig, folder / "config.yaml"), list(metrics.read(folder))
                )
                found = True
        if not found:
            raise UserError(f"{path} holds neither results of stream nor a training run.")
    # Before models are merged: the same model over another text is not the same result.
    check_same_text(list(results.values()))
    models = merge(list(results.values()))
    order = {mechanism: place for place, mechanism in enumerate(REGISTRY)}
    return (
        sorted(models, key=lambda r: (order.get(r.mechanism.partition("(")[0], len(order)), r.mechanism)),
        sorted(runs.values(), key=lambda r: (order.get(r.config.sink.mechanism, len(order)), label(r.config.sink))),
    )


def read_result(folder: Path) -> Result:
    """The results in a folder; raises UserError for another release's format or a file of something else."""
    path = folder / RESULTS
    data = read_json(path)
    if not isinstance(data, dict) or not data.keys() >= {"format", "model", "tokens", "settings"}:
        raise UserError(f"{path} was not written by sinkpretrain stream; name the folder that stream wrote.")
    if data["format"] != FORMAT:
        raise UserError(
            f"{path} has format {data['format']} and this release reads {FORMAT}; "
            "use the release that wrote it, or run stream again."
        )
    files = {s: folder / entry["file"] for s, entry in data["settings"].items()}
    return Result(folder, data, files, [{"folder": str(folder)} | data])


def merge(results: list[Result]) -> list[Result]:
    """One result per model: settings streamed into several folders come together, one found twice counts once."""
    models: dict[str, Result] = {}
    for result in results:
        sha256 = result.data["model"]["sha256"]
        if sha256 not in models:
            models[sha256] = result
            continue
        first = models[sha256]
        twice = [s for s in result.settings if s in first.settings]
        if twice:
            warnings.warn(
                f"{result.folder} holds {', '.join(twice)} of the same model as {first.folder}; "
                f"shown once, from {first.folder}.",
                stacklevel=2,
            )
        new = {s: entry for s, entry in result.settings.items() if s not in first.settings}
        models[sha256] = Result(
            first.folder,
            first.data | {"settings": first.settings | new},
            result.files | first.files,
            first.sources + ([result.sources[0] | {"settings": new}] if new else []),
        )
    return list(models.values())


def check_same_text(results: list[Result]) -> None:
    """Refuse perplexities over different tokens: another hash, or another number of them."""
    for other in results[1:]:
        first = results[0]
        if any(other.tokens[key] != first.tokens[key] for key in ("sha256", "count")):
            raise UserError(
                f"{first.folder} and {other.folder} were streamed over different texts "
                f"({first.tokens['count']:,} and {other.tokens['count']:,} tokens); compare results "
                "over the same one."
            )


def _setting_order(name: str) -> tuple[Any, ...]:
    """Caches by size, x, and reading of the column; the other strategies behind them."""
    cache, _, suffix = name.partition("-")
    start, plus, recent = cache.partition("+")
    if plus and start.isdigit() and recent.isdigit():
        return (0, int(start) + int(recent), int(start), suffix)
    return (1, name)


# --- numbers ------------------------------------------------------------------------------------------------------


def row(result: Result, settings: list[str]) -> dict[str, Any]:
    """One line of the table."""
    return {
        "mechanism": result.mechanism,
        "name": result.name,
        "step": result.data["model"]["step"],
        "shape": result.data["model"]["shape"],
        "perplexity": {s: result.ppl(s) for s in settings if s in result.settings},
        "interval": {s: result.settings[s]["interval"] for s in settings if s in result.settings},
        "paper": {
            s: paper.value(result.mechanism, s, result.data["model"]["shape"]) for s in settings if s in result.settings
        },
    }


def group(table: list[dict[str, Any]], settings: list[str]) -> list[dict[str, Any]]:
    """Models that differ in their seed only, as one row: mean and standard deviation over them.

    Another shape or another number of steps is another row, named after its models.
    """
    members: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in table:
        members[json.dumps([line["mechanism"], line["shape"], line["step"]], sort_keys=True)].append(line)
    rows_of = Counter(lines[0]["mechanism"] for lines in members.values())
    groups = []
    for lines in members.values():
        cells = {}
        for s in settings:
            values = [line["perplexity"][s] for line in lines if s in line["perplexity"]]
            if values:
                with np.errstate(invalid="ignore"):  # the deviation of infinities is nan, and shown as that
                    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
                of_paper = next((line["paper"][s] for line in lines if line["paper"].get(s)), None)
                cells[s] = {"mean": float(np.mean(values)), "sd": spread, "n": len(values), "paper": of_paper}
        mechanism = lines[0]["mechanism"]
        title = mechanism if rows_of[mechanism] == 1 else _full_name(lines)
        groups.append({"mechanism": mechanism, "title": title, "n": len(lines), "cells": cells})
    return groups


def _full_name(lines: list[dict[str, Any]]) -> str:
    """``vanilla: small, step 500``: what tells a row from others of its mechanism."""
    names = ", ".join(dict.fromkeys(line["name"] for line in lines))
    step = lines[0]["step"]
    return f"{lines[0]['mechanism']}: {names}" + (f", step {step:,}" if step is not None else "")


def differences(result: Result, losses: dict[str, NDArray[np.float32]]) -> list[dict[str, Any]]:
    """Each cache of a model against its own cache of the same size with the most initial positions, over all tokens."""
    order = {s: _setting_order(s) for s in losses}
    caches = sorted((s for s in losses if order[s][0] == 0), key=order.__getitem__)
    found = []
    for setting in caches:
        same_size = [s for s in caches if order[s][1] == order[setting][1]]
        reference = max(same_size, key=lambda s: order[s][2])
        if setting == reference:
            continue
        mean, low, high = paired_difference(losses[setting], losses[reference])
        found.append(
            {
                "mechanism": result.mechanism,
                "name": result.name,
                "setting": setting,
                "reference": reference,
                "nats": mean,
                "interval": [low, high],
                "percent": 100 * math.expm1(min(mean, 50.0)),
                "percent_interval": [100 * math.expm1(min(v, 50.0)) for v in (low, high)],
            }
        )
    return found


# --- tables -------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A perplexity as the paper prints it: two decimals, none above 1,000."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def cell(entry: dict[str, Any] | None, with_paper: bool) -> str:
    """``18.21 ± 0.05 (18.01)``: our mean, its spread over models if there are several, the paper's value."""
    if entry is None:
        return ""
    text = number(entry["mean"])
    if entry["sd"] is not None:
        text += f" ± {number(entry['sd'])}"
    return f"{text} ({number(entry['paper'])})" if with_paper and entry["paper"] else text


def _row_title(entry: dict[str, Any]) -> str:
    return str(entry["title"]) + (f" (n={entry['n']})" if entry["n"] > 1 else "")


def _heading(setting: str) -> str:
    return setting.replace("-nocolumn", " without column")


def markdown(c: Comparison) -> str:
    """The table, the paired differences, the paper's table and where the numbers come from."""
    lines = ["# Streaming perplexity", ""]
    if c.results:
        head = ["mechanism", *map(_heading, c.settings)]
        lines += _markdown_table(
            head,
            [[_row_title(g)] + [cell(g["cells"].get(s), c.has_paper) for s in c.settings] for g in c.groups],
        )
        lines += ["", *(["In parentheses: " + paper.CITATION + "."] if c.has_paper else [])]
        lines += _conditions(c)
        if c.differences:
            lines += ["", "## Against the most initial positions", ""]
            lines += ["Paired over the same tokens; 95 % interval from a bootstrap over blocks of text.", ""]
            lines += _markdown_table(
                ["model", "setting", "against", "nats", "perplexity", "95 %"],
                [
                    [
                        d["name"],
                        _heading(d["setting"]),
                        d["reference"],
                        f"{d['nats']:+.4f}",
                        f"{d['percent']:+.2f} %",
                        "{:+.2f} to {:+.2f} %".format(*d["percent_interval"]),
                    ]
                    for d in c.differences
                ],
            )
        if c.paper and not c.has_paper:
            lines += ["", f"## The paper's table ({paper.CITATION})", ""]
            settings = list(next(iter(paper.TABLE_3.values())))
            lines += _markdown_table(
                ["mechanism", *settings],
                [[m, *(number(values[s]) for s in settings)] for m, values in paper.TABLE_3.items()],
            )
    if c.runs:
        lines += ["", "## Training", ""]
        lines += _markdown_table(
            ["run", "mechanism", "steps", "training loss", "validation loss", "tokens/s"], [_run_row(r) for r in c.runs]
        )
        lines += ["", "Validation loss is over the targets that every mechanism has."]
    return "\n".join(lines).rstrip() + "\n"


def _conditions(c: Comparison) -> list[str]:
    """How the numbers were made; where results differ every value is named, for a reader must know of the mixture."""
    sources = [source for r in c.results for source in r.sources]
    # A folder may have been filled in several goes: a setting knows its own precision.
    dtypes = [entry.get("dtype", source["dtype"]) for source in sources for entry in source["settings"].values()]
    conventions, devices = ([source[key] for source in sources] for key in ("convention", "device"))
    torches = [source["versions"]["torch"] for source in sources]
    convention, dtype, device, torch = (
        " and ".join(dict.fromkeys(values)) for values in (conventions, dtypes, devices, torches)
    )
    tokens = c.results[0].tokens
    return [
        f"{tokens['count']:,} tokens (sha256 {tokens['sha256'][:12]}), {convention}.",
        f"{dtype}, {device}, torch {torch}.",
    ]


def _run_row(run: Run) -> list[str]:
    steps, losses = run.curve("train")
    _, validation = run.curve("validation")
    rates = [line["tokens_per_second"] for line in run.lines if "tokens_per_second" in line]
    return [
        run.config.name or run.folder.name,
        label(run.config.sink),
        f"{steps[-1]:,}" if steps else "0",
        f"{np.mean(losses[-20:]):.3f}" if losses else "",
        f"{validation[-1]:.4f}" if validation else "",
        f"{np.median(rates):,.0f}" if rates else "",
    ]


def _markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    line = "|" + "---|" * len(head)
    return [f"| {' | '.join(r)} |" for r in [head]] + [line] + [f"| {' | '.join(r)} |" for r in rows]


def as_csv(c: Comparison) -> str:
    """Long form: one line per model and setting, with interval and the paper's value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["mechanism", "name", "step", "setting", "perplexity", "low", "high", "paper"])
    for line in c.table:
        for s, value in line["perplexity"].items():
            low, high = line["interval"][s]
            writer.writerow(
                [line["mechanism"], line["name"], line["step"], s, value, low, high, line["paper"][s] or ""]
            )
    return text.getvalue()


def as_json(c: Comparison) -> dict[str, Any]:
    """Every number with where it comes from; what is not finite is null, for most readers cannot parse it."""
    content = {
        "settings": c.settings,
        "table": c.table,
        "groups": c.groups,
        "differences": c.differences,
        "provenance": [source for r in c.results for source in r.sources],
        "runs": [_run_as_json(r) for r in c.runs],
        "versions": versions(),
    }
    finite: dict[str, Any] = _finite(content)
    return finite


def _run_as_json(run: Run) -> dict[str, Any]:
    steps, losses = run.curve("train")
    _, validation = run.curve("validation")
    return {
        "folder": str(run.folder),
        "name": run.config.name,
        "mechanism": label(run.config.sink),
        "steps": steps[-1] if steps else 0,
        "training_loss": float(np.mean(losses[-20:])) if losses else None,
        "validation_loss": validation[-1] if validation else None,
        "provenance": read_json(run.folder / "run.json") if (run.folder / "run.json").is_file() else None,
    }


def _finite(value: Any) -> Any:
    """The same data with null for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(c: Comparison, console: Console) -> None:
    """The table in the terminal."""
    if c.results:
        title = "streaming perplexity" + (f" (in parentheses: {paper.CITATION})" if c.has_paper else "")
        table = Table("mechanism", *map(_heading, c.settings), title=title)
        for g in c.groups:
            table.add_row(_row_title(g), *(cell(g["cells"].get(s), c.has_paper) for s in c.settings))
        console.print(table)
    if c.results and c.paper and not c.has_paper:
        settings = list(next(iter(paper.TABLE_3.values())))
        table = Table("mechanism", *settings, title=f"for comparison, {paper.CITATION} (160M parameters)")
        for mechanism, values in paper.TABLE_3.items():
            table.add_row(mechanism, *(number(values[s]) for s in settings))
        console.print(table)


def _legend(result: Result, results: list[Result]) -> str:
    """The mechanism, with the run's name and step where several models share one."""
    alone = sum(r.mechanism == result.mechanism for r in results) == 1
    return result.mechanism if alone else _full_name([row(result, [])])


def log_to_wandb(c: Comparison, mode: Literal["online", "offline"], project: str) -> None:
    """The table and the figures as one wandb run."""
    import wandb

    with wandb.init(project=project, job_type="compare", mode=mode, dir=str(c.out)) as run:
        rows = [[line["mechanism"], line["name"], s, v] for line in c.table for s, v in line["perplexity"].items()]
        run.log({"table3": wandb.Table(columns=["mechanism", "name", "setting", "perplexity"], data=rows)})
        for figure in ("perplexity", "loss"):
            if (c.out / f"{figure}.png").is_file():
                run.log({figure: wandb.Image(str(c.out / f"{figure}.png"))})
