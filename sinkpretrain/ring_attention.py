"""Attention over the rings of ``sinkpretrain.ring``: plain operations for any number of tokens, kernels for one.

Letters of the axes: B batch, H heads, K heads of keys and values, T queries, S slots, D dimensions of a head.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import merge_column, rotate
from sinkpretrain.language import LanguageModel
from sinkpretrain.ring import LayerBuffer, Layout, Places
from sinkpretrain.streaming import Seen

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

    def places(self, length: int) -> Places:
        """Of the tokens to come."""
        return Places(self.layout, self.count_1, length)

    def buffer(self, layer: int, k: Tensor, v: Tensor) -> LayerBuffer:
        """A layer's buffer, made when its first token comes."""
        if layer not in self.buffers:
            self.buffers[layer] = LayerBuffer.empty(k, v, self.layout.slots)
        return self.buffers[layer]

    def memory_bytes(self) -> int:
        """Size of the buffers, which does not change any more once something has been read."""
        return sum(t.numel() * t.element_size() for b in self.buffers.values() for t in (b.k, b.v))


class RingAttention:
    """The attention function (``Attend``) of one forward over rings; what it needs is computed when it is needed."""

    def __init__(self, rings: Rings, places: Places) -> None:
        self.rings, self.places = rings, places
        self._seen: dict[int | None, Seen] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        buffer, window = self.rings.buffer(layer, k, v), self.rings.model.windows[layer]
        has_column = sink.adds_column and not self.rings.drop_column

        def column(q_place: Tensor) -> sinks.Column | None:
            return sink.column(q_place, self.seen(window).visible.sum(-1))

        if self.places.length == 1 and self.rings.one_token is not None and sink.weigher is None:
            return self.rings.one_token((q, k, v), buffer, window, column if has_column else None)

        buffer.k.index_copy_(2, self.places.slot, rotate(k, *self.ropes[0]))
        buffer.v.index_copy_(2, self.places.slot, v)
        q_place = rotate(q, *self.ropes[1])
        logits = self._logits(q, q_place, buffer)
        if sink.weigher is not None:
            return grouped_values(sink.weigher(logits, self.seen(window).visible), buffer.v)
        logits = logits + self.seen(window).bias
        lse = torch.logsumexp(logits, dim=-1)
        out = grouped_values(torch.exp(logits - lse.unsqueeze(-1)), buffer.v)
        return merge_column(out, lse, column(q_place) if has_column else None)

    def _logits(self, q: Tensor, q_place: Tensor, buffer: LayerBuffer) -> Tensor:
        """The query from its three places, [B, H, T, S]."""
        x = self.rings.layout.cache.start
        start_k, ring_k = buffer.k[:, :, :x], buffer.k[:, :, x:]
        same = grouped_logits(rotate(q, *self.ropes[2]), ring_k)
        before = grouped_logits(rotate(q, *self.ropes[3]), ring_k)
        return torch.cat((grouped_logits(q_place, start_k), torch.where(self.places.older, before, same)), dim=-1)

    @cached_property
    def ropes(self) -> list[tuple[Tensor, Tensor]]:
        """For keys; for queries at their in-cache position, in their lap, and from the lap after."""
        cos, sin = self.rings.rope
        at = self.places
        return [(cos[p], sin[p]) for p in (at.key, at.place, at.index, at.index + self.rings.layout.ring)]

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
