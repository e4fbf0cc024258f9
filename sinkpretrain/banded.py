"""The attention of a stream, many queries at a time: the first x keys and a band of the last y, under one softmax.

Why that is exact is said at the head of ``sinkpretrain.streaming``. Letters of the axes: B batch, H heads, T queries of
a block, S keys, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import (
    distance_bias,
    masked_attention,
    merge_column,
    merge_keys,
    rotate,
    scaled_logits,
    spread_heads,
    visible_keys,
    weighed_keys,
)
from sinkpretrain.band import Kernel, choose
from sinkpretrain.cache import Cache, Positions
from sinkpretrain.language import Attend, LanguageModel
from sinkpretrain.mechanism import Weigh
from sinkpretrain.ops import can_compile, compiled

FEW = (4, 8, 16)
"""So many initial keys are taken element by element, which a compiler fuses with what is around it. Such code is for
one number of keys and takes seconds to compile: numbers in between are filled up with keys that nothing sees."""


@dataclass(frozen=True)
class LayerCache:
    """Keys and values that one layer keeps, each [B, H, S, D]: the first x (rotated to their slots for good) and the
    last y (not rotated, since their slots move).

    settled: keys and values of the first x as they are merged once all queries stand at the last slot; the same for
        every later block.
    """

    start_k: Tensor
    start_v: Tensor
    band_k: Tensor
    band_v: Tensor
    settled: tuple[Tensor, Tensor] | None = None

    @classmethod
    def empty(cls, like: Tensor) -> LayerCache:
        none = like[:, :, :0]
        return cls(none, none, none, none)


class BandedAttention:
    """Keeps each layer's first x and last y keys and values between blocks.

    ``layers`` may be copied before a block and put back after one that failed.

    Args:
        drop_column: leave the mechanism's softmax column out.
        positions: where a query stands towards the first x keys.
        kernel: for the band; by default the fastest one for the device and dtype.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: Cache,
        drop_column: bool = False,
        positions: Positions = "in-cache",
        kernel: Kernel | None = None,
    ) -> None:
        self.model, self.cache, self.drop_column, self.positions = model, cache, drop_column, positions
        self.device, self.kernel = model.embed.weight.device, kernel
        self.layers: list[LayerCache | None] = [None] * model.config.n_layer

    def places(self, first: int, length: int) -> Tensor:
        """Where the queries first .. first + length - 1 of the sequence stand, int64 [length]."""
        t_T = torch.arange(first, first + length, device=self.device)
        return t_T.clamp(max=self.cache.size) if self.positions == "in-cache" else t_T

    def block(self, first: int, length: int) -> Attend:
        """The attention function for the positions first .. first + length - 1, which follow those seen so far."""
        x, y, model, device = self.cache.start, self.cache.recent, self.model, self.device
        place_T = self.places(first, length)
        # The band's keys reach back y from the block's first query, but not into the first x. Angles are taken from
        # there, so that they stay small however far the stream has come.
        low = max(x, first - y)
        # A model's angles are rounded to fp32 at its own positions. Ours are larger where a block is longer than the
        # cache, and would be off by as much more: 2e-4 nats at 1,024.
        exact = torch.float64 if self.positions == "absolute" or first + length - low > y else torch.int64
        n_new = min(length, max(0, x - first))  # keys of this block that are among the first x
        band_S = torch.arange(max(0, first + length - low), device=device)
        start_S = torch.arange(min(x, first + length), device=device)
        rope_band_q = model.rope(torch.arange(first - low, first - low + length, device=device).to(exact))
        rope_band_k, rope_start_k = model.rope(band_S.to(exact)), model.rope(start_S[first:])
        rope_place_q = model.rope(place_T.to(exact) if self.positions == "absolute" else place_T)
        # Where all queries stand at one slot, the few keys are turned towards it instead of the many queries.
        settled = self.positions == "in-cache" and first >= self.cache.size
        rope_back = model.rope(torch.tensor([-self.cache.size], device=device)) if settled else None
        band = Band(self, first, length, low)
        start = {window: Seen.of(model, window, place_T[:, None], start_S) for window in set(model.windows)}
        seen_T = {window: start[window].visible.sum(-1) + band.count(window) for window in set(model.windows)}
        fuse = can_compile(device, length)
        turn: Callable[..., Tensor] = compiled(rotate) if fuse else rotate
        # The same for a single row: what is settled is kept for blocks of any length.
        filled = filled_up(len(start_S)) if can_compile(device) else len(start_S)
        merge: Callable[..., tuple[Tensor, Tensor]] = merge_start
        if fuse:
            merge = compiled(merge_few_start if filled in FEW else merge_start)

        def fill(x: Tensor, dim: int, value: float = 0.0) -> Tensor:
            more = filled - x.shape[dim]
            return F.pad(x, (0, 0) * (-1 - dim) + (0, more), value=value) if more else x

        start_bias = {window: fill(seen.bias, -1, float("-inf")) for window, seen in start.items()}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            old = self.layers[layer] or LayerCache.empty(k)
            start_k, start_v = old.start_k, old.start_v
            if n_new:
                start_k = torch.cat((start_k, rotate(k[:, :, :n_new], *rope_start_k)), dim=2)
                start_v = torch.cat((start_v, v[:, :, :n_new]), dim=2)
            band_k = torch.cat((old.band_k, k[:, :, n_new:]), dim=2)
            band_v = torch.cat((old.band_v, v[:, :, n_new:]), dim=2)
            begin = old.settled
            if begin is None and start_k.shape[2] and sink.weigher is None:
                begin_k = start_k if rope_back is None else rotate(start_k, *rope_back)
                begin = fill(begin_k, -2), fill(start_v, -2)
            keep = max(0, band_k.shape[2] - y)
            self.layers[layer] = LayerCache(
                start_k, start_v, band_k[:, :, keep:].clone(), band_v[:, :, keep:].clone(), begin if settled else None
            )
            window, has_column = model.windows[layer], sink.adds_column and not self.drop_column
            q_band, band_k = turn(q, *rope_band_q), turn(band_k, *rope_band_k) if band_k.shape[2] else band_k
            towards = start_k.shape[2] and rope_back is None
            q_place = turn(q, *rope_place_q) if has_column or sink.weigher or towards else None
            if sink.weigher is not None:
                assert q_place is not None
                first_keys = Keys(q_place, start_k, start_v)
                return band.weighed(
                    window, Keys(q_band, band_k, band_v), first_keys, start[window].visible, sink.weigher
                )
            if band_k.shape[2]:
                out, lse = band.softmax(window, Keys(q_band, band_k, band_v))
            else:
                out, lse = q.new_zeros(q.shape), torch.full(q.shape[:3], float("-inf"), device=device)
            if begin is not None:
                begin_q = q if q_place is None or settled else q_place
                if fuse and not settled:
                    # In memory as q is, or code would be compiled once for these queries and once for settled ones.
                    begin_q = torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=device).copy_(begin_q)
                out, lse = merge(out, lse, begin_q, *begin, start_bias[window])
            return merge_column(
                out, lse, sink.column(q_place, seen_T[window]) if has_column and q_place is not None else None
            )

        return attend


class Keys(NamedTuple):
    """Queries [B, H, T, D] with the keys and values that they may see, rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


class Band:
    """What the queries of a block see of the keys from position ``low`` on, and their attention to them.

    In most layers that is a plain reach, for which there are fast kernels. A mechanism's own normalisation, and keys
    that a window lets through for their place, are taken under a mask, ``ROWS`` queries at a time.
    """

    ROWS = 256

    def __init__(self, banded: BandedAttention, first: int, length: int, low: int) -> None:
        self.model, self.cache, self.kernel = banded.model, banded.cache, banded.kernel
        self.t_T = torch.arange(first, first + length, device=banded.device)
        self.place_T, self.low = banded.places(first, length), low

    def reach(self, window: int | None) -> int | None:
        """How many keys back a query sees, itself included; None: not every key is seen for its distance alone."""
        y = self.cache.recent
        if window is None or window > y:
            return y + 1
        # Pinned keys are among the first x, of which none is in the band, or the window is no plain reach.
        return window if self.model.pinned <= self.cache.start else None

    def count(self, window: int | None) -> Tensor:
        """Keys that each query sees, int64 [T]."""
        reach = self.reach(window)
        if reach is not None:
            return (self.t_T - self.low + 1).clamp(0, reach)
        return torch.cat([seen.visible.sum(-1) for _, _, seen in self.parts(window)])

    def parts(self, window: int | None) -> Iterator[tuple[slice, slice, Seen]]:
        """Some queries, the keys that may matter to them, and what they see of those."""
        first = int(self.t_T[0])
        for start in range(0, len(self.t_T), self.ROWS):
            rows = slice(start, min(start + self.ROWS, len(self.t_T)))
            t_T, place_T = self.t_T[rows, None], self.place_T[rows, None]
            keys = slice(max(0, first + start - self.cache.recent - self.low), max(0, first + rows.stop - self.low))
            key_S = torch.arange(keys.start, keys.stop, device=t_T.device) + self.low
            # Among recent keys, places differ as they do in the text.
            recent_TS = t_T - key_S <= self.cache.recent
            yield rows, keys, Seen.of(self.model, window, place_T, key_S - (t_T - place_T), recent_TS)

    def softmax(self, window: int | None, all: Keys) -> tuple[Tensor, Tensor]:
        """Output [B, H, T, D] and logsumexp [B, H, T]."""
        reach, (q, k, v) = self.reach(window), all
        if reach is not None:
            kernel = self.kernel or choose(q, self.model.slopes)
            return kernel(q, k, v, reach, self.model.slopes)
        found = [
            masked_attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], seen.bias)
            for rows, keys, seen in self.parts(window)
        ]
        return torch.cat([out for out, _ in found], dim=2), torch.cat([lse for _, lse in found], dim=2)

    def weighed(self, window: int | None, all: Keys, start: Keys, start_seen: Tensor, weigh: Weigh) -> Tensor:
        """Output [B, H, T, D] under a mechanism's own normalisation over the first x keys and the band."""
        return torch.cat(
            [
                weighed_keys(
                    [scaled_logits(start.q[:, :, rows], start.k), scaled_logits(all.q[:, :, rows], all.k[:, :, keys])],
                    [start_seen[rows], seen.visible],
                    [start.v, all.v[:, :, keys]],
                    weigh,
                )
                for rows, keys, seen in self.parts(window)
            ],
            dim=2,
        )


class Seen(NamedTuple):
    """What queries see of some keys: bool [T, S], and the same as a bias on their logits, [T, S] or [H, T, S]."""

    visible: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, model: LanguageModel, window: int | None, query: Tensor, key: Tensor, allowed: Tensor | None = None
    ) -> Seen:
        """By the places of queries [T, 1] and keys ([S] or [T, S]) in a layer with this window, where ``allowed``."""
        visible = visible_keys(query, key, window, model.pinned)
        if allowed is not None:
            visible = visible & allowed
        return cls(visible, distance_bias(query - key, model.slopes, visible))


def filled_up(count: int) -> int:
    """How many keys compiled code takes for ``count`` initial ones (``FEW``)."""
    return next((n for n in FEW if count <= n), count) if count else 0


def merge_start(
    out: Tensor, lse: Tensor, q: Tensor, start_k: Tensor, start_v: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the first x keys to the softmax over the band; in fp32."""
    keys, values = (spread_heads(x, q.shape[1]).float() for x in (start_k, start_v))
    return merge_keys(out, lse, q.float() @ keys.mT * q.shape[-1] ** -0.5 + bias, values)


def merge_few_start(
    out: Tensor, lse: Tensor, q: Tensor, start_k: Tensor, start_v: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """``merge_start`` with products taken element by element: compiled, they are fused with what is around them."""
    keys, values = (spread_heads(x, q.shape[1]).float() for x in (start_k, start_v))
    logits = (q.float().unsqueeze(3) * keys.unsqueeze(2)).sum(-1) * q.shape[-1] ** -0.5 + bias
    return merge_few(out, lse, logits, values)


def merge_few(out: Tensor, lse: Tensor, logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``merge_keys`` one key at a time."""
    lse_all = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1))
    merged = out.float() * torch.exp(lse - lse_all).unsqueeze(-1)
    for key in range(logits.shape[-1]):
        merged = merged + torch.exp(logits[..., key] - lse_all).unsqueeze(-1) * values[:, :, key, None]
    return merged, lse_all
