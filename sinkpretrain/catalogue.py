"""``sinkpretrain list``: every sink mechanism, what it adds, what it needs and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, Literal

from sinkpretrain import sinks
from sinkpretrain.config import RunConfig, SinkConfig, load_yaml, recipe_path
from sinkpretrain.exporters import FORMS, natural_form
from sinkpretrain.hooks import check_hooks
from sinkpretrain.model import without_weights


def list_mechanisms(
    config: str = "pythia-160m", format: Literal["table", "json", "markdown"] = "table", mechanism: str = ""
) -> str:
    """The sink mechanisms with their options, their parameters in a model, how they export, and what a stream keeps.

    Args:
        config: recipe of the model whose parameters are counted.
        format: table for a terminal, or json, or markdown.
        mechanism: this one alone; module:Class for one of your own.

    Raises:
        UserError: there is no such recipe or mechanism, or one of your own does not do what its hooks promise.
    """
    rows = catalogue(config, [mechanism] if mechanism else [])
    if format == "json":
        return json.dumps(rows, indent=2)
    return _markdown(rows) if format == "markdown" else _table(rows, config)


def catalogue(config: str = "pythia-160m", names: Collection[str] = ()) -> list[dict[str, Any]]:
    """One entry per mechanism, by default all of the package, with its default options; parameters are those it adds to
    the model of a recipe."""
    # Where the data decide how large the vocabulary is: any size, for what a mechanism adds does not depend on it.
    model = load_yaml(RunConfig, recipe_path(config)).model.resolved(2048)
    plain = without_weights(model).n_parameters()
    entries = []
    for name in names or sinks.REGISTRY:
        sink = SinkConfig(name)
        cls = sinks.mechanism_class(sink)
        if sink.from_outside:
            check_hooks(sink, model)
        net = without_weights(model, sink)
        learned = [i for i in net.prefix_ids if i >= model.tokenizer_size]
        entries.append(
            {
                "mechanism": name,
                "summary": cls.summary,
                "options": sinks.options(cls),
                "parameters": net.n_parameters() - plain + len(learned) * model.d_model,
                "export": natural_form(sink, model),
                "kept": cls.kept,
                "source": cls.source,
            }
        )
    return entries


def _options(row: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in row["options"].items())


def _markdown(rows: list[dict[str, Any]]) -> str:
    columns = ["mechanism", "options", "parameters", "export", "kept when streaming", "source"]
    cells = [
        [f"`{r['mechanism']}`", _options(r), f"{r['parameters']:,}", r["export"], r["kept"], r["source"]] for r in rows
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells])


def _table(rows: list[dict[str, Any]], config: str) -> str:
    from rich.console import Console
    from rich.table import Table

    forms = "; ".join(f"{form}: {what}" for form, what in FORMS.items())
    table = Table(caption=f"Parameters: added to {config}. Export {forms}.", caption_justify="left", show_lines=True)
    for name in ("mechanism", "parameters", "export", "what it is; options; what a stream keeps; source"):
        table.add_column(name, no_wrap=name in ("mechanism", "parameters"))
    for r in rows:
        about = [r["summary"], *([_options(r)] if r["options"] else []), f"keeps {r['kept']}", r["source"]]
        table.add_row(r["mechanism"], f"{r['parameters']:,}", r["export"], "\n".join(about))
    console = Console()
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()
