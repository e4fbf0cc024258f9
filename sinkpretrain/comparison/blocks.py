"""What a section is made of, and how single numbers are printed, still without a format of the page."""

from __future__ import annotations

from dataclasses import dataclass, field

from matplotlib.figure import Figure

from sinkpretrain.comparison.numbers import Record
from sinkpretrain.statistics import change

GIB = 2**30


@dataclass(frozen=True)
class Table:
    """Cells as they are printed; the first ``labels`` columns are text, the rest numbers."""

    head: list[str]
    rows: list[list[str]]
    labels: int = 1


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and what it shows in words."""

    name: str
    caption: str
    figure: Figure


Block = str | Table | Picture


@dataclass
class Section:
    title: str
    blocks: list[Block] = field(default_factory=list)


# --- numbers as text ---------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """A perplexity as the paper prints it: two decimals, none above 1,000."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def cell(entry: Record | None, with_paper: bool, seeds: int) -> str:
    """``18.21 ± 0.05 (18.01)``: our mean, half its interval over seeds if there are several, the paper's value.

    Args:
        seeds: of the row; a cell of fewer says so.
    """
    if entry is None:
        return ""
    text = number(entry["mean"])
    if entry["high"] is not None:
        half = entry["high"] - entry["mean"]
        text += f" ± {half:,.0f}" if entry["mean"] >= 1000 else f" ± {number(half)}"
    if entry["n"] < seeds:
        text += f" (n={entry['n']})"
    return f"{text} ({number(entry['paper'])})" if with_paper and entry["paper"] else text


def heading(setting: str) -> str:
    """The name of a setting in words."""
    words = {
        "-nocolumn": " without column",
        "-initial-": " initial token ",
        "-absolute": " absolute positions",
        "-documents": " per document",
    }
    for part, word in words.items():
        setting = setting.replace(part, word)
    return setting


def interval(low: float | None, high: float | None) -> str:
    """A difference in nats as an interval of perplexity, blank without one."""
    if low is None or high is None:
        return ""
    return f"{change(low)} to {change(high)} %"


def share(value: float | None) -> str:
    """A share as per cent."""
    return "" if value is None else f"{100 * value:.1f} %"


def formatted(value: float | None, form: str) -> str:
    """A number, blank where there is none."""
    return "" if value is None else format(value, form)


def memory(value: int | None) -> str:
    """Bytes as GiB."""
    return "" if value is None else f"{value / GIB:.2f} GiB"
