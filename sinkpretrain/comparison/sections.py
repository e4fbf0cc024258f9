"""What a comparison shows, in order: sections of text, tables and figures, still without a format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkpretrain import figures, inspect_figures, metrics
from sinkpretrain.comparison import numbers, paired, paper
from sinkpretrain.comparison.blocks import (
    Block,
    Picture,
    Section,
    Table,
    cell,
    formatted,
    heading,
    interval,
    memory,
    number,
    share,
)
from sinkpretrain.comparison.numbers import Group, Record
from sinkpretrain.comparison.read import About, Found, Result, Run, setting_order
from sinkpretrain.measures import last_mass
from sinkpretrain.statistics import change


def sections(found: Found, groups: list[Group], settings: list[str], with_paper: bool) -> list[Section]:
    """All sections that there is something to show for."""
    parts: list[Section] = []
    if found.results:
        parts += [perplexity(found.results, groups, settings, with_paper), *differences(groups)]
    if found.runs:
        parts.append(training(found))
    if found.inspections or any(r.probes for r in found.runs):
        parts.append(sinks(found))
    parts += speed(found)
    if found.zero_shot:
        parts.append(zero_shot(found.zero_shot, with_paper))
    if found.results and with_paper and not has_paper(groups, settings):
        parts.append(Section("The paper's table", [papers_table(), f"{paper.CITATION}: models of 160M parameters."]))
    parts.append(Section("Where the numbers come from", [provenance(found)]))
    return parts


# --- perplexity ---------------------------------------------------------------------------------------------------


def perplexity(results: list[Result], groups: list[Group], settings: list[str], with_paper: bool) -> Section:
    """Table 3, and perplexity against position."""
    beside = with_paper and has_paper(groups, settings)
    blocks: list[Block] = [table_3(groups, settings, beside)]
    if beside:
        blocks.append(f"In parentheses: {paper.CITATION}.")
    if any(len(g.results) > 1 for g in groups):
        blocks.append(
            "Several seeds (n, in a cell where fewer were streamed so): their mean, ± half of its 95 % t-interval over "
            "seeds."
        )
    blocks += conditions(results)
    blocks += missing_losses(groups)
    curves = [(row_title(g), {s: g.mean_losses(s) for s in settings if g.of(s)}) for g in groups]
    if drawn := with_curves(curves, settings):
        blocks.append(perplexity_picture(groups, curves, drawn))
    base = next((g for g in groups if g.mechanism == "vanilla"), None)
    if base and len(curves) > 1:
        blocks += change_picture(base, groups, settings)
    return Section("Streaming perplexity", blocks)


def change_picture(base: Group, groups: list[Group], settings: list[str]) -> list[Picture]:
    """Each cache against the same model's one of that size with the most initial positions, and what is no cache
    against the largest; nothing without a cache, or without losses to set against each other."""
    entries = {s: entry for g in groups for s, entry in g.settings.items()}
    found = {s: base.reference(entries[s]) for s in settings}
    largest = next((r for r in reversed(found.values()) if r), None)
    if largest is None:
        return []
    against = {s: r or largest for s, r in found.items() if base.of(r or largest)}
    losses = {r: base.mean_losses(r) for r in set(against.values())}

    def beside(g: Group, s: str) -> NDArray[np.floating]:
        """The losses of ``base`` and, on top of them, what a group does otherwise with the same seeds."""
        both = paired.pair(g, s, base, against[s])
        return losses[against[s]] + (both.a - both.b)

    curves = [(row_title(g), {s: beside(g, s) for s in against if g.of(s)}) for g in groups]
    drawn = with_curves(curves, settings)
    if not any(of for g, (_, of) in zip(groups, curves, strict=True) if g is not base):
        return []
    names = list(dict.fromkeys(heading(against[s]) for s in drawn))
    at = f"at {names[0]}" if len(names) == 1 else f"in a cache of the same size ({', '.join(names)})"
    figure = figures.change_figure(curves, drawn, {s: losses[against[s]] for s in drawn})
    return [Picture("change", f"The same as a change against {base.title} {at}: below the line is better.", figure)]


def with_curves(curves: figures.Models, settings: list[str]) -> list[str]:
    """The settings that a model has losses of."""
    return [s for s in settings if any(s in losses for _, losses in curves)]


def missing_losses(groups: list[Group]) -> list[str]:
    """A sentence on results whose losses stayed elsewhere, and on what is not shown for that; nothing if none did."""
    models = [(r, losses) for g in groups for r, losses in zip(g.results, g.losses, strict=True)]
    of, files = [], []
    for title, (r, losses) in zip(numbers.titles([r for r, _ in models]), models, strict=True):
        for source in r.sources:
            gone = sorted((s for s in source["settings"] if s not in losses), key=setting_order)
            if gone:
                which = "all settings" if len(gone) == len(source["settings"]) else ", ".join(map(heading, gone))
                of.append(f"{title} ({which}; {source['folder']})")
                files.append(r.files[gone[0]])
    if not of:
        return []
    whose = ", ".join(of) if any(losses for _, losses in models) else "all models"
    example = files[0] if len(of) == 1 else f"{files[0]} and so on"
    return [
        f"The losses of {whose} are missing, so curves and differences that need them are left out (but not "
        f"differences within one model that its results.json has); they belong beside results.json: {example}."
    ]


def perplexity_picture(groups: list[Group], curves: figures.Models, settings: list[str]) -> Picture:
    """Perplexity against position: of several models one panel per cache, of one model a line per setting."""
    per_document = any(r.settings[s].get("documents") for g in groups for r in g.results for s in r.settings)
    if len(groups) > 1 or len(settings) == 1 or per_document:
        return Picture(
            "perplexity",
            "Perplexity of all tokens read so far, one panel per cache: a curve that leaves the others is a model "
            "that misses what the cache has evicted.",
            figures.perplexity_figure(curves, settings),
        )
    losses = {heading(s): nll for s, nll in curves[0][1].items()}
    reference = groups[0].reference(groups[0].settings[settings[0]])
    if reference not in curves[0][1]:
        reference = None
    return Picture(
        "perplexity",
        "Perplexity along the text, one line per cache: a line that rises where the cache is full belongs to a cache "
        "that does not hold what the model needs.",
        figures.settings_figure(
            losses,
            np.arange(len(next(iter(losses.values())))),
            heading(reference) if reference else None,
            sorted({setting_order(s)[1] for s in settings if setting_order(s)[0] == 0}),
            "tokens read",
        ),
    )


def table_3(groups: list[Group], settings: list[str], beside: bool) -> Table:
    return Table(
        ["mechanism", *map(heading, settings)],
        [
            [row_title(g), *(cell(found.get(s), beside, len(g.results)) for s in settings)]
            for g, found in ((g, numbers.cells(g, settings)) for g in groups)
        ],
    )


def has_paper(groups: list[Group], settings: list[str]) -> bool:
    """Whether a number of the paper stands beside one of ours."""
    return any(entry["paper"] for g in groups for entry in numbers.cells(g, settings).values())


def papers_table() -> Table:
    settings = list(next(iter(paper.TABLE_3.values())))
    rows = [[m, *(number(values[s]) for s in settings)] for m, values in paper.TABLE_3.items()]
    return Table(["mechanism", *settings], rows)


def row_title(g: Group) -> str:
    return g.title + (f" (n={len(g.results)})" if len(g.results) > 1 else "")


def conditions(results: list[Result]) -> list[str]:
    """How the numbers were made; where results differ every value is named, for a reader must know of the mixture."""
    sources = [source for r in results for source in r.sources]
    # A folder may have been filled in several goes: a setting knows its own precision.
    dtypes = [entry.get("dtype", source["dtype"]) for source in sources for entry in source["settings"].values()]
    tokens = results[0].tokens
    return [
        f"{tokens['count']:,} tokens (sha256 {tokens['sha256'][:12]}), {_all(s['convention'] for s in sources)}.",
        f"{_all(dtypes)}, {_all(s['device'] for s in sources)}, torch {_all(s['versions']['torch'] for s in sources)}.",
    ]


def _all(values: Any) -> str:
    return " and ".join(dict.fromkeys(values))


# --- differences --------------------------------------------------------------------------------------------------


def differences(groups: list[Group]) -> list[Section]:
    """Two tables of paired differences, each if it has a row."""
    found = [
        (
            "Against the most initial positions",
            "What a model loses with fewer initial positions in the same cache.",
            paired.own_differences(groups),
        ),
        (
            "Against vanilla with the most initial positions",
            "Whether a mechanism with fewer initial positions does as well as an ordinary model with all of them.",
            paired.vanilla_differences(groups),
        ),
    ]
    intervals = (
        "Paired over the same tokens; negative is better. 95 % over blocks: bootstrap over blocks of the text, which "
        "says how another text might turn out. "
    )
    if any(len(g.results) > 1 for g in groups):
        intervals += (
            "95 % over seeds: t-interval over the differences of seeds trained alike, which says how another training "
            "might turn out; blank where fewer than two are known to be. Of two mechanisms with seeds in common, those "
            "alone are averaged (n)."
        )
    else:
        intervals += "How another training, with another seed, might turn out is not in it."
    return [
        Section(title, [f"{sentence} {intervals}", difference_table(records)])
        for title, sentence, records in found
        if records
    ]


def difference_table(records: list[Record]) -> Table:
    same = all(r["title"] == r["against"] for r in records)
    seeds = any(r["seed_low"] is not None for r in records)
    head = ["model", "setting", "against", "nats", "perplexity", "95 % over blocks", "95 % over seeds"]
    return Table(
        head if seeds else head[:-1],
        [
            [
                r["title"] + (f" (n={r['n']})" if r["n"] > 1 else ""),
                heading(r["setting"]),
                heading(r["reference"]) if same else f"{r['against']} {heading(r['reference'])}",
                f"{r['nats']:+.4f}",
                change(r["nats"]) + " %",
                interval(r["low"], r["high"]),
                *([interval(r["seed_low"], r["seed_high"])] if seeds else []),
            ]
            for r in records
        ],
        labels=3,
    )


# --- training, sinks, speed, tasks --------------------------------------------------------------------------------


def training(found: Found) -> Section:
    rows = []
    for r in map(numbers.training, found.runs):
        losses = [formatted(r["training_loss"], ".3f"), formatted(r["validation_loss"], ".4f")]
        rows.append([r["name"], r["mechanism"], str(r["seed"]), f"{r['steps']:,}", *losses])
    by_tokens = numbers.steps_differ(found.runs)

    def curve(run: Run, kind: str) -> figures.Curve:
        steps, losses = run.curve(kind)
        return (metrics.tokens_at(run.lines, steps) if by_tokens else steps), losses

    curves = [(name, curve(r, "train"), curve(r, "validation")) for name, r in numbers.runs_by_seed(found.runs)]
    against = "tokens read, for steps differ in size" if by_tokens else "optimizer steps"
    blocks: list[Block] = [
        Table(["run", "mechanism", "seed", "steps", "training loss", "validation loss"], rows, labels=2),
        "Losses in nats per token; validation loss is over the targets that every mechanism has.",
        Picture("loss", f"Loss against {against}.", figures.loss_figure(curves, by_tokens)),
    ]
    return Section("Training", blocks + same_batches(found.runs))


def same_batches(runs: list[Run]) -> list[Block]:
    """Training losses against vanilla's, where both saw the same batches: what differs by little can then be seen."""
    pairs = numbers.same_batches(runs)
    if not pairs:
        return []
    body = [
        [
            r["name"],
            r["against"],
            f"{r['first_step']:,} to {r['last_step']:,}",
            f"{r['nats']:+.4f}",
            nats(r["low"], r["high"]),
        ]
        for r in map(numbers.training_difference, pairs)
    ]
    names = {id(run): name for name, run in numbers.runs_by_seed(runs)}
    curves = [(names[id(pair.run)], pair.steps, pair.nats) for pair in pairs]
    return [
        Table(["run", "against", "steps", "training loss, nats", "95 % over steps"], body, labels=2),
        "Step by step over the same batches, the last fifth of the steps that both have. A model with tokens in front "
        "of a sample also predicts the sample's first one, from nothing: its mean is over one more target, a hard one. "
        "The interval says how other batches might turn out; how another training, be it one that differs in "
        "rounding alone, is not in it.",
        Picture(
            "loss_difference",
            "Training loss minus vanilla's on the same batches, mean over windows of steps: below the line is better.",
            figures.loss_difference_figure(curves, list(names.values())),
        ),
    ]


def nats(low: float, high: float) -> str:
    """An interval of a small difference."""
    return f"{low:+.4f} to {high:+.4f}"


def sinks(found: Found) -> Section:
    """Measures of inspected models, and how sinks emerged in runs."""
    blocks: list[Block] = []
    if found.inspections:
        blocks += [inspection_table(found.inspections), _INSPECTION_NOTE]
        models = numbers.by_seed(found.inspections)
        layers = [(title, a.data["measures"]) for title, of in models for a in of]
        caption = "Attention to the sink and the residual stream, layer by layer (mean over heads and sequences)."
        blocks.append(Picture("layers", caption, inspect_figures.layers_figure(layers)))
        shown = [(title, of[0]) for title, of in models[:MAPPED]]
        maps = numbers.common_maps([a for _, a in shown])
        if maps[0]:
            caption = (
                "Average attention logits over sequences of 16 tokens, the same layers and heads of each model. A "
                "bright first column is a sink; S marks sink tokens, +1 the extra column."
            )
            if len(shown) < len(found.inspections):
                caption += f" {len(shown)} of {len(found.inspections)} models; the others are in their own folders."
            rows = [(t, a.data["sequences"]["prefix"], m) for (t, a), m in zip(shown, maps, strict=True)]
            figure = inspect_figures.maps_figure(rows)
            blocks.append(Picture("attention_maps", caption, figure))
    logged = [r for r in found.runs if r.probes]
    if logged and not found.inspections:
        blocks.append(logged_table(numbers.logged_sinks(logged)))
    curves = numbers.emergence(found.inspections, logged)
    if curves:
        caption = "When sinks emerge: measures of a run's checkpoints, or those that it logged while training."
        blocks.append(Picture("emergence", caption, inspect_figures.emergence_figure(curves)))
    return Section("Attention sinks", blocks)


MAPPED = 6
"""Models whose attention maps a page shows at most, one of each group of seeds."""

_INSPECTION_NOTE = (
    "Sink_1 at epsilon: share of (layer, head, sequence) in which position 0 receives more than epsilon of the "
    "attention on average; even attention would give the floor. Last query: its attention to the first position or the "
    "sink tokens and to the column, mean over layers and heads. Massive, norm, kurtosis: the largest over depths."
)


def inspection_table(abouts: list[About]) -> Table:
    thresholds = [t for t in ("0.1", "0.2", "0.3") if all(t in a.data["measures"]["sink_rates"] for a in abouts)]

    def row(r: Record) -> dict[str, str]:
        return {
            "model": r["title"],
            **{f"Sink_1 at {t}": f"{100 * r['sink_rates'][t]:.1f} %" for t in thresholds},
            "first text token at 0.3": share(r["text_rate"]),
            "column at 0.3": share(r["column_rate"]),
            "alpha of position 0": f"{r['first']:.3f}",
            "floor": f"{r['floor']:.3f}",
            "last query": f"{r['last_query']:.3f} at {r['last_query_positions']:,}",
            "massive ratio": f"{r['massive']:,.0f}",
            "norm ratio": f"{r['norm']:.2f}",
            "value norm": f"{r['value_norm']:.2f}",
            "kurtosis": f"{r['kurtosis']:.1f}",
        }

    rows = list(map(row, numbers.inspected(abouts)))
    # Which columns say anything depends on the mechanisms: without a prefix there is no first text token behind it.
    head = [name for name in rows[0] if any(r[name] for r in rows)]
    return Table(head, [[r[name] for name in head] for r in rows])


def logged_table(records: list[Record]) -> Table:
    """Means over layers of what runs logged last; older runs logged less."""

    def mean(r: Record, name: str, form: str = ".3f") -> str:
        return format(float(np.mean(r[name])), form) if name in r else ""

    def row(r: Record) -> dict[str, str]:
        return {
            "run": r["name"],
            "mechanism": r["mechanism"],
            "step": f"{r['step']:,}",
            "Sink_1 at 0.3": share(r["sink_share"]),
            "to position 0": mean(r, "first_mass"),
            "floor": f"{r['uniform_floor']:.3f}",
            "to column": mean(r, "column_mass"),
            "last query": format(last_mass(r), ".3f") if "last_prefix" in r else "",
            "entropy, nats": mean(r, "entropy", ".2f"),
        }

    rows = list(map(row, records))
    return Table(list(rows[0]), [list(r.values()) for r in rows], labels=2)


def speed(found: Found) -> list[Section]:
    """Nothing where nobody took the time."""
    measured = (
        (training_speed_table, [numbers.training(r) for r in found.runs]),
        (streaming_speed_table, numbers.streaming_speed(found.results)),
    )
    tables = [table(records) for table, records in measured if any(r["tokens_per_second"] for r in records)]
    note = (
        "Training: median tokens/s over the run. Streaming: tokens/s of each setting. Memory: of the GPU, or of the "
        "whole process on a CPU. Speeds of different devices, or of one that others used too, do not compare."
    )
    return [Section("Speed and memory", [*tables, note])] if tables else []


def training_speed_table(records: list[Record]) -> Table:
    """Beside each run its share of vanilla's speed, where both ran on the same device."""
    base = {r["device"]: r["tokens_per_second"] for r in reversed(records) if r["mechanism"] == "vanilla"}
    rows = []
    for r in records:
        rate, vanilla = r["tokens_per_second"], base.get(r["device"])
        beside = f"{rate / vanilla:.2f} x" if rate and vanilla else ""
        peak = memory(r["peak_memory_bytes"])
        rows.append([r["name"], r["mechanism"], formatted(rate, ",.0f"), beside, peak, r["device"]])
    head = ["training run", "mechanism", "tokens/s", "of vanilla's", "peak memory", "device"]
    return Table(head, rows, labels=2)


def streaming_speed_table(records: list[Record]) -> Table:
    """One row per model, device and precision; one column per setting."""
    settings = sorted({r["setting"] for r in records}, key=setting_order)
    rows: dict[tuple[str, str], dict[str, Record]] = {}
    for r in records:
        rows.setdefault((r["title"], f"{r['device']}, {r['dtype']}"), {})[r["setting"]] = r
    body = []
    for (title, where), by_setting in rows.items():
        rates = [formatted(by_setting[s]["tokens_per_second"], ",.0f") if s in by_setting else "" for s in settings]
        peaks = [r["peak_memory_bytes"] for r in by_setting.values() if r["peak_memory_bytes"]]
        body.append([title, *rates, memory(max(peaks) if peaks else None), where])
    return Table(["streaming", *map(heading, settings), "peak memory", "device"], body)


def zero_shot(abouts: list[About], with_paper: bool) -> Section:
    """Accuracies in per cent with their standard errors, the paper's beside."""
    names = numbers.titles(abouts)
    found = [numbers.accuracies(a) for a in abouts]
    tasks = list(dict.fromkeys(t for entry in found for t in entry))
    shown = False
    rows = []
    for name, a, entry in zip(names, abouts, found, strict=True):
        row = [name]
        for task in tasks:
            value, error = entry.get(task, (None, None))
            text = "" if value is None else f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error else "")
            theirs = paper.zero_shot(a.mechanism, task, a.data["model"]["shape"]) if with_paper else None
            if text and theirs is not None:
                text, shown = f"{text} ({theirs:.1f})", True
            row.append(text)
        rows.append(row)
    note = "Accuracy in per cent ± one standard error over the questions."
    if shown:
        note += f" In parentheses: {paper.ZERO_SHOT_CITATION}."
    harness = _all(str(a.data["harness"]) for a in abouts if "harness" in a.data)
    limits = _all(f"{a.data['limit']:,}" for a in abouts if a.data.get("limit"))
    if harness:
        note += f" lm-evaluation-harness {harness}."
    if limits:
        note += f" Only the first {limits} questions of each task."
    return Section("Zero-shot tasks", [Table(["model", *tasks], rows), note])


# --- provenance ---------------------------------------------------------------------------------------------------


def provenance(found: Found) -> Table:
    """One row per file that a number came from; hashes are shortened here, not in provenance.csv."""
    head = ["from", "name", "model", "data", "device", "versions", "commit", "made", "command", "folder"]
    records = numbers.sources(found)
    rows = [[str(r[key])[:12] if key in ("model", "data") else str(r[key]) for key in head] for r in records]
    return Table(head, rows, labels=len(head))


def all_settings(results: Sequence[Result]) -> list[str]:
    """Every setting that occurs, in order."""
    return sorted({s for r in results for s in r.settings}, key=setting_order)
