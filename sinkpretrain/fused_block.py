"""Triton kernels for what lies between the matrix products of a block. Imported only where Triton is installed.

As in ``sinkpretrain.fused``, whose counterpart this is: each has a plain definition, and figures in ``docs/speed.md``.

Letters of the axes: N tokens (batch and time flattened), C width of the residual stream, B batch, H heads, T positions,
D dimensions of a head, R rotated dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- residual sum and both norms of a block -----------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _add_norms_kernel(  # type: ignore[no-untyped-def]
    x, a, m, vectors, total, n1, n2, mean, rstd, eps, C: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: total = x + a + m + bias, and its two LayerNorms from one mean and variance."""
    row = tl.program_id(0)
    base = row.to(tl.int64) * C
    column = tl.arange(0, BLOCK)
    mask = column < C
    value = tl.load(x + base + column, mask=mask, other=0.0)
    value += tl.load(a + base + column, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(m + base + column, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(vectors + column, mask=mask, other=0.0)
    tl.store(total + base + column, value, mask=mask)
    mu = tl.sum(value, 0) / C
    centred = tl.where(mask, value - mu, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    tl.store(mean + row, mu)
    tl.store(rstd + row, scale)
    hat = centred * scale
    w1 = tl.load(vectors + C + column, mask=mask, other=0.0)
    b1 = tl.load(vectors + 2 * C + column, mask=mask, other=0.0)
    w2 = tl.load(vectors + 3 * C + column, mask=mask, other=0.0)
    b2 = tl.load(vectors + 4 * C + column, mask=mask, other=0.0)
    tl.store(n1 + base + column, (hat * w1 + b1).to(n1.dtype.element_ty), mask=mask)
    tl.store(n2 + base + column, (hat * w2 + b2).to(n2.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _add_norms_backward_kernel(  # type: ignore[no-untyped-def]
    d_total, d1, d2, total, mean, rstd, vectors, d_x, d_delta, partial,
    N, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the gradient of the sum, wide for the residual stream and narrow for what was added to it; and these
    rows' part of the gradient of ``vectors``, partial [programs, 5, C]."""
    column = tl.arange(0, BLOCK)
    inside = column < C
    w1 = tl.load(vectors + C + column, mask=inside, other=0.0)
    w2 = tl.load(vectors + 3 * C + column, mask=inside, other=0.0)
    sum_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_w1 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_b1 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_w2 = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_b2 = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0) * ROWS + step
        base = row.to(tl.int64) * C
        mask = inside & (row < N)
        g1 = tl.load(d1 + base + column, mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(d2 + base + column, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(total + base + column, mask=mask, other=0.0)
        passed = tl.load(d_total + base + column, mask=mask, other=0.0)
        scale = tl.load(rstd + row, mask=row < N, other=0.0)
        hat = tl.where(mask, (value - tl.load(mean + row, mask=row < N, other=0.0)) * scale, 0.0)
        d_hat = g1 * w1 + g2 * w2
        along = tl.sum(d_hat * hat, 0) / C
        level = tl.sum(d_hat, 0) / C
        d = passed + scale * (d_hat - level - hat * along)
        tl.store(d_x + base + column, d, mask=mask)
        tl.store(d_delta + base + column, d.to(d_delta.dtype.element_ty), mask=mask)
        sum_bias += d
        sum_w1 += g1 * hat
        sum_b1 += g1
        sum_w2 += g2 * hat
        sum_b2 += g2
    place = partial + tl.program_id(0) * 5 * C + column
    tl.store(place, sum_bias, mask=inside)
    tl.store(place + C, sum_w1, mask=inside)
    tl.store(place + 2 * C, sum_b1, mask=inside)
    tl.store(place + 3 * C, sum_w2, mask=inside)
    tl.store(place + 4 * C, sum_b2, mask=inside)


_NORM_WARPS, _NORM_ROWS = 4, 32


class AddNorms(torch.autograd.Function):
    """total = x + a + m + bias and its two LayerNorms (total, norm 1, norm 2), each [N, C].

    Args:
        x: the residual stream, fp32.
        a, m: what is added to it, 16 bits; the norms come out in their dtype.
        vectors: bias, weight 1, bias 1, weight 2, bias 2 as rows, fp32 [5, C].
        eps: of both norms.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, m: Tensor, vectors: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, C = x.shape
        total, n1, n2 = torch.empty_like(x), torch.empty_like(a), torch.empty_like(a)
        mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
        block = power_of_two(C)
        _add_norms_kernel[(N,)](x, a, m, vectors, total, n1, n2, mean, rstd, eps, C, block, num_warps=_NORM_WARPS)
        ctx.save_for_backward(total, mean, rstd, vectors)
        return total, n1, n2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, rstd, vectors = ctx.saved_tensors
        d_total, d1, d2 = (g.contiguous() for g in grads)
        N, C = total.shape
        programs = -(-N // _NORM_ROWS)
        d_x, d_delta = torch.empty_like(total), torch.empty_like(d1)
        partial = torch.empty(programs, 5, C, dtype=torch.float32, device=total.device)
        _add_norms_backward_kernel[(programs,)](
            d_total, d1, d2, total, mean, rstd, vectors, d_x, d_delta, partial,
            N, C, power_of_two(C), _NORM_ROWS, num_warps=_NORM_WARPS,
        )  # fmt: skip
        return d_x, d_delta, d_delta, partial.sum(0), None


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


# --- queries, keys and values -------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, N, T, W, D, HEADS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Rotate the first R dimensions of the first HEADS heads (queries and keys) of rows of W, in place."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, BLOCK)
    head, i = pair // (R // 2), pair % (R // 2)
    mask = (row < N)[:, None] & (head < HEADS)[None, :]
    place = qkv + row.to(tl.int64)[:, None] * W + (head * D + i)[None, :]
    angle = (row % T)[:, None] * R + i[None, :]
    c = tl.load(cos + angle, mask=mask, other=0.0)
    s = tl.load(sin + angle, mask=mask, other=0.0)
    left = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(place + R // 2, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, (left * c - right * s).to(qkv.dtype.element_ty), mask=mask)
    tl.store(place + R // 2, (right * c + left * s).to(qkv.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _unrotate_kernel(  # type: ignore[no-untyped-def]
    grad, joined, partial, cos, sin,
    N, T, C, D, W, part, stride_b, stride_h, stride_t,
    R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One of dq, dk, dv (R = 0) into its columns of the joined gradient, rotated back, and the tile's column sums."""
    first = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head, d = column // D, column % D
    sums = tl.zeros((STEP, COLUMNS), dtype=tl.float32)
    for start in range(0, ROWS, STEP):
        row = first + start + tl.arange(0, STEP)
        mask = (row < N)[:, None] & (column < C)[None, :]
        sample, t = (row // T).to(tl.int64), row % T
        place = grad + (sample * stride_b + t * stride_t)[:, None] + (head * stride_h + d)[None, :]
        g = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if R > 0:
            turning = mask & (d < R)[None, :]
            left = d < R // 2
            other = tl.load(place + tl.where(left, R // 2, -(R // 2))[None, :], mask=turning, other=0.0).to(tl.float32)
            angle = t[:, None] * R + d[None, :]
            c = tl.load(cos + angle, mask=turning, other=1.0)
            s = tl.load(sin + angle, mask=turning, other=0.0)
            g = g * c + tl.where(left, other, -other) * s
        tl.store(
            joined + row.to(tl.int64)[:, None] * W + (part * C + column)[None, :],
            g.to(joined.dtype.element_ty),
            mask=mask,
        )
        sums += g
    tl.store(partial + tl.program_id(0) * W + part * C + column, tl.sum(sums, 0), mask=column < C)


_ROTATE_ROWS, _JOIN_ROWS, _JOIN_COLUMNS, _JOIN_STEP = 4, 64, 256, 8


def _traced(kernel: Any) -> Any:
    """A kernel that can be launched on the tensors of a trace, below Dynamo."""
    return torch.library.wrap_triton(kernel) if isinstance(kernel, triton.runtime.JITFunction) else kernel


class LinearRotary(torch.autograd.Function):
    """Queries, keys and values, [B, H, T, D] each, of x @ w.T + b: queries and keys rotated to their positions.

    The rotation happens inside the product's result, whose rows stay whole: what attention reads are views of it.

    Args:
        x: [N, C], N = B * T; w [3 C, C] and b [3 C] of the same 16-bit dtype.
        tables: cos and sin, fp32 [2, T, R].
        heads: H.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, tables: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        N, C = x.shape
        _, T, R = tables.shape
        D = C // heads
        qkv = torch.addmm(b, x, w.T)
        block = power_of_two(heads * R)
        _traced(_rotate_kernel)[(-(-N // _ROTATE_ROWS),)](
            qkv, tables[0], tables[1], N, T, 3 * C, D, 2 * heads, R, _ROTATE_ROWS, block, num_warps=4
        )
        ctx.save_for_backward(x, w, tables)
        q, k, v = (part.transpose(1, 2) for part in qkv.view(-1, T, 3, heads, D).unbind(2))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, tables = ctx.saved_tensors
        N, C = x.shape
        _, T, R = tables.shape
        D, W = grads[0].shape[-1], 3 * C
        d_qkv = torch.empty(N, W, dtype=x.dtype, device=x.device)
        tiles = (-(-N // _JOIN_ROWS), -(-C // _JOIN_COLUMNS))
        partial = torch.empty(tiles[0], W, dtype=torch.float32, device=x.device)
        for part, (grad, rotated) in enumerate(zip(grads, (R, R, 0), strict=True)):
            grad = grad if grad.stride(-1) == 1 else grad.contiguous()
            _traced(_unrotate_kernel)[tiles](
                grad, d_qkv, partial, tables[0], tables[1],
                N, T, C, D, W, part, *grad.stride()[:3],
                rotated, _JOIN_ROWS, _JOIN_COLUMNS, _JOIN_STEP, num_warps=4,
            )  # fmt: skip
        return d_qkv @ w, d_qkv.T @ x, partial.sum(0).to(w.dtype), None, None


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def linear_rotary(x: Tensor, w: Tensor, b: Tensor, tables: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``LinearRotary``, hidden from Dynamo, which would have the gradients copied into one layout before the kernel
    that is there to save that copy. AOTAutograd traces it like any function."""
    out: tuple[Tensor, Tensor, Tensor] = LinearRotary.apply(x, w, b, tables, heads)  # type: ignore[no-untyped-call]
    return out
