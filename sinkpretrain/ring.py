"""The cache x+y as buffers that are written in place: which slot a token goes to, and which slots a query sees.

Each layer owns one buffer, allocated once. Its first x slots hold the first x keys for good; the others are a ring that
the recent keys go round. Every key is rotated once, when it is written, to the place of its slot; nothing is moved,
concatenated or rotated again. The query is rotated instead, once for each place that keys can be seen from:

    the first x keys        from slot min(t, x + y)
    ring, same lap          from the query's own index in the ring
    ring, the lap before    from that index + the ring's length

so that relative positions are the true ones, every angle is one of a short table, and a stream may go on for ever.

A forward writes its own keys first. The ring is therefore longer than y: with room for y + block keys, a block of
tokens overwrites nothing that its first query still sees.

Letters of the axes: B batch, H heads, K heads of keys and values, T queries, S slots, D dimensions of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sinkpretrain.streaming import Cache


@dataclass(frozen=True)
class Layout:
    """The slots of a buffer: x for the first positions, then a ring of y + block."""

    cache: Cache
    block: int

    @property
    def ring(self) -> int:
        return self.cache.recent + self.block

    @property
    def slots(self) -> int:
        return self.cache.start + self.ring

    @property
    def angles(self) -> int:
        """How many different positions keys and queries are rotated to."""
        return max(self.cache.size + 1, 2 * self.ring)


class Places:
    """Where the T tokens behind the first ones are written and what they see: arithmetic on positions, on the device.

    Nothing is computed before it is asked for.

    Args:
        layout: slots of the buffers.
        first_1: int64 [1], tokens that were read before; a tensor, so that a captured graph can be replayed.
        length: T.
    """

    def __init__(self, layout: Layout, first_1: Tensor, length: int) -> None:
        assert length <= layout.block, (length, layout.block)
        self.layout, self.first_1, self.length = layout, first_1, length

    @cached_property
    def position(self) -> Tensor:
        """Places in the text."""
        return (
            self.first_1 if self.length == 1 else self.first_1 + torch.arange(self.length, device=self.first_1.device)
        )

    @cached_property
    def index(self) -> Tensor:
        """Places in the ring, int64 [T]; without meaning for the first x."""
        return (self.position - self.layout.cache.start) % self.layout.ring

    @cached_property
    def slot(self) -> Tensor:
        """Slots of the buffer, int64 [T]."""
        x = self.layout.cache.start
        return torch.where(self.position < x, self.position, x + self.index)

    @cached_property
    def key(self) -> Tensor:
        """Positions that keys are rotated to, int64 [T]."""
        return torch.where(self.position < self.layout.cache.start, self.position, self.index)

    @cached_property
    def place(self) -> Tensor:
        """In-cache positions of the queries, int64 [T]: where they stand towards the first x keys."""
        return self.position.clamp(max=self.layout.cache.size)

    @cached_property
    def older(self) -> Tensor:
        """Which keys of the ring a query sees from the lap after theirs, bool [T, ring]."""
        return torch.arange(self.layout.ring, device=self.first_1.device) > self.index[:, None]

    @cached_property
    def held(self) -> Tensor:
        """Places in the text of the tokens that the ring holds, int64 [ring]; below x where it holds none yet."""
        newest_1 = self.first_1 + (self.length - 1)
        index_R = torch.arange(self.layout.ring, device=self.first_1.device)
        return newest_1 - (newest_1 - self.layout.cache.start - index_R) % self.layout.ring

    @cached_property
    def distance(self) -> Tensor:
        """How far in the cache each slot's key lies before the query, int64 [T, S]; negative if it comes later."""
        start_X = torch.arange(self.layout.cache.start, device=self.first_1.device)
        ring_TR = self.position[:, None] - self.held
        return torch.cat((self.place[:, None] - start_X, ring_TR), dim=1)

    @cached_property
    def visible(self) -> Tensor:
        """Which slots a query sees, bool [T, S]: the first x, the y before it and its own."""
        x = self.layout.cache.start
        in_ring_TR = (self.held >= x) & (self.distance[:, x:] <= self.layout.cache.recent)
        start_TX = torch.ones(self.length, x, dtype=torch.bool, device=self.first_1.device)
        return torch.cat((start_TX, in_ring_TR), dim=1) & (self.distance >= 0)


@dataclass(frozen=True)
class LayerBuffer:
    """One layer's keys (each rotated to the place of its slot) and values, [B, K, S, D]."""

    k: Tensor
    v: Tensor

    @classmethod
    def empty(cls, k_BKTD: Tensor, v_BKTD: Tensor, slots: int) -> LayerBuffer:
        B, K, _, D = k_BKTD.shape
        return cls(k_BKTD.new_zeros(B, K, slots, D), v_BKTD.new_zeros(B, K, slots, v_BKTD.shape[-1]))
