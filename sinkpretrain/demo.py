"""``sinkpretrain demo``: the whole path on a laptop, from text to Table 3, without a network.

The text is what every Python carries, the sources and documentation of its standard library, or the user's own.
"""

from __future__ import annotations

import sysconfig
import time
from dataclasses import replace
from pathlib import Path

from sinkpretrain.config import RunConfig, load_yaml, recipe_path, sink_recipe
from sinkpretrain.errors import UserError

SINKS = ("vanilla", "zero-sink", "one-sink-token")
"""Recipes of the mechanisms that are compared."""

CACHES = "0+64,1+63,2+62,4+60"
STREAMED_TOKENS = 50_000

HONEST = (
    "What this shows: the whole path works, on real text and with real training. What it does not show: the paper's "
    "effect. Attention sinks grow late in training, after thousands of steps; models this small, trained for a minute, "
    "hardly have any yet, and their columns differ little. The README says how to run the experiment at its real size."
)


def recipe(sink: str, data: Path, out: Path, steps: int) -> RunConfig:
    """The demo's model and schedule (``configs/demo.yaml``) with one mechanism."""
    base = load_yaml(RunConfig, recipe_path("demo"))
    return replace(
        base,
        out=str(out),
        name=sink,
        sink=sink_recipe(sink),
        data=replace(base.data, path=str(data)),
        training=replace(base.training, steps=steps),
    )


def standard_library() -> list[str]:
    """The standard library's own files and packages: no installed packages, and not its tests, which some
    distributions leave out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib-dynload"}
    return [
        str(p)
        for p in sorted(root.iterdir())
        if p.name not in left_out and (p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py"))))
    ]


def demo(out: str = "demo", text: str = "", steps: int = 600, paper: bool = True) -> None:
    """Prepare text, train three small models, stream them and print the table. An interrupted demo goes on.

    Args:
        out: folder for everything.
        text: file or folder with text of your own; by default the sources of Python's standard library.
        steps: training steps per model.
        paper: print the paper's table below ours.
    """
    from rich.console import Console

    from data_prep.prepare import PrepareConfig, describe, prepare
    from sinkpretrain.compare import compare, print_table
    from sinkpretrain.evaluate import stream
    from sinkpretrain.train import train

    console, started, folder = Console(), time.monotonic(), Path(out)
    sources = [text] if text else standard_library()

    def stage(number: int, title: str) -> None:
        console.print(f"\n[bold]{number}/4 {title}[/bold]  ({time.monotonic() - started:.0f} s so far)")

    stage(1, f"text to tokens: {'your text' if text else 'the standard library of this Python'}")
    manifest = prepare(
        PrepareConfig(
            source=sources,
            out=folder / "data",
            train_tokenizer="bpe:2048",
            validation_fraction=0.05,
        )
    )
    console.print(describe(manifest), highlight=False, soft_wrap=True)
    held_out = manifest.splits["validation"].tokens if "validation" in manifest.splits else 0
    if held_out < 1000:
        raise UserError(f"the text leaves only {held_out} tokens to evaluate on; give more text (a few megabytes).")

    stage(2, f"training {len(SINKS)} models of the same size on the same batches")
    runs = []
    for sink in SINKS:
        run = folder / "runs" / sink
        result = train(recipe(sink, folder / "data", run, steps))
        if not result.finished:
            raise KeyboardInterrupt
        runs.append(run)

    stage(3, "streaming over text that none of them has seen")
    for run in runs:
        stream(
            str(run),
            tokens=str(folder / "data"),
            split="validation",
            cache=CACHES,
            out=str(folder / "results" / run.name),
            max_tokens=min(held_out, STREAMED_TOKENS),
        )

    stage(4, "comparison")
    results = [folder / "results" / run.name for run in runs]
    comparison = compare([*results, *runs], folder / "comparison", paper=paper)
    print_table(comparison, console)
    console.print(f"\npage:   {folder / 'comparison' / 'index.html'}", highlight=False, soft_wrap=True)
    console.print(f"tables: {folder / 'comparison' / 'comparison.md'}\n", highlight=False, soft_wrap=True)
    console.print(HONEST, highlight=False)
    console.print(f"\n{time.monotonic() - started:.0f} s in all.", highlight=False)
