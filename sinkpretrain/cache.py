"""What a stream keeps: x initial positions and y recent ones, and what a position is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sinkpretrain.errors import UserError

Positions = Literal["in-cache", "absolute"]
"""Slots in the cache, as in the paper, or places in the text."""


@dataclass(frozen=True)
class Cache:
    """x initial positions and y recent ones."""

    start: int
    recent: int

    @property
    def size(self) -> int:
        return self.start + self.recent

    def __str__(self) -> str:
        return f"{self.start}+{self.recent}"

    @classmethod
    def parse(cls, text: str) -> Cache:
        """``4+1020`` as a cache; raises UserError."""
        start, plus, recent = text.strip().partition("+")
        if not (plus and start.isdigit() and recent.isdigit() and int(recent) > 0):
            raise UserError(f"{text!r} is not a cache; write x+y, for example 4+1020, with y at least 1.")
        return cls(int(start), int(recent))
