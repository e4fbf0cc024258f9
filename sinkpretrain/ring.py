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

import torch
from torch import Tensor

from sinkpretrain.cache import Cache


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
    """Where T tokens are written and what they see: arithmetic on positions, on the device.

    Attributes:
        index: places in the ring, int64 [T]; without meaning for the first x tokens.
        slot: slots of the buffer, int64 [T].
        key: positions that keys are rotated to, int64 [T].
        place: in-cache positions of the queries, int64 [T]: where they stand towards the first x keys.
        older: which keys of the ring a query sees from the lap after theirs, bool [T, ring].
        distance: how far in the cache each slot's key lies before the query, int64 [T, S]; negative if it comes later.
        visible: which slots a query sees, bool [T, S]: the first x, the y before it and its own.

    Args:
        layout: slots of the buffers.
        position: places of the tokens in the text, int64 [T]; they follow each other.
    """

    def __init__(self, layout: Layout, position: Tensor) -> None:
        assert len(position) <= layout.block, (len(position), layout.block)
        x, ring, size = layout.cache.start, layout.ring, layout.cache.size
        start_X, ring_R = (torch.arange(n, device=position.device) for n in (x, ring))
        early = position < x
        self.index = (position - x) % ring
        self.slot = torch.where(early, position, x + self.index)
        self.key = torch.where(early, position, self.index)
        self.place = position.clamp(max=size)
        self.older = ring_R > self.index[:, None]
        # The places in the text of what the ring holds once the tokens are written; below x where that is nothing.
        newest_1 = position[-1:]
        held_R = newest_1 - (newest_1 - x - ring_R) % ring
        self.distance = torch.cat((self.place[:, None] - start_X, position[:, None] - held_R), dim=1)
        held_S = torch.cat((torch.full_like(start_X, x), held_R))
        near = torch.cat((torch.full_like(start_X, size), torch.full_like(ring_R, layout.cache.recent)))
        self.visible = (self.distance >= 0) & (self.distance <= near) & (held_S >= x)


@dataclass(frozen=True)
class LayerBuffer:
    """One layer's keys (each rotated to the place of its slot) and values, [B, K, S, D]."""

    k: Tensor
    v: Tensor

    @classmethod
    def empty(cls, k_BKTD: Tensor, v_BKTD: Tensor, slots: int) -> LayerBuffer:
        B, K, _, D = k_BKTD.shape
        return cls(k_BKTD.new_zeros(B, K, slots, D), v_BKTD.new_zeros(B, K, slots, v_BKTD.shape[-1]))
