"""Attention over the rings of ``sinkpretrain.ring``: plain operations for any number of tokens, kernels for one.

Letters of the axes: B batch, H heads, K heads of keys and values, T queries, S slots, D dimensions of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import merge_column, rotate
from sinkpretrain.banded import Seen
from sinkpretrain.language import LanguageModel
from sinkpretrain.ring import LayerBuffer, Layout, Places

if TYPE_CHECKING:
    from sinkpretrain.ring_kernels import OneToken


class Rings:
    """The cache of a stream: one buffer per layer, and how many tokens have passed, on the device."""

    def __init__(self, model: LanguageModel, layout: Layout, drop_column: bool) -> None:
        self.model, self.layout, self.drop_column = model, layout, drop_column
        self.device = model.embed.weight.device
        self.buffers: dict[int, LayerBuffer] = {}
        self.count_1 = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.rope = model.rope(torch.arange(layout.angles, device=self.device))
        self.one_token = self._kernels() if self.device.type == "cuda" else None

    def _kernels(self) -> OneToken:
        from sinkpretrain.ring_kernels import OneToken  # Triton comes with torch for GPUs

        return OneToken(self.layout, self.rope, self.count_1, self.model.slopes, self.model.pinned)

    def positions(self, length: int) -> Tensor:
        """Places in the text of the tokens to come, int64 [T]."""
        return self.count_1 if length == 1 else self.count_1 + torch.arange(length, device=self.device)

    def buffer(self, layer: int, k: Tensor, v: Tensor) -> LayerBuffer:
        """A layer's buffer, made when its first token comes."""
        if layer not in self.buffers:
            self.buffers[layer] = LayerBuffer.empty(k, v, self.layout.slots)
        return self.buffers[layer]

    def memory_bytes(self) -> int:
        """Size of the buffers, which does not change any more once something has been read."""
        return sum(t.numel() * t.element_size() for b in self.buffers.values() for t in (b.k, b.v))


class RingAttention:
    """The attention function (``Attend``) of one forward of T tokens over rings."""

    def __init__(self, rings: Rings, length: int) -> None:
        self.rings, self.length = rings, length
        self._places: Places | None = None
        self._ropes: list[tuple[Tensor, Tensor]] = []
        self._seen: dict[int | None, Seen] = {}

    @property
    def places(self) -> Places:
        """Made when they are asked for: the kernels for one token do without. (A cached_property does not compile.)"""
        if self._places is None:
            self._places = Places(self.rings.layout, self.rings.positions(self.length))
        return self._places

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        buffer, window = self.rings.buffer(layer, k, v), self.rings.model.windows[layer]
        has_column = sink.adds_column and not self.rings.drop_column

        def column(q_place: Tensor) -> sinks.Column | None:
            return sink.column(q_place, self.seen(window).visible.sum(-1))

        if self.length == 1 and self.rings.one_token is not None and sink.weigher is None:
            return self.rings.one_token((q, k, v), buffer, window, column if has_column else None)

        rope_k, rope_place, rope_same, rope_before = self.ropes()
        buffer.k.index_copy_(2, self.places.slot, rotate(k, *rope_k))
        buffer.v.index_copy_(2, self.places.slot, v)
        x = self.rings.layout.cache.start
        start_k, ring_k = buffer.k[:, :, :x], buffer.k[:, :, x:]
        q_place = rotate(q, *rope_place)
        same, before = grouped_logits(rotate(q, *rope_same), ring_k), grouped_logits(rotate(q, *rope_before), ring_k)
        from_ring = torch.where(self.places.older, before, same)
        logits = torch.cat((grouped_logits(q_place, start_k), from_ring), dim=-1)
        seen = self.seen(window)
        if sink.weigher is not None:
            return grouped_values(sink.weigher(logits, seen.visible), buffer.v)
        logits = logits + seen.bias
        lse = torch.logsumexp(logits, dim=-1)
        out = grouped_values(torch.exp(logits - lse.unsqueeze(-1)), buffer.v)
        return merge_column(out, lse, column(q_place) if has_column else None)

    def ropes(self) -> list[tuple[Tensor, Tensor]]:
        """For keys; for queries at their in-cache position, in their own lap, and in the lap after."""
        if not self._ropes:
            (cos, sin), at = self.rings.rope, self.places
            turns = (at.key, at.place, at.index, at.index + self.rings.layout.ring)
            self._ropes = [(cos[turn], sin[turn]) for turn in turns]
        return self._ropes

    def seen(self, window: int | None) -> Seen:
        """What the queries see in a layer with this window."""
        if window not in self._seen:
            query = self.places.place[:, None]
            key = query - self.places.distance
            self._seen[window] = Seen.of(self.rings.model, window, query, key, self.places.visible)
        return self._seen[window]


def grouped_logits(q_BHTD: Tensor, k_BKSD: Tensor) -> Tensor:
    """q . k / sqrt(D), fp32 [B, H, T, S]; H / K neighbouring heads of queries share one of keys."""
    scale: float = q_BHTD.shape[-1] ** -0.5
    return _shared(q_BHTD, k_BKSD.float().mT) * scale


def grouped_values(weights_BHTS: Tensor, v_BKSD: Tensor) -> Tensor:
    """Values under weights, fp32 [B, H, T, D]."""
    return _shared(weights_BHTS, v_BKSD.float())


def _shared(a_BHTM: Tensor, b_BKMN: Tensor) -> Tensor:
    B, H, T, M = a_BHTM.shape
    K, N = b_BKMN.shape[1], b_BKMN.shape[3]
    return (a_BHTM.float().reshape(B, K, H // K * T, M) @ b_BKMN).view(B, H, T, N)
