"""Figures of comparisons and inspections, in one style, for files and for pages in light and dark colours."""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
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


Curve = tuple[Sequence[float], Sequence[float]]
"""Steps, or tokens read, and losses."""

PROGRESS = {False: ("optimizer step", 1.0), True: ("tokens read, millions", 1e-6)}
"""By whether curves are drawn against tokens: the label of the axis, and what a step or token is on it."""


Running = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Numbers of tokens, and what holds for all tokens up to there."""


def running_perplexity(nll: NDArray[np.floating]) -> Running:
    """The perplexity of losses [tokens]."""
    ends, means = _running_mean(nll, first=16)
    return ends, np.exp(np.minimum(means, 700.0))


def running_change(nll: NDArray[np.floating], base: NDArray[np.floating]) -> Running:
    """By how many per cent the perplexity differs from another's."""
    ends, means = _running_mean(nll.astype(np.float64) - base, first=256)
    return ends, 100 * np.expm1(np.minimum(means, 100.0))


def _running_mean(values: NDArray[np.floating], first: int) -> Running:
    ends = np.unique(np.geomspace(min(first, len(values)), len(values), 200).astype(np.int64))
    scored = np.cumsum(np.isfinite(values))[ends - 1]
    sums = np.nancumsum(values, dtype=np.float64)[ends - 1]
    return ends.astype(np.float64), sums / np.maximum(scored, 1)


def series(number: int) -> dict[str, Any]:
    """Colour and line of the nth model; from the ninth on colours come again with another line."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "-.", ":")[number // len(COLOURS) % 3]}


def styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """``series`` of each curve: curves of one name, which are seeds of one model, look alike."""
    order = list(dict.fromkeys(names))
    return [series(order.index(name)) for name in names]


def legend_below(figure: Figure, lines: Mapping[str, Any], most: int = 3) -> None:
    """A legend under the panels in at most so many columns; the figure grows by what it takes."""
    widest = 0.5 + 0.09 * max(map(len, lines))  # inches: a line and the name
    columns = max(1, min(most, len(lines), int(figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(lines) // columns) - 1))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False)


Models = Sequence[tuple[str, Mapping[str, NDArray[np.floating]]]]
"""The name of each model, and its losses by setting."""


@styled
def perplexity_figure(models: Models, settings: list[str]) -> Figure:
    """Perplexity up to a position: one panel per cache, one line per model, dashed where a column was left out.

    Args:
        settings: all that occur, in order; ``X-nocolumn`` shares the panel of ``X``.
    """
    figure, axes = _position_figure(models, settings, lambda nll, _: running_perplexity(nll), "perplexity so far")
    for axis in axes:
        axis.set_yscale("log")
    for axis in axes:  # only now: a scale sets the formatters of all panels that share it
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
        low, high = axis.get_ylim()
        labelled = "25" if high > 10 * low else "2357"
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _, d=labelled: _tick(v) if f"{v:.0e}"[0] in d else ""))
    return figure


@styled
def change_figure(models: Models, settings: list[str], bases: Mapping[str, NDArray[np.floating]]) -> Figure:
    """As ``perplexity_figure``, but as a change against other losses of the same text, named for each setting."""
    figure, axes = _position_figure(
        models, settings, lambda nll, setting: running_change(nll, bases[setting]), "change so far, %"
    )
    _signed_scale(axes)
    return figure


def _position_figure(
    models: Models,
    settings: list[str],
    curve: Callable[[NDArray[np.floating], str], Running],
    label: str,
) -> tuple[Figure, list[Axes]]:
    """Curves over token positions, a panel per cache; the figure and its panels.

    The panels share their axes, or those of a row do where each row is one size of cache (``_by_size``).
    """
    panels = list(dict.fromkeys(s.removesuffix("-nocolumn") for s in settings))
    places = _by_size(panels)
    small = bool(places)
    width, height = (2.2, 2.1) if small else (3.1, 2.6)
    if not small:
        columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
        places = [divmod(n, columns) for n in range(len(panels))]
    rows, columns = (max(place[side] for place in places) + 1 for side in (0, 1))
    figure = Figure(figsize=(1.2 + width * columns, 1.0 + height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey="row" if small else True)
    lines: dict[str, Any] = {}
    for place, panel in zip(places, panels, strict=True):
        axis = axes[place]
        for number, (name, losses) in enumerate(models):
            for setting, style, remark in (
                (panel, {}, ""),
                (f"{panel}-nocolumn", {"linestyle": "--"}, " without column"),
            ):
                if setting in losses:
                    (line,) = axis.plot(*curve(losses[setting], setting), linewidth=1.6, **series(number) | style)
                    lines.setdefault(name + remark, line)
        axis.set_title(f"cache {panel}" if "+" in panel else panel)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=4 if small else None))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _count(v)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        tidy(axis)
        row, column = place
        if not any(column == c and row < r for r, c in places):  # nothing below it
            axis.set_xlabel("tokens read")
            axis.tick_params(labelbottom=True)
        if not any(row == r and column > c for r, c in places):  # nor to its left
            axis.set_ylabel(label)
            axis.tick_params(labelleft=True)
    for place in np.ndindex(axes.shape):
        axes[place].set_visible(place in places)
    legend_below(figure, lines, min(columns, 3))
    return figure, [axes[place] for place in places]


MANY_PANELS = 6
"""Panels above which they are laid out by the size of the cache, if there are several sizes."""

MOST_COLUMNS = 6


def _by_size(panels: Sequence[str]) -> list[tuple[int, int]]:
    """Row and column of each cache x+y: x+y grows downwards and x to the right. Empty where that is no table."""
    caches = [re.fullmatch(r"(\d+)\+(\d+)", panel) for panel in panels]
    if len(panels) <= MANY_PANELS or None in caches:
        return []
    pairs = [(int(found[1]), int(found[1]) + int(found[2])) for found in caches if found]
    initial, sizes = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    if len(sizes) == 1 or len(initial) > MOST_COLUMNS:
        return []
    return [(sizes.index(size), initial.index(x)) for x, size in pairs]


@styled
def settings_figure(
    losses: Mapping[str, NDArray[np.floating]],
    places: NDArray[np.int64],
    reference: str | None,
    sizes: Sequence[int],
    label: str,
) -> Figure:
    """Perplexity at a position, one line per setting of one model, and its change against one of them.

    As figures 3 and 5 of StreamingLLM (arXiv 2309.17453), but at a position and not up to it: a collapse shows where
    it happens. Means over stretches of the text, which on a logarithmic axis grow with the position.

    Args:
        losses: of each setting, [tokens - 1]; NaN where there is none.
        places: how many tokens had been read before each, [tokens - 1].
        reference: the setting of the second panel; None: there is only one panel.
        sizes: of the caches, marked where they are full.
        label: of the axis of positions.
    """
    last = int(places.max()) + 1
    logarithmic = last > 12 * max(sizes, default=last)
    stretches = min(40, max(1, len(places) // FEW))
    if logarithmic:  # each a quarter longer than the one before, so that none is of few tokens
        first = min(64, last)
        spaced = np.geomspace(first, last, max(2, min(36, int(np.log(last / first) / np.log(1.25)))))
    else:
        spaced = np.linspace(0, last, stretches + 1)[1:]
    edges = np.unique(spaced.astype(np.int64))
    middle = (edges + np.append(0, edges[:-1])) / 2
    figure = Figure(figsize=(9.4 if reference else 5.6, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if reference else 1, squeeze=False)[0]
    lines = []
    for number, (name, nll) in enumerate(losses.items()):
        mean = float(np.nanmean(nll, dtype=np.float64))
        (line,) = axes[0].plot(
            middle, np.exp(np.minimum(_stretches(nll, places, edges), 700.0)), **_marked(number, edges, nll)
        )
        line.set_label(f"{name}: {_perplexity(np.exp(min(mean, 700.0)))}")
        lines.append(line)
        if reference and name != reference:
            change = 100 * np.expm1(np.minimum(_stretches(nll - losses[reference], places, edges), 100.0))
            axes[1].plot(middle, change, **_marked(number, edges, nll))
    axes[0].set_ylabel("perplexity")
    _readable_scale(axes[0])
    if reference:
        axes[1].set_ylabel("change of perplexity, %")
        _signed_scale([axes[1]])
    for axis in axes:
        if logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _count(v)))
        axis.set_xlabel(label)
        for size in sizes:
            if size < last:
                axis.axvline(size, color=INK, linewidth=0.9, linestyle=(0, (1, 3)))
        tidy(axis)
    axes[0].set_title("perplexity; dotted: the cache is full" if any(size < last for size in sizes) else "perplexity")
    if reference:
        axes[1].set_title(f"change against {reference}")
    widest = 0.1 * (max(len(str(line.get_label())) for line in lines) + 6)  # inches
    columns = min(len(lines), max(1, int(figure.get_figwidth() / widest)))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    return figure


FEW = 8
"""Values of which a mean would say little."""


def _stretches(
    values: NDArray[np.floating], places: NDArray[np.int64], edges: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Mean of the values whose place lies below each edge and not below the one before; NaN where they are too few."""
    there = np.isfinite(values)
    bins = np.searchsorted(edges, places[there], side="right")
    sums = np.bincount(bins, weights=values[there].astype(np.float64), minlength=len(edges) + 1)
    counts = np.bincount(bins, minlength=len(edges) + 1)
    means: NDArray[np.float64] = np.where(counts < FEW, np.nan, sums / np.maximum(counts, 1))[: len(edges)]
    return means


def _marked(number: int, edges: NDArray[np.int64], nll: NDArray[np.floating]) -> dict[str, Any]:
    """How a setting's line looks: points where few tokens were scored, for lines between them would mislead."""
    sparse = np.isfinite(nll).sum() < len(nll) // 2
    return series(number) | {"linewidth": 1.5} | ({"marker": "o", "markersize": 3.5, "linestyle": ""} if sparse else {})


def _drawn(axis: Axes) -> NDArray[np.float64]:
    """Heights of all points of all lines, at least one."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.lines] or [np.zeros(0)])
    return values[np.isfinite(values)] if np.isfinite(values).any() else np.ones(1)


def _signed_scale(axes: Sequence[Axes]) -> None:
    """Around a line at 0; logarithmic where values are far from it."""
    values = np.concatenate([_drawn(axis) for axis in axes])
    if np.abs(values).max() > 50:
        for axis in axes:
            axis.set_yscale("symlog", linthresh=1)
            axis.set_ylim(min(-1.0, 2 * values.min()), 2 * values.max())
    for axis in axes:
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _signed(v)))


def _readable_scale(axis: Axes) -> None:
    """Logarithmic where values differ by several times, with enough numbers on it."""
    low, high = float(_drawn(axis).min()), float(_drawn(axis).max())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    if high > 4 * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
        labelled = "25" if high > 30 * low else "23457"
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: _tick(v) if f"{v:.0e}"[0] in labelled else ""))


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 100 else _tick(value)


def _signed(value: float) -> str:
    return "0" if value == 0 else f"{value:+,g}" if abs(value) < 1e6 else f"{value:+.0e}"


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def _count(value: float) -> str:
    """A number of tokens, short enough for the axes of neighbouring panels."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(unit, 1e4):
            return f"{value / unit:g}{letter}"
    return f"{value:,.0f}"


@styled
def loss_figure(runs: list[tuple[str, Curve, Curve]], by_tokens: bool = False) -> Figure:
    """Training loss (a running mean) and validation loss (points) of each run: its name and the two curves, against
    steps or tokens read."""
    label, scale = PROGRESS[by_tokens]
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, Any] = {}
    for (name, (at, losses), validation), style in zip(runs, styles([r[0] for r in runs]), strict=True):
        width = max(1, len(losses) // 100)
        if losses:
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            thin = max(1, len(smooth) // 1000)  # more points than pixels only make files large
            x = scale * np.asarray(at)[width - 1 :: thin]
            (lines[name],) = axis.plot(x, smooth[::thin], **style, linewidth=1.4)
        x, y = scale * np.asarray(validation[0]), validation[1]
        axis.plot(x, y, "o", color=style["color"], markersize=4, markerfacecolor="none")
    axis.set_xlabel(label)
    axis.set_ylabel("loss, nats per token")
    axis.set_title("training loss (lines) and validation loss (circles)")
    tidy(axis)
    if len(lines) > 6:  # more would cover the curves
        legend_below(figure, lines)
    elif lines:
        axis.legend(lines.values(), lines.keys(), frameon=False)
    return figure


WINDOWS = 40
"""Points of a curve of differences."""


@styled
def loss_difference_figure(
    runs: list[tuple[str, NDArray[np.int64], NDArray[np.float64]]], names: Sequence[str]
) -> Figure:
    """Differences of training losses, each a mean over one of ``WINDOWS`` windows of steps.

    The first windows are left out of the scale: while losses fall fast, they differ by much more than later.

    Args:
        runs: name, steps and differences of each.
        names: of all runs in the order of their colours.
    """
    look = dict(zip(names, styles(names), strict=True))
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.subplots()
    lines: dict[str, Any] = {}
    shown = []
    for name, steps, nats in runs:
        edges = np.linspace(0, len(steps), min(WINDOWS, len(steps)) + 1).astype(int)
        x = [steps[a:b].mean() for a, b in itertools.pairwise(edges)]
        y = np.array([nats[a:b].mean() for a, b in itertools.pairwise(edges)])
        (line,) = axis.plot(x, y, linewidth=1.4, **look[name])
        lines.setdefault(name, line)
        shown += y[len(y) // 20 + (len(y) > 1) :].tolist()
    axis.axhline(0, color=INK, linewidth=0.8)
    low, high = min([*shown, 0.0]), max([*shown, 0.0])
    margin = 0.1 * (high - low) or 1e-3
    axis.set_ylim(low - margin, high + margin)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("nats per token")
    axis.set_title("training loss minus vanilla's, same batches")
    tidy(axis)
    legend_below(figure, lines)
    return figure


def tidy(axis: Axes) -> None:
    """A light grid behind the curves, and no frame where there is no scale."""
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
