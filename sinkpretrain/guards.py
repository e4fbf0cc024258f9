"""What the record of a run is watched for: steps that were skipped because nothing in them was finite, loss spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from sinkpretrain.errors import UserError

WINDOW = 64
"""Losses that a spike is judged against."""
SPIKE = 6.0
"""A spike is a loss above the window's median by this many median absolute deviations, and by 2 % of the median."""
SHOWN = 32
"""Sample indices that a message shows; the record has them all."""

Samples = Callable[[int], list[int]]


class Guard:
    """Looks at the training lines of a run in order, each step once, on the host, when they are written anyway.

    Args:
        limit: skipped steps in a row after which a run ends; 0 means never.
        samples: file indices of the samples of a step.
    """

    def __init__(self, limit: int, samples: Samples) -> None:
        self._limit, self._samples = limit, samples
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row: list[int] = []
        self._failed_from: int | None = None

    def replay(self, line: dict[str, Any]) -> None:
        """Take note of a line from before the run was interrupted."""
        if line["kind"] == "train":
            self._note(line)

    def events(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Lines to add to the record: skipped steps and loss spikes, with the samples that were in the batch."""
        found = []
        for line in lines:
            kind = "skipped" if _skipped(line) else "spike" if self._spikes(line["loss"]) else None
            if kind:
                found.append({"kind": kind, "step": line["step"], "samples": self._samples(line["step"])})
            self._note(line)
        return found

    def check(self) -> None:
        """Raises UserError once too many steps in a row were skipped."""
        if self._failed_from is None:
            return
        first = self._failed_from
        samples = self._samples(first)
        more = f" and {len(samples) - SHOWN} more" if len(samples) > SHOWN else ""
        raise UserError(
            f"loss or gradient norm was not finite in {self._limit} steps in a row, from step {first} on, "
            f"whose samples are {', '.join(map(str, samples[:SHOWN]))}{more}; the weights are those before it: lower "
            "optimizer.lr, or look at these samples."
        )

    def _note(self, line: dict[str, Any]) -> None:
        if _skipped(line):
            self._in_a_row.append(line["step"])
            if len(self._in_a_row) == self._limit:
                self._failed_from = self._in_a_row[0]
        else:
            self._in_a_row = []
            self._recent.append(line["loss"])

    def _spikes(self, loss: float) -> bool:
        if len(self._recent) < WINDOW:
            return False
        median = statistics.median(self._recent)
        spread = statistics.median(abs(x - median) for x in self._recent)
        return loss > median + max(SPIKE * spread, 0.02 * abs(median))


def _skipped(line: dict[str, Any]) -> bool:
    """Whether the optimizer left the weights as they were; a loss that is not finite makes the norm the same."""
    return line["grad_norm"] is None


def finite(value: float, digits: int = 6) -> float | None:
    """A number as JSON can hold it: rounded, None for NaN and infinity."""
    return round(value, digits) if math.isfinite(value) else None
