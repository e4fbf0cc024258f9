"""Figures of sink measures: by layer, by head, over training, and attention maps as figures 2 and 7 of StreamingLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from sinkpretrain.figures import PROGRESS, legend_below, styled, styles, tidy
from sinkpretrain.measures import last_mass

Map = Mapping[str, Any]
"""One entry of ``average_logits`` in inspect.json: ``layer``, ``head`` (None: mean of heads), ``rows`` (lists that end
at the diagonal; None where a query does not see a key), and ``column``, its column's logits or None."""


@styled
def maps_figure(models: Sequence[tuple[str, int, Sequence[Map]]]) -> Figure:
    """Average attention logits: the name of each model, the length of its prefix, and its maps, the same for all.

    Each model has a row of panels (several, if there are many maps). Sink tokens are marked S; a mechanism's column
    stands to the left of the keys, marked +1.
    """
    count = len(models[0][2])
    columns = min(6, count)
    rows_each = -(-count // columns)
    height = 0.5 + 2.35 * rows_each * len(models)
    figure = Figure(figsize=(0.6 + 2.25 * columns, height), layout="constrained")
    folders = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for folder, (name, n_prefix, maps) in zip(folders, models, strict=True):
        folder.suptitle(name, fontsize=10, fontweight="bold")
        axes = folder.subplots(rows_each, columns, squeeze=False)
        for place, (axis, entry) in enumerate(zip(axes.flat, maps, strict=False)):
            image = _draw_map(axis, entry, n_prefix)
            if place >= count - columns:
                axis.set_xlabel("key", fontsize=8)
            if place % columns == 0:
                axis.set_ylabel("query", fontsize=8)
            bar = folder.colorbar(image, ax=axis, shrink=0.75, aspect=16, pad=0.02)
            bar.ax.tick_params(labelsize=7)
            bar.outline.set_visible(False)
        for axis in axes.flat[count:]:
            axis.set_visible(False)
    figure.supxlabel("average logit q·k/√d before the softmax", fontsize=9)
    return figure


def _draw_map(axis: Axes, entry: Map, n_prefix: int) -> Any:
    T = len(entry["rows"])
    values = np.full((T, T), np.nan)
    for i, row in enumerate(entry["rows"]):
        values[i, : i + 1] = [np.nan if v is None else v for v in row]
    shown = [*range(n_prefix), *range(n_prefix + (-n_prefix % 5), T, 5)]
    labels = ["S" if t < n_prefix else str(t) for t in shown]
    axis.set_yticks(shown, labels)
    if entry["column"] is not None:
        extra = np.array(entry["column"])[:, None]
        values = np.concatenate((extra, np.full((T, 1), np.nan), values), axis=1)
        shown, labels = [0, *(t + 2 for t in shown)], ["+1", *labels]
    axis.set_xticks(shown, labels)
    head = "mean of heads" if entry["head"] is None else f"head {entry['head']}"
    axis.set_title(f"layer {entry['layer']}, {head}", fontsize=9)
    axis.tick_params(labelsize=7)
    axis.spines[:].set_visible(False)
    return axis.imshow(values, cmap="viridis", interpolation="nearest")


@styled
def heads_figure(models: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """Attention to position 0, and to the column where there is one, of every head of every layer."""
    panels = [
        (f"{name}\n{title}", np.asarray(m[key]))
        for name, m in models
        for key, title in (("first", "attention to position 0"), ("column", "attention to the extra column"))
        if np.any(m[key])
    ]
    width = 0.12 * max(values.shape[1] for _, values in panels)
    height = 0.12 * max(values.shape[0] for _, values in panels)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    top = max(0.1, *(float(values.max()) for _, values in panels), 0.0)
    figure = Figure(figsize=(1.2 + (2.2 + width) * columns, (1.3 + max(1.2, height)) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, values) in zip(axes.flat, panels, strict=False):
        image = axis.imshow(
            values, cmap="viridis", vmin=0, vmax=top, aspect="auto", interpolation="nearest", origin="lower"
        )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_locator(MaxNLocator(8, integer=True))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, label="mean attention (alpha)", shrink=0.8)
    return figure


Panel = tuple[str, str, Callable[[Mapping[str, Any]], tuple[Sequence[float], Sequence[float]] | None]]
"""Title, label of the y axis, and the curve (x, y) of one model's measures, or None if it has none."""


@styled
def layers_figure(models: Sequence[tuple[str, Mapping[str, Any]]]) -> Figure:
    """Sink measures by layer: the name of each model and its ``measures`` as ``inspect`` writes them."""

    def heads(name: str, minus_floor: bool = False) -> Callable[[Mapping[str, Any]], Any]:
        def curve(m: Mapping[str, Any]) -> Any:
            values = np.mean(m[name], axis=1) - (m["floor"]["first"] if minus_floor else 0)
            return (range(len(values)), values) if np.any(m[name]) else None

        return curve

    def depths(name: str) -> Callable[[Mapping[str, Any]], Any]:
        return lambda m: (range(len(m[name])), m[name])

    panels: list[Panel] = [
        ("attention to position 0", "alpha - even attention", heads("first", minus_floor=True)),
        ("attention to the extra column", "mean mass", heads("column")),
        ("entropy of the attention", "nats", heads("entropy")),
        ("value at position 0", "norm / mean norm of others", heads("value_norm")),
        ("first token in the residual stream", "norm / mean norm of others", depths("norm")),
        ("massive activations", "max |h| / median |h|", depths("massive")),
    ]
    return _panel_figure(panels, models, "layer (residual stream: blocks passed)")


@styled
def emergence_figure(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Sink measures against training steps: the name of each run and its lines of measures, in order of steps; against
    the tokens read if all lines have them."""
    by_tokens = all("tokens" in line for _, lines in runs for line in lines)
    label, scale = PROGRESS[by_tokens]

    def at(line: Mapping[str, Any]) -> float:
        return scale * float(line["tokens" if by_tokens else "step"])

    def over(value: Callable[[Mapping[str, Any]], float], needs: str) -> Callable[[Mapping[str, Any]], Any]:
        def curve(run: Mapping[str, Any]) -> Any:
            lines = [line for line in run["lines"] if needs in line]
            return ([at(line) for line in lines], [value(line) for line in lines]) if lines else None

        return curve

    def column(run: Mapping[str, Any]) -> Any:
        found = over(lambda line: float(np.mean(line["column_mass"])), "column_mass")(run)
        return found if found and any(found[1]) else None

    panels: list[Panel] = [
        ("heads with a sink at position 0", "Sink$_1$ at 0.3, %", over(lambda x: 100 * x["sink_share"], "sink_share")),
        (
            "attention to position 0",
            "mean - even attention",
            over(lambda x: float(np.mean(x["first_mass"])) - x["uniform_floor"], "first_mass"),
        ),
        ("attention to the extra column", "mean mass", column),
        (
            "last query of a whole context",
            "attention to position 0,\nsink tokens or column, mean",
            over(last_mass, "last_prefix"),
        ),
        (
            "first token in the residual stream",
            "norm / mean norm of others,\nlargest over depths",
            over(lambda x: max(x["norm"]), "norm"),
        ),
        (
            "massive activations",
            "max |h| / median |h|,\nlargest over depths",
            over(lambda x: max(x["massive"]), "massive"),
        ),
        (
            "value at position 0",
            "norm / mean norm of others",
            over(lambda x: float(np.mean(x["value_norm"])), "value_norm"),
        ),
    ]
    return _panel_figure(panels, [(name, {"lines": lines}) for name, lines in runs], label)


def _panel_figure(panels: Sequence[Panel], models: Sequence[tuple[str, Mapping[str, Any]]], x_label: str) -> Figure:
    """One panel per measure that any model has, one line per model; those of one name look alike."""
    drawn = [(title, label, [curve(m) for _, m in models]) for title, label, curve in panels]
    drawn = [panel for panel in drawn if any(panel[2])]
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(0.4 + 3.5 * columns, 0.9 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    lines: dict[str, Any] = {}
    for axis, (title, label, curves) in zip(axes.flat, drawn, strict=False):
        axis.set_title(title)
        axis.set_ylabel(label)
        axis.set_xlabel(x_label)
        for (name, _), style, curve in zip(models, styles([m[0] for m in models]), curves, strict=True):
            if curve:
                (lines[name],) = axis.plot(*curve, **style, linewidth=1.5, marker="o", markersize=3)
        _scale_x(axis, [x for curve in curves if curve for x in curve[0]])
        if not any(np.any(curve[1]) for curve in curves if curve):
            axis.set_ylim(-0.05, 1)  # nothing but zeros: not a scale of thousandths around them
        tidy(axis)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    legend_below(figure, lines)
    return figure


def _scale_x(axis: Axes, values: Sequence[float]) -> None:
    """Whole numbers; steps that are spaced as powers of two, as early checkpoints are, by their logarithm."""
    positive = sorted({x for x in values if x > 0})
    if len(positive) > 4 and positive[len(positive) // 2] < positive[-1] / 4:
        axis.set_xscale("symlog", linthresh=positive[0])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
