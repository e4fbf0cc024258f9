"""``sinkpretrain demo``: the whole path on a laptop, from text to Table 3, without a network.

The text is what every Python carries, the sources and documentation of its standard library, or the user's own.
"""

from __future__ import annotations

import contextlib
import sysconfig
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sinkpretrain.config import RunConfig, load_yaml, recipe_path, sink_recipe
from sinkpretrain.errors import UserError
from sinkpretrain.tokens import Manifest

if TYPE_CHECKING:
    from sinkpretrain.compare import Comparison
    from sinkpretrain.comparison.numbers import Record

SINKS = ("vanilla", "zero-sink", "one-sink-token")
"""Recipes of the mechanisms that the demo trains."""

CACHES = "0+64,1+63,2+62,4+60"
"""Small enough to show what the first token is worth: the fewer others there are, the more (results/laptop.md)."""
STREAMED_TOKENS = 50_000
HELD_OUT = 0.05
"""Share of the text's documents that are kept for streaming; the same ones whatever the tokenizer."""

TRAINED = ("vanilla", "zero-sink", "one-sink-token", "two-sink-tokens")
MODELS = Path(__file__).parent.parent / "results" / "laptop" / "models"
"""Folders of models that were trained for long, one for each of ``TRAINED``; in a checkout, not in a wheel."""

TRAINED_TOKENS = 30_000
"""About a minute for all four on two cores."""

TOO_EARLY = (
    "This was the whole path, on real text and with real training, but not yet the paper's effect: attention sinks "
    "grow over thousands of steps, and these models have had {steps:,}."
)
NOT_HERE = (
    "The models that were trained for long enough come with the project's repository, in results/laptop/models, and "
    "are not part of this installation: run the demo from a checkout to see them."
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


@contextlib.contextmanager
def _other_files_unsaid() -> Iterator[None]:
    """Without a warning for each folder that also has files that are no text, as most of the standard library's do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="files of other formats")
        yield


def demo(out: str = "demo", text: str = "", steps: int = 300, paper: bool = True) -> None:
    """Prepare text, train three small models, stream them; then stream models that were trained for long.

    An interrupted demo goes on.

    Args:
        out: folder for everything.
        text: file or folder with text of your own; by default the sources of Python's standard library.
        steps: training steps per model.
        paper: print the paper's table below ours.
    """
    from rich.console import Console

    from data_prep.prepare import PrepareConfig, describe, prepare
    from sinkpretrain.compare import compare, print_table
    from sinkpretrain.train import train_whole

    if steps < 1:
        raise UserError(f"--steps must be at least 1, not {steps}.")
    console, started, folder = Console(), time.monotonic(), Path(out)
    sources = [text] if text else standard_library()
    at_hand = all((MODELS / name / "config.json").is_file() for name in TRAINED)

    def stage(number: int, title: str) -> None:
        console.print(f"\n[bold]{number}/5 {title}[/bold]  ({time.monotonic() - started:.0f} s so far)")

    def show(comparison: Comparison, title: str) -> None:
        print_table(comparison, console, title)
        console.print(f"\npage:   {comparison.out / 'index.html'}", highlight=False, soft_wrap=True)
        console.print(f"tables: {comparison.out / 'comparison.md'}\n", highlight=False, soft_wrap=True)

    stage(1, f"text to tokens: {'your text' if text else 'the standard library of this Python'}")
    config = PrepareConfig(
        source=sources, out=folder / "data", train_tokenizer="bpe:2048", validation_fraction=HELD_OUT
    )
    with contextlib.nullcontext() if text else _other_files_unsaid():
        manifest = prepare(config)
    console.print(describe(manifest), highlight=False, soft_wrap=True)
    _held_out(manifest)

    stage(2, f"training {len(SINKS)} models of the same size on the same batches")
    runs = []
    for sink in SINKS:
        run = folder / "runs" / sink
        train_whole(recipe(sink, folder / "data", run, steps))
        runs.append(run)

    stage(3, "streaming over text that none of them has seen")
    results = _stream_each(runs, folder / "data", CACHES, STREAMED_TOKENS, folder / "results")

    stage(4, "comparison of the models just trained")
    comparison = compare([*results, *runs], folder / "comparison", paper=paper and not at_hand)
    show(comparison, f"just trained, {steps:,} steps: streaming perplexity")
    console.print(TOO_EARLY.format(steps=steps), highlight=False)

    stage(5, "reproduction: models that were trained for long, over the same text")
    if at_hand:
        comparison = reproduce(MODELS, sources, folder / "reproduction", paper)
        console.print(_origin(comparison), highlight=False)
        show(comparison, "trained for long: streaming perplexity")
        console.print(finding(comparison.records["differences"]), highlight=False)
    else:
        console.print(NOT_HERE, highlight=False)
    console.print(f"\n{time.monotonic() - started:.0f} s in all.", highlight=False)


def reproduce(models: Path, sources: list[str], out: Path, paper: bool = True) -> Comparison:
    """Stream the ``TRAINED`` models over the held-out part of a text, in their own tokens, and compare them.

    Raises:
        UserError: the text is too short.
    """
    from data_prep.prepare import PrepareConfig, prepare
    from sinkpretrain.compare import compare

    # Without its sink tokens, which no text holds, the tokenizer is the same for all.
    tokenizer = str(models / "vanilla")
    with _other_files_unsaid():  # of a text of one's own they were said when it was read for the small models
        prepare(PrepareConfig(source=sources, out=out / "data", tokenizer=tokenizer, validation_fraction=HELD_OUT))
    folders = [models / name for name in TRAINED]
    results = _stream_each(folders, out / "data", CACHES, TRAINED_TOKENS, out / "results")
    return compare(results, out / "comparison", paper=paper)


def _stream_each(models: list[Path], data: Path, cache: str, tokens: int, out: Path) -> list[Path]:
    """Stream each model over the first held-out tokens; returns the folders of their results."""
    from sinkpretrain.evaluate import stream

    count = min(tokens, _held_out(Manifest.load(data)))
    for model in models:
        where = str(out / model.name)
        stream(str(model), tokens=str(data), split="validation", cache=cache, out=where, max_tokens=count)
    return [out / model.name for model in models]


def _held_out(manifest: Manifest) -> int:
    """Tokens to stream over; raises UserError if there are too few."""
    count = manifest.splits["validation"].tokens if "validation" in manifest.splits else 0
    if count < 1000:
        raise UserError(f"the text leaves only {count} tokens to evaluate on; give more text (a few megabytes).")
    return count


def _origin(comparison: Comparison) -> str:
    """Which models these are, as they say themselves."""
    models = [result.data["model"] for result in comparison.found.results]
    steps = [m["step"] for m in models]
    trained = " to ".join(f"{step:,}" for step in sorted({min(steps), max(steps)}))
    size = max(m["parameters"] for m in models) / 1e6
    return (
        f"{len(models)} models of {size:.1f}M parameters, trained for {trained} steps on source code and books, "
        f"without Python's standard library; their cards are in {MODELS}."
    )


def finding(differences: list[Record]) -> str:
    """What was measured, in words that the numbers choose.

    Args:
        differences: records of ``comparison.paired.own_differences``, of caches of the size of ``CACHES``.
    """
    from sinkpretrain.comparison.blocks import interval
    from sinkpretrain.statistics import change

    none, one, *_, all_kept = CACHES.split(",")
    found = {(d["mechanism"], d["setting"]): d for d in differences if d["title"] == d["against"]}
    without, ordinary, sink = found["vanilla", none], found["vanilla", one], found["sink_tokens(n=1)", one]
    lines = {
        f"vanilla without its first tokens ({none})": without,
        f"vanilla with one of them ({one})": ordinary,
        f"one sink token, kept alone ({one})": sink,
        f"one sink token, evicted ({none})": found.get(("sink_tokens(n=1)", none)),
        f"two sink tokens, one of them evicted ({one})": found.get(("sink_tokens(n=2)", one)),
        f"zero sink, its column left out ({none})": found.get(("zero_sink", f"{none}-nocolumn")),
    }
    if without["low"] <= 0:
        verdict = "On this text vanilla does not need its first tokens: the paper's effect does not show."
    elif sink["high"] >= without["low"]:
        verdict = "Vanilla needs its first tokens, but a sink token kept alone does not clearly lose less than that."
    elif ordinary["low"] <= max(0.0, sink["high"]):
        verdict = (
            "Vanilla needs its first tokens. A sink token kept alone loses less than that, though not clearly less "
            "than one ordinary token."
        )
    else:
        verdict = (
            "This is the paper's effect: vanilla needs its first tokens, one of them does not replace four, and a "
            "trained sink token kept alone loses less."
        )
    told = [
        f"  {what:<43} {change(d['nats']):>8} % ({interval(d['low'], d['high'])})" for what, d in lines.items() if d
    ]
    head = (
        f"Change of perplexity against the same model's {all_kept} (95 % over blocks of this text; one training each):"
    )
    return "\n".join([head, *told, "", verdict])
