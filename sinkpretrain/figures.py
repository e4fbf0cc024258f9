"""Figures of comparisons and inspections, in one style, for files and for pages in light and dark colours."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from sinkpretrain.files import write_atomically

PALETTE = {
    "ink": ("#24292f", "#e6e8eb"),
    "grid": ("#d8dce0", "#3a4149"),
    "series-1": ("#0072b2", "#58b0ee"),
    "series-2": ("#d55e00", "#ff8f4a"),
    "series-3": ("#009e73", "#35cf9f"),
    "series-4": ("#cc79a7", "#eaa3cb"),
    "series-5": ("#e69f00", "#f3c14d"),
    "series-6": ("#56b4e9", "#a5d8fa"),
    "series-7": ("#5d5d5d", "#b9bcc0"),
    "series-8": ("#999933", "#cdcd6a"),
}
"""(on light, on dark) of every colour that a figure uses; the series are Okabe and Ito's, told apart by colour-blind
readers too. No two are the same, so that a page can exchange them."""

COLOURS = tuple(light for name, (light, _) in PALETTE.items() if name.startswith("series"))
INK, GRID = PALETTE["ink"][0], PALETTE["grid"][0]
STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": GRID,
    "axes.titlesize": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "sinkpretrain",
}

Parameters = ParamSpec("Parameters")


def styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw in the common style, whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return wrapped


Curve = tuple[list[int], list[float]]
"""Steps and losses."""


def running_perplexity(nll: NDArray[np.float32], points: int = 200) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Token positions and the perplexity of all tokens up to there, for losses [tokens]."""
    ends = np.unique(np.geomspace(min(16, len(nll)), len(nll), points).astype(np.int64))
    sums = np.cumsum(nll, dtype=np.float64)[ends - 1]
    return ends.astype(np.float64), np.exp(np.minimum(sums / ends, 700.0))


@styled
def perplexity_figure(models: Sequence[tuple[str, Mapping[str, NDArray[np.float32]]]], settings: list[str]) -> Figure:
    """Perplexity up to a position: one panel per cache, one line per model, dashed where a column was left out.

    Args:
        models: the name of each, and its losses by setting.
        settings: all that occur, in order; ``X-nocolumn`` shares the panel of ``X``.
    """
    panels = list(dict.fromkeys(s.removesuffix("-nocolumn") for s in settings))
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 3.1 * columns, 1.0 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    lines: dict[str, Any] = {}
    for place, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        for number, (name, losses) in enumerate(models):
            for setting, style, remark in ((panel, "-", ""), (f"{panel}-nocolumn", "--", " without column")):
                if setting in losses:
                    x, y = running_perplexity(losses[setting])
                    (line,) = axis.plot(x, y, style, color=COLOURS[number % len(COLOURS)], linewidth=1.6)
                    lines.setdefault(name + remark, line)
        axis.set_title(f"cache {panel}" if "+" in panel else panel)
        _tidy(axis)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
        low, high = axis.get_ylim()
        labelled = "25" if high > 10 * low else "2357"
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _, d=labelled: _tick(v) if f"{v:.0e}"[0] in d else ""))
        if place + columns >= len(panels):  # nothing below it
            axis.set_xlabel("tokens read")
            axis.tick_params(labelbottom=True)
        if place % columns == 0:
            axis.set_ylabel("perplexity so far")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=min(columns, len(lines)), frameon=False
    )
    return figure


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


@styled
def loss_figure(runs: list[tuple[str, Curve, Curve]]) -> Figure:
    """Training loss (a running mean) and validation loss (points) of each run: its name and the two curves."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    for number, (name, (steps, losses), validation) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        width = max(1, len(losses) // 100)
        if losses:
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            thin = max(1, len(smooth) // 1000)  # more points than pixels only make files large
            axis.plot(steps[width - 1 :: thin], smooth[::thin], color=colour, linewidth=1.4, label=name)
        axis.plot(*validation, "o", color=colour, markersize=4, markerfacecolor="none")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss, nats per token")
    axis.set_title("training loss (lines) and validation loss (circles)")
    _tidy(axis)
    axis.legend(frameon=False)
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
        ("attention to position 0", "alpha minus even attention's", heads("first", minus_floor=True)),
        ("attention to the extra column", "mean mass", heads("column")),
        ("entropy of the attention", "nats", heads("entropy")),
        ("value at position 0", "norm / mean norm of others", heads("value_norm")),
        ("first token in the residual stream", "norm / mean norm of others", depths("norm")),
        ("massive activations", "max |h| / median |h|", depths("massive")),
    ]
    return _panel_figure(panels, models, "layer (residual stream: blocks passed)")


@styled
def emergence_figure(runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """Sink measures against training steps: the name of each run and its lines of measures, in order of steps."""

    def over(value: Callable[[Mapping[str, Any]], float], needs: str) -> Callable[[Mapping[str, Any]], Any]:
        def curve(run: Mapping[str, Any]) -> Any:
            lines = [line for line in run["lines"] if needs in line]
            return ([line["step"] for line in lines], [value(line) for line in lines]) if lines else None

        return curve

    def column(run: Mapping[str, Any]) -> Any:
        found = over(lambda line: float(np.mean(line["column_mass"])), "column_mass")(run)
        return found if found and any(found[1]) else None

    panels: list[Panel] = [
        ("heads with a sink at position 0", "Sink$_1$ at 0.3, %", over(lambda x: 100 * x["sink_share"], "sink_share")),
        (
            "attention to position 0",
            "mean minus even attention's",
            over(lambda x: float(np.mean(x["first_mass"])) - x["uniform_floor"], "first_mass"),
        ),
        ("attention to the extra column", "mean mass", column),
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
    return _panel_figure(panels, [(name, {"lines": lines}) for name, lines in runs], "optimizer step")


def _panel_figure(panels: Sequence[Panel], models: Sequence[tuple[str, Mapping[str, Any]]], x_label: str) -> Figure:
    """One panel per measure that any model has, one line per model."""
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
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for number, ((name, _), curve) in enumerate(zip(models, curves, strict=True)):
            if curve:
                style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.5, "marker": "o", "markersize": 3}
                (lines[name],) = axis.plot(*curve, **style)
        _tidy(axis)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(3, len(lines)), frameon=False)
    return figure


def _tidy(axis: Axes) -> None:
    axis.grid(True, which="both", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    FigureCanvasAgg(figure)
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=150))


def svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element without a background, scaled by its page, texts as text."""
    file = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Names of groups are the same in every figure; an id may stand in a page once, and nothing refers to these.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    width = figure.get_size_inches()[0] * 96
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="--width: {width:.0f}px"', text, count=1)
