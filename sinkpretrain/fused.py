"""Triton kernels for the parts of training that stock kernels leave slow. Imported only where Triton is installed.

Each has a plain counterpart, which is its definition and its test: ``sinkpretrain.ops`` chooses between them. Figures
behind them are in ``docs/speed.md``.

Letters of the axes: N tokens (batch and time flattened), C width in, E width out, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# --- cross entropy ------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, labels, losses, V: tl.constexpr, stride, scale, ignored: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: its loss, and the row replaced by scale * (softmax - onehot). Reads twice (the second time mostly from
    cache), writes once."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    label = tl.load(labels + row)
    highest, total = -float("inf"), 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < V, other=-float("inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), 0)
        highest = new
    lse = highest + tl.log(total)
    keep = label != ignored
    target = tl.load(base + tl.where(keep, label, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(keep, lse - target, 0.0))
    tl.debug_barrier()  # the target's logit is read before its place is overwritten
    scale = tl.where(keep, scale, 0.0)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < V, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(x - lse) - tl.where(column == label, 1.0, 0.0)) * scale
        tl.store(base + column, gradient.to(logits.dtype.element_ty), mask=column < V)


_LOSS_BLOCK, _LOSS_WARPS = 16384, 16


def cross_entropy_rows(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    """Fill ``losses`` [N] (fp32; 0 for a label of -100) and replace ``logits`` [N, V] by their gradients."""
    N, V = logits.shape
    _cross_entropy_kernel[(N,)](
        logits, labels, losses, V, logits.stride(0), 1.0, -100, BLOCK=_LOSS_BLOCK, num_warps=_LOSS_WARPS
    )


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of ``h @ w.T``, the gradient taken with the loss while a part of the logits exists.

    Args:
        h: hidden states [N, C], bf16 or fp16.
        w: output matrix [V, C], fp32; its product is taken in the dtype of ``h``, its gradient summed in fp32.
        labels: int64 [N]; -100 has no loss.
        parts: how many pieces the logits are made in; memory is N * V / parts.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, labels: Tensor, parts: int) -> Tensor:
        losses = torch.empty(len(h), dtype=torch.float32, device=h.device)
        count = (labels != -100).sum()
        w = w.to(h.dtype)
        d_h, d_w = torch.empty_like(h), None
        for h_part, labels_part, losses_part, d_h_part in zip(
            h.chunk(parts), labels.chunk(parts), losses.chunk(parts), d_h.chunk(parts), strict=True
        ):
            logits = h_part @ w.T
            cross_entropy_rows(logits, labels_part, losses_part)
            torch.mm(logits, w, out=d_h_part)
            if d_w is None:
                d_w = torch.mm(logits.T, h_part, out_dtype=torch.float32)
            else:
                d_w = torch.addmm(d_w, logits.T, h_part, out_dtype=torch.float32)
        ctx.save_for_backward(d_h, d_w, count)
        return losses.sum() / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_h, d_w, count = ctx.saved_tensors
        scale = grads[0] / count
        return (d_h * scale).to(d_h.dtype), d_w * scale, None, None


# --- the MLP's first half -----------------------------------------------------------------------------------------


@triton.jit
def _normal_cdf(x, bell):  # type: ignore[no-untyped-def]
    """Phi(x), given bell = exp(-x^2 / 2): Abramowitz and Stegun 7.1.26, error of erf below 1.5e-7, a hundredth of what
    bf16 can hold. The library's erf costs more arithmetic than the memory traffic around it takes."""
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * bell
    return tl.where(x >= 0, 1.0 - 0.5 * tail, 0.5 * tail)


@triton.jit  # type: ignore[untyped-decorator]
def _gelu_kernel(pre, act, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    mask = place < count - start
    x = tl.load(pre + start + place, mask=mask, other=0.0).to(tl.float32)
    y = x * _normal_cdf(x, tl.exp(-0.5 * x * x))
    tl.store(act + start + place, y.to(act.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _gelu_backward_kernel(  # type: ignore[no-untyped-def]
    d_act, pre, d_pre, partial, N, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr
):
    """d_pre = d_act * gelu'(pre) for a tile, and the tile's column sums (its part of the bias gradient)."""
    first = tl.program_id(0) * ROWS
    base = first.to(tl.int64) * E  # only the tile's origin needs 64 bits
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((STEP, COLUMNS), dtype=tl.float32)
    for start in range(0, ROWS, STEP):
        row = start + tl.arange(0, STEP)
        place = row[:, None] * E + column[None, :]
        mask = (first + row < N)[:, None] & (column < E)[None, :]
        x = tl.load(pre + base + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(d_act + base + place, mask=mask, other=0.0).to(tl.float32)
        bell = tl.exp(-0.5 * x * x)
        d = g * (_normal_cdf(x, bell) + x * bell * 0.3989422804014327)
        tl.store(d_pre + base + place, d.to(d_pre.dtype.element_ty), mask=mask)
        sums += d
    tl.store(partial + tl.program_id(0) * E + column, tl.sum(sums, 0), mask=column < E)


_BLOCK, _ROWS, _COLUMNS, _STEP = 4096, 64, 512, 8  # tiles; module constants, which torch.compile can read


class LinearGELU(torch.autograd.Function):
    """gelu(x @ w.T + b) with the exact GELU; x [N, C], w [E, C], b [E], all of one 16-bit dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        pre = torch.addmm(b, x, w.T)
        act = torch.empty_like(pre)
        count = pre.numel()
        _gelu_kernel[(-(-count // _BLOCK),)](pre, act, count, _BLOCK, num_warps=8)
        ctx.save_for_backward(x, w, pre)
        return act

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, pre = ctx.saved_tensors
        d_act = grads[0].contiguous()
        N, E = pre.shape
        d_pre = torch.empty_like(pre)
        tiles = (-(-N // _ROWS), -(-E // _COLUMNS))
        partial = torch.empty(tiles[0], E, dtype=torch.float32, device=x.device)
        _gelu_backward_kernel[tiles](d_act, pre, d_pre, partial, N, E, _ROWS, _COLUMNS, _STEP, num_warps=8)
        return d_pre @ w, d_pre.T @ x, partial.sum(0).to(pre.dtype)
