"""Operations with a plain definition and, for training on a GPU, a fused one: the seam between them.

The plain one is what the fused one is tested against, forward and gradient.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkpretrain.errors import first_line

HAVE_TRITON = importlib.util.find_spec("triton") is not None
if HAVE_TRITON:
    # Here and not where it is used: an import inside compiled code would break its graph.
    from sinkpretrain import fused as fused_kernels
    from sinkpretrain import fused_block

IGNORED = -100
"""Label of a position without a target, as in torch's cross entropy."""

LOGIT_BYTES = 2 << 30
"""Logits that may exist at a time in the fused loss."""


def can_compile(device: torch.device, rows: int | None = None) -> bool:
    """Whether small functions between products, of so many rows, are worth compiling: on a GPU, with Triton installed.

    Not for a single row, for which code would be compiled by itself.
    """
    return HAVE_TRITON and device.type == "cuda" and (rows is None or rows > 1)


def raise_recompile_limit() -> None:
    """Let one function be compiled for many shapes: beyond its limits, torch takes the plain one in silence."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(256, limits.recompile_limit)
    limits.accumulated_recompile_limit = max(1024, limits.accumulated_recompile_limit)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through torch.compile, once for all shapes and all who ask; itself where the compiler fails."""
    raise_recompile_limit()  # sizes of 1 and orders of axes in memory are compiled anew
    fast: Callable[..., Any] | None = torch.compile(function, dynamic=True)

    @wraps(function)
    def call(*args: Any) -> Any:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of a compiler there is no end of what may fail
                name, why = getattr(function, "__name__", "a function"), first_line(error)
                warnings.warn(f"{name} is not compiled ({why}); the same numbers, more slowly.", stacklevel=2)
                fast = None
        return function(*args)

    return call


def can_fuse(x: Tensor) -> bool:
    """Whether the fused operations apply: training on a GPU under 16-bit autocast, Triton installed."""
    return HAVE_TRITON and x.is_cuda and torch.is_grad_enabled() and torch.is_autocast_enabled("cuda")


def fused_dtype() -> torch.dtype:
    """The 16-bit dtype that autocast takes products in."""
    return torch.get_autocast_dtype("cuda")


def linear_gelu(x: Tensor, linear: nn.Linear, fused: bool) -> Tensor:
    """gelu(linear(x)), the exact GELU; x [..., C]."""
    if not (fused and can_fuse(x)):
        return F.gelu(linear(x))
    dtype = fused_dtype()
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    out: Tensor = fused_kernels.LinearGELU.apply(flat, linear.weight.to(dtype), linear.bias.to(dtype))  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], -1)


def linear_rotary(x_NC: Tensor, linear: nn.Linear, tables_2TR: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, T, D] of normed inputs, rotated to their positions; only where ``can_fuse``."""
    dtype = fused_dtype()
    out: tuple[Tensor, Tensor, Tensor] = fused_block.linear_rotary(
        x_NC.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype), tables_2TR, heads
    )
    return out


def add_norms(
    parts: tuple[Tensor, Tensor, Tensor], bias_C: Tensor, norms: tuple[nn.LayerNorm, nn.LayerNorm]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of three [N, C] (fp32 and twice 16 bits) and a bias, and its two norms; only where ``can_fuse``."""
    n1, n2 = norms
    vectors = torch.stack((bias_C, n1.weight, n1.bias, n2.weight, n2.bias)).float()
    out: tuple[Tensor, Tensor, Tensor] = fused_block.AddNorms.apply(*parts, vectors, n1.eps)  # type: ignore[no-untyped-call]
    return out


def linear_cross_entropy(h_NC: Tensor, weight_VC: Tensor, labels_N: Tensor, fused: bool) -> Tensor:
    """Mean negative log-likelihood, nats, fp32, of the labels under softmax(h @ weight.T); -100 has no loss."""
    if fused and can_fuse(h_NC):
        h = h_NC.to(fused_dtype())
        parts = max(1, -(-len(h) * len(weight_VC) * h.element_size() // LOGIT_BYTES))
        loss: Tensor = fused_kernels.LinearCrossEntropy.apply(h, weight_VC, labels_N, parts)  # type: ignore[no-untyped-call]
        return loss
    return F.cross_entropy(F.linear(h_NC, weight_VC).float(), labels_N, ignore_index=IGNORED)
