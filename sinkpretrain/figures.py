"""Figures of a comparison: perplexity against position, and loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from sinkpretrain.files import write_atomically

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""

Curve = tuple[list[int], list[float]]
"""Steps and losses."""


def running_perplexity(nll: NDArray[np.float32], points: int = 200) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Token positions and the perplexity of all tokens up to there, for losses [tokens]."""
    ends = np.unique(np.geomspace(min(16, len(nll)), len(nll), points).astype(np.int64))
    sums = np.cumsum(nll, dtype=np.float64)[ends - 1]
    return ends.astype(np.float64), np.exp(np.minimum(sums / ends, 700.0))


def perplexity_figure(models: Sequence[tuple[str, Mapping[str, NDArray[np.float32]]]], settings: list[str]) -> Figure:
    """Perplexity up to a position: one panel per cache, one line per model, dashed where a column was left out.

    Args:
        models: the name of each, and its losses by setting.
        settings: all that occur, in order; ``X-nocolumn`` shares the panel of ``X``.
    """
    panels = list(dict.fromkeys(s.removesuffix("-nocolumn") for s in settings))
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 3.1 * columns, 1.0 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    lines: dict[str, Any] = {}
    for place, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        for number, (name, losses) in enumerate(models):
            for setting, style, remark in ((panel, "-", ""), (f"{panel}-nocolumn", "--", " without column")):
                if setting in losses:
                    x, y = running_perplexity(losses[setting])
                    (line,) = axis.plot(x, y, style, color=COLOURS[number % len(COLOURS)], linewidth=1.6)
                    lines.setdefault(name + remark, line)
        axis.set_title(panel, fontsize=10)
        _tidy(axis)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _tick(v)))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: _tick(v) if f"{v:.0e}"[0] in "25" else ""))
        if place + columns >= len(panels):  # nothing below it
            axis.set_xlabel("tokens read")
            axis.tick_params(labelbottom=True)
        if place % columns == 0:
            axis.set_ylabel("perplexity so far")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    return figure


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.0e}"


def loss_figure(runs: list[tuple[str, Curve, Curve]]) -> Figure:
    """Training loss (a running mean) and validation loss (points) of each run: its name and the two curves."""
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axis = figure.subplots()
    for number, (name, (steps, losses), validation) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        width = max(1, len(losses) // 100)
        if losses:
            smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
            axis.plot(steps[width - 1 :], smooth, color=colour, linewidth=1.4, label=name)
        axis.plot(*validation, "o", color=colour, markersize=4, markerfacecolor="white")
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss, nats per token")
    axis.set_title("training loss (lines) and validation loss (circles)", fontsize=10)
    _tidy(axis)
    axis.legend(frameon=False)
    return figure


def _tidy(axis: Axes) -> None:
    axis.grid(True, which="both", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    FigureCanvasAgg(figure)
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=150))
