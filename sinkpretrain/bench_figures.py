"""Figures of benchmarks."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from sinkpretrain.comparison.paper import FIGURE_10
from sinkpretrain.figures import COLOURS, styled, tidy

STRATEGIES = {"recompute": "window with re-computation", "streaming": "streaming"}


@styled
def decode_figure(report: dict[str, Any]) -> Figure:
    """Figure 10 of StreamingLLM: time per token and memory against the size of the cache, one column per model."""
    found = [f for f in report["figures"] if f["drawing"] == "temperature" and f["strategy"] in STRATEGIES]
    models = list(dict.fromkeys(f["model"] for f in sorted(found, key=lambda f: int(f["parameters"]))))
    figure = Figure(figsize=(0.8 + 3.1 * len(models), 5.6), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False, sharex=True)
    lines: dict[str, Any] = {}
    for column, model in enumerate(models):
        time, memory = axes[:, column]
        for colour, (strategy, label) in zip(COLOURS, STRATEGIES.items(), strict=False):
            mine = [f for f in found if (f["model"], f["strategy"]) == (model, strategy)]
            mine.sort(key=lambda f: f["length"])
            lengths = [f["length"] for f in mine]
            if mine:
                (line,) = time.plot(lengths, [f["milliseconds"] for f in mine], "o-", color=colour, markersize=4)
                lines.setdefault(f"{label}, {report['device']}", line)
                memory.plot(lengths, [f["peak_memory_bytes"] / 2**30 for f in mine], "o-", color=colour, markersize=4)
            if model in FIGURE_10:
                place = list(STRATEGIES).index(strategy)
                numbers = {length: values[place] for length, values in FIGURE_10[model].items()}
                (line,) = time.plot(
                    list(numbers), list(numbers.values()), "s:", color=colour, markersize=4, markerfacecolor="white"
                )
                lines.setdefault(f"{label}, the paper's (A6000)", line)
        time.set_title(model)
        _milliseconds(time)
        memory.set_ylim(0, 1.1 * max(float(max(line.get_ydata())) for line in memory.lines))
        memory.set_xlabel("cache, tokens")
        _sizes(memory, sorted({f["length"] for f in found}))
        for axis in (time, memory):
            tidy(axis)
    axes[0, 0].set_ylabel("ms per token")
    axes[1, 0].set_ylabel("memory, GiB")
    figure.align_ylabels(axes[:, 0])
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(2, len(lines)), frameon=False)
    return figure


def _milliseconds(axis: Axes) -> None:
    """Logarithmic, with numbers as one says them at 1, 2 and 5."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else ""))


def _sizes(axis: Axes, lengths: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(lengths)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
