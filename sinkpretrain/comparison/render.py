"""Sections as markdown, as one HTML page, as tables in a terminal; records as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import rich.table
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console

from sinkpretrain import figures
from sinkpretrain.comparison.blocks import Picture, Section, Table
from sinkpretrain.comparison.numbers import Record


def markdown(title: str, sections: Sequence[Section]) -> str:
    """A document; pictures are links to the PNG files beside it."""
    lines = [f"# {title}", ""]
    for section in sections:
        if section.title != title:
            lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                lines += markdown_table(block)
            elif isinstance(block, Picture):
                lines.append(f"![{block.caption}]({block.name}.png)")
            else:
                lines.append(block)
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(table: Table) -> list[str]:
    rule = "|" + "---|" * len(table.head)
    lines = [f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |" for row in [table.head, *table.rows]]
    return [lines[0], rule, *lines[1:]]


def html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """One page without a reference to anything outside of it; figures are inline SVG in the page's colours."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.tests["table"] = lambda block: isinstance(block, Table)
    environment.tests["picture"] = lambda block: isinstance(block, Picture)
    environment.filters["anchor"] = lambda text: re.sub(r"\W+", "-", text.lower()).strip("-")
    environment.filters["svg"] = inline_svg
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, subtitle=subtitle, sections=sections, palette=figures.PALETTE)


def inline_svg(figure: Figure) -> Markup:
    """The figure as an SVG element whose colours are the page's variables, so that they follow its colour scheme."""
    text = figures.svg(figure)
    for name, (light, _) in figures.PALETTE.items():
        text = re.sub(re.escape(light) + r"\b", f"var(--{name})", text, flags=re.IGNORECASE)
    return Markup(text)


def console_table(table: Table, title: str, console: Console) -> rich.table.Table:
    """The same table for a terminal, with rows for columns where it is too wide for that."""
    unbounded = console.options.update(max_width=10_000)
    shown = _console_table([table.head, *table.rows], title)
    if console.measure(shown, options=unbounded).maximum > console.width and len(table.rows) < len(table.head):
        return _console_table([list(line) for line in zip(table.head, *table.rows, strict=True)], title)
    return shown


def _console_table(lines: list[list[str]], title: str) -> rich.table.Table:
    shown = rich.table.Table(*lines[0], title=title)
    for row in lines[1:]:
        shown.add_row(*row)
    return shown


def as_csv(records: Sequence[Record]) -> str:
    """One line per record, the keys of all as columns; lists and mappings become one column per entry."""
    flat = [_flat(r) for r in records]
    text = io.StringIO()
    columns = list(dict.fromkeys(key for r in flat for key in r))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(value: Any, name: str = "") -> Record:
    """``{"a": {"b": 1}, "c": [2]}`` as ``{"a.b": 1, "c.0": 2}``."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: Record = {}
    for key, entry in items:
        path = f"{name}.{key}" if name else str(key)
        found |= _flat(entry, path) if isinstance(entry, dict | list) else {path: "" if entry is None else entry}
    return found


def finite(value: Any) -> Any:
    """The same data with null for every number that is not finite, which most readers of JSON cannot parse."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
