"""One token against a ring (``sinkpretrain.ring``) as two Triton kernels. Imported only where Triton is installed.

The first kernel rotates the query to its three places and the key to its own, writes key and value into their slot, and
attends to a part of the slots; the second merges the parts and applies the mechanism's column. Their definition, and
their test, is the plain attention of ``sinkpretrain.decode``.

Letters of the axes: B batch, H heads, K heads of keys and values, S slots, D dimensions of a head, R rotated ones,
P parts of the slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkpretrain.mechanism import Column
from sinkpretrain.ring import LayerBuffer, Layout

TILE = 64
"""Slots that a program looks at together (half as many where heads are wider than 64)."""

MOST_PARTS = 64


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(own, partner, cos, sin, at, d, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """A head [D] at position ``at``; ``partner`` are the dimensions that each is turned with, signs included."""
    c = tl.load(cos + at * R + d, mask=d < R, other=1.0)
    s = tl.load(sin + at * R + d, mask=d < R, other=0.0)
    return own * c + partner * s


@triton.jit  # type: ignore[untyped-decorator]
def _attend_kernel(  # type: ignore[no-untyped-def]
    q, k, v, k_buffer, v_buffer, cos, sin, count, slopes, placed, part_out, part_max, part_sum,
    q_b, q_h, k_b, k_h, v_b, v_h,
    x, y, ring, window, pinned,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, SCALE: tl.constexpr,
    ALIBI: tl.constexpr, WINDOW: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """One head and one part of the slots: the softmax's maximum, its sum, and the values under it, not yet divided."""
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, h = row // H, row % H
    d = tl.arange(0, WIDTH)
    real = d < D
    half: tl.constexpr = R // 2
    other = tl.where(d < half, d + half, tl.where(d < R, d - half, d))
    sign = tl.where(d < half, -1.0, 1.0)
    S = x + ring
    base = (b * (H // GROUP) + h // GROUP).to(tl.int64) * S * D
    first = part * BLOCK * TILES
    last = tl.minimum(S, first + BLOCK * TILES)

    # A tile is asked for before it is needed, the first one before all else: its place depends on nothing.
    s = first + tl.arange(0, BLOCK)
    at = base + s[:, None] * D + d[None, :]
    inside = (s < last)[:, None] & real[None, :]
    keys_ahead = tl.load(k_buffer + at, mask=inside, other=0.0)
    values_ahead = tl.load(v_buffer + at, mask=inside, other=0.0)

    # Where the token stands: see Places. Counts may exceed 32 bits; slots do not, and arithmetic on many of them should
    # be short and free of divisions.
    t = tl.load(count)
    index = (tl.maximum(t - x, 0) % ring).to(tl.int32)
    near = tl.minimum(t, x + ring).to(tl.int32)  # tells all that a query can: later, everything is as it is then
    place = tl.minimum(near, x + y)
    early = near < x
    slot = tl.where(early, near, x + index)

    q_at = q + b * q_b + h * q_h
    q_own = tl.load(q_at + d, mask=real, other=0.0).to(tl.float32)
    q_partner = tl.load(q_at + other, mask=real, other=0.0).to(tl.float32) * sign
    q_place = _rotated(q_own, q_partner, cos, sin, place, d, R)
    q_same = _rotated(q_own, q_partner, cos, sin, index, d, R)
    q_before = _rotated(q_own, q_partner, cos, sin, index + ring, d, R)
    if PLACED:
        tl.store(placed + row * D + d, q_place, mask=real & (part == 0))

    k_at = k + b * k_b + (h // GROUP) * k_h
    k_own = tl.load(k_at + d, mask=real, other=0.0).to(tl.float32)
    k_partner = tl.load(k_at + other, mask=real, other=0.0).to(tl.float32) * sign
    # Rounded as the buffer rounds it: later queries see it no other way.
    k_new = _rotated(k_own, k_partner, cos, sin, tl.where(early, near, index), d, R).to(k_buffer.dtype.element_ty)
    v_new = tl.load(v + b * v_b + (h // GROUP) * v_h + d, mask=real, other=0.0).to(v_buffer.dtype.element_ty)
    # One program owns the slot. What others read from it does not matter: all take the new key from above.
    owner = (h % GROUP == 0) & (slot >= first) & (slot < first + BLOCK * TILES)
    tl.store(k_buffer + base + slot * D + d, k_new, mask=real & owner)
    tl.store(v_buffer + base + slot * D + d, v_new, mask=real & owner)

    highest = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    out = tl.zeros((WIDTH,), tl.float32)
    for _ in range(TILES):
        keys, values = keys_ahead.to(tl.float32), values_ahead.to(tl.float32)
        at += BLOCK * D
        inside = (s + BLOCK < last)[:, None] & real[None, :]
        keys_ahead = tl.load(k_buffer + at, mask=inside, other=0.0)
        values_ahead = tl.load(v_buffer + at, mask=inside, other=0.0)
        new = (s == slot)[:, None]
        keys = tl.where(new, k_new.to(tl.float32)[None, :], keys)
        values = tl.where(new, v_new.to(tl.float32)[None, :], values)
        start, older = s < x, s > slot
        back = slot - s + tl.where(older, ring, 0)  # how long ago a key of the ring was read
        distance = tl.where(start, place - s, back)
        visible = (s < last) & tl.where(start, s <= near, (back <= y) & (back <= near - x))
        if WINDOW:
            visible = visible & ((distance < window) | (place - distance < pinned))
        in_ring = tl.where(older[:, None], q_before[None, :], q_same[None, :])
        query = tl.where(start[:, None], q_place[None, :], in_ring)
        logits = tl.sum(keys * query, axis=1) * SCALE
        if ALIBI:
            logits -= tl.load(slopes + h) * distance.to(tl.float32)
        logits = tl.where(visible, logits, -float("inf"))
        new_highest = tl.maximum(highest, tl.max(logits, axis=0))
        finite = tl.where(new_highest == -float("inf"), 0.0, new_highest)  # a part in which nothing is visible
        keep = tl.exp(highest - finite)
        weights = tl.exp(logits - finite)
        total = total * keep + tl.sum(weights, axis=0)
        out = out * keep + tl.sum(weights[:, None] * values, axis=0)
        highest = new_highest
        s += BLOCK
    tl.store(part_max + row * parts + part, highest)
    tl.store(part_sum + row * parts + part, total)
    tl.store(part_out + (row * parts + part) * D + d, out, mask=real)


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]
    part_out, part_max, part_sum, logit, value, out, logit_b, logit_h, parts,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    COLUMN: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """One head: its parts as one softmax, then the column (the formula at the head of ``sinkpretrain.mechanism``)."""
    row = tl.program_id(0)
    d, p = tl.arange(0, WIDTH), tl.arange(0, PARTS)
    highest_P = tl.load(part_max + row * parts + p, mask=p < parts, other=-float("inf"))
    highest = tl.max(highest_P, axis=0)
    share_P = tl.exp(highest_P - highest)
    total = tl.sum(share_P * tl.load(part_sum + row * parts + p, mask=p < parts, other=0.0), axis=0)
    at = (row * parts + p[:, None]) * D + d[None, :]
    parts_PD = tl.load(part_out + at, mask=(p < parts)[:, None] & (d < D)[None, :], other=0.0)
    result = tl.sum(share_P[:, None] * parts_PD, axis=0) / total
    if COLUMN:
        lse = highest + tl.log(total)
        gate = tl.sigmoid(lse - tl.load(logit + (row // H) * logit_b + (row % H) * logit_h).to(tl.float32))
        result = gate * result
        if VALUE:
            result += (1.0 - gate) * tl.load(value + (row % H) * D + d, mask=d < D, other=0.0)
    tl.store(out + row * D + d, result.to(out.dtype.element_ty), mask=d < D)


class OneToken:
    """Attention of single tokens over the buffers of a stream, written in place.

    Args:
        layout: slots of the buffers.
        rope: cos and sin, fp32 [angles, R].
        count_1: int64 [1], tokens read before the one to come.
        slopes_H: ALiBi's slopes, or None.
        pinned: keys in the first so many places are seen through every window.
    """

    def __init__(
        self, layout: Layout, rope: tuple[Tensor, Tensor], count_1: Tensor, slopes_H: Tensor | None, pinned: int
    ) -> None:
        self.layout, self.rope, self.count_1, self.slopes_H, self.pinned = layout, rope, count_1, slopes_H, pinned

    def __call__(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        buffer: LayerBuffer,
        window: int | None,
        column: Callable[[Tensor], Column | None] | None,
    ) -> Tensor:
        """Write a token into the buffer and attend to what it sees.

        Args:
            qkv: [B, H, 1, D] and twice [B, K, 1, D], not rotated, each with its D next to each other.
            window: of this layer.
            column: from the query at its in-cache position, fp32 [B, H, 1, D], to the mechanism's column.

        Returns:
            The output, [B, H, 1, D] in the dtype of the query.
        """
        q, k, v = qkv
        B, H, _, D = q.shape
        block, tiles, parts = _cut(self.layout.slots, D)
        part_out, part_max, part_sum, placed = (
            torch.empty(shape, dtype=torch.float32, device=q.device)
            for shape in ((B, H, parts, D), (B, H, parts), (B, H, parts), (B, H, 1, D))
        )
        cos, sin = self.rope
        width = triton.next_power_of_2(D)
        _attend_kernel[(B * H, parts)](
            q, k, v, buffer.k, buffer.v, cos, sin, self.count_1, cos if self.slopes_H is None else self.slopes_H,
            placed, part_out, part_max, part_sum,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            self.layout.cache.start, self.layout.cache.recent, self.layout.ring, window or 0, self.pinned,
            H=H, GROUP=H // k.shape[1], D=D, R=cos.shape[-1], WIDTH=width, BLOCK=block, TILES=tiles,
            SCALE=D**-0.5, ALIBI=self.slopes_H is not None, WINDOW=window is not None, PLACED=column is not None,
        )  # fmt: skip
        extra = None if column is None else column(placed)
        logit = part_max if extra is None else extra.logit.float().expand(B, H, 1)
        value = None if extra is None or extra.value is None else extra.value.float().contiguous()
        out = torch.empty(B, H, 1, D, dtype=q.dtype, device=q.device)
        _merge_kernel[(B * H,)](
            part_out, part_max, part_sum, logit, part_max if value is None else value, out,
            logit.stride(0), logit.stride(1), parts,
            H=H, D=D, WIDTH=width, PARTS=triton.next_power_of_2(parts),
            COLUMN=extra is not None, VALUE=value is not None,
        )  # fmt: skip
        return out


def _cut(slots: int, head_dim: int) -> tuple[int, int, int]:
    """How slots are dealt to programs: slots per tile, tiles per part, parts."""
    block = TILE if head_dim <= 64 else TILE // 2
    tiles = -(-slots // (block * MOST_PARTS))
    return block, tiles, -(-slots // (block * tiles))
