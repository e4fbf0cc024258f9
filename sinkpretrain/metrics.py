"""metrics.jsonl: the record of a run, one line per step and kind, also after interruptions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sinkpretrain.errors import UserError
from sinkpretrain.files import disk_faults, write_atomically

FILE = "metrics.jsonl"


def append(run: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines; raises UserError on a full disk.

    Args:
        lines: each with a ``step`` and its ``kind``: train, validation, probe, checkpoint, spike or skipped.
    """
    with disk_faults(run / FILE), (run / FILE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def sync(run: Path) -> None:
    """Make what was appended so far survive a power cut."""
    path = run / FILE
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read(run: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run; an unfinished last line, left by a killed process, is passed over, as is what is no line."""
    path = run / FILE
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"kind", "step"} <= line.keys():
                yield line


def tokens_per_step(lines: Sequence[dict[str, Any]]) -> set[float]:
    """Tokens read over steps, as each line of training says: several if the size of a step changed on the way."""
    return {tokens / step for step, tokens in _tokens_read(lines)}


def tokens_at(lines: Sequence[dict[str, Any]], steps: Sequence[int]) -> list[float]:
    """Tokens read by these steps; between those whose line says so, as if steps were of one size."""
    x, y = zip((0, 0), *_tokens_read(lines), strict=True)
    return [float(t) for t in np.interp(steps, x, y)]


def with_tokens(chosen: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chosen lines, each with the tokens read by its step as the lines of the run say."""
    read = tokens_at(lines, [line["step"] for line in chosen])
    return [line | {"tokens": tokens} for line, tokens in zip(chosen, read, strict=True)]


def _tokens_read(lines: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(line["step"], line["tokens"]) for line in lines if line["kind"] == "train" and "tokens" in line]


def count(lines: Iterable[dict[str, Any]]) -> int:
    """Lines about steps. When files were written is not the run's: another attempt writes them at other steps."""
    return sum(line["kind"] != "checkpoint" for line in lines)


def require_whole(run: Path, step: int, written: int) -> None:
    """Check that the record up to a checkpoint's step is there, before more is written behind it.

    Args:
        written: what ``count`` was at the checkpoint.

    Raises:
        UserError: lines are missing: the file was cut, or copied before the checkpoint was.
    """
    found = count(line for line in read(run) if line["step"] <= step)
    if found < written:
        raise UserError(
            f"{run / FILE} has {found:,} of the {written:,} lines that were written up to step {step:,}, from which "
            "the run would go on; restore it, delete the checkpoints that are ahead of it, or give --allow-changes to "
            "go on with what is there."
        )


def truncate(run: Path, step: int) -> None:
    """Forget every line after ``step``: a resumed run writes them again, and each step must stand there once."""
    kept = [json.dumps(line) + "\n" for line in read(run) if line["step"] <= step]
    write_atomically(run / FILE, lambda p: p.write_text("".join(kept), encoding="utf-8"))
