"""flash-attention 4 (``flash_attn.cute`` of Dao-AILab/flash-attention), where it is installed, behind ``attention``.

An optional package of which new builds appear weekly: before a training run uses it, ``prepare`` has it compute a small
attention with an extra column, forward and backward, beside the definition. Whatever goes wrong there costs one line of
warning and nothing else; attention then stays with the kernels that torch brings.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

SWITCH = "SINKPRETRAIN_FLASH4"
"""Environment variable; 0 leaves flash-attention 4 alone."""

GENERATION, HEAD_DIMS = 9, (64,)
"""Generation of GPUs (Hopper) and sizes of a head for which it was measured to be faster (``docs/speed.md``)."""

TOLERANCE = 2e-2
"""Relative error, in norm, that 16-bit products may have."""

_trusted: set[tuple[str, torch.dtype, int]] = set()


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """Compiled code asks such a function once, while it is compiled. Only code for GPUs has a question: a torch without
    them is spared its compiler, which takes a second to import."""
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        return function
    marked: Callable[P, R] = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return marked


# --- whether ------------------------------------------------------------------------------------------------------


def prepare(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Check the package for what a run is about to ask of it, and from then on use it for that.

    Returns:
        Whether it is used. If it is installed and is not, a warning has said why.
    """
    if os.environ.get(SWITCH) == "0" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if _generation(device) != GENERATION or head_dim not in HEAD_DIMS:
        return False
    try:
        _kernels()
        error = _largest_error(device, dtype, head_dim)
        problem = "" if error < TOLERANCE else f"its results are off by {100 * error:.0f} %"
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "flash_attn":
            return False  # not installed
        problem = f"it lacks {missing.name}"
    except Exception as failed:  # whatever an optional package does, training goes on without it
        problem = f"{type(failed).__name__}: {' '.join(str(failed).split())[:200]}"
    if problem:
        warnings.warn(f"flash-attention 4 is installed and not used: {problem}.", stacklevel=2)
        return False
    _trusted.add((device.type, dtype, head_dim))
    return True


def distrust() -> None:
    """Use the package for nothing until it is prepared again."""
    _trusted.clear()


def takes(q_BHTD: Tensor, k_BHSD: Tensor) -> bool:
    """Whether causal attention of these is a matter of this module."""
    for head_dim in HEAD_DIMS:  # so that compiled code looks at a shape only where there is something to gain
        if _is_trusted(q_BHTD.device.type, q_BHTD.dtype, head_dim) and q_BHTD.shape[-1] == head_dim:
            return q_BHTD.shape == k_BHSD.shape
    return False


@constant
def _is_trusted(device: str, dtype: torch.dtype, head_dim: int) -> bool:
    return (device, dtype, head_dim) in _trusted


def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _kernels() -> Any:
    from flash_attn.cute import interface  # type: ignore[import-not-found]

    return interface


def _largest_error(device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Largest relative error of the output and of the gradients of q, k and v, with a column of logit 0.5."""
    B, H, T = 2, 3, 300
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        q, k, v, d_out = (
            torch.randn(B, H, T, head_dim, generator=generator).to(device, dtype).float() for _ in range(4)
        )
        wide = [x.requires_grad_() for x in (q, k, v)]
        logits = (q @ k.mT * head_dim**-0.5).masked_fill(torch.ones_like(q @ k.mT).triu(1).bool(), float("-inf"))
        column = torch.full_like(logits[..., :1], 0.5)
        want = torch.cat((logits, column), -1).softmax(-1)[..., :-1] @ v
        wanted = [want, *torch.autograd.grad(want, wide, d_out)]
    with torch.no_grad():
        narrow = [x.detach().to(dtype) for x in wide]
        out, lse = flash4_forward(*narrow)
        lse_all = torch.logaddexp(lse, column[..., 0])
        merged = (out * torch.exp(lse - lse_all).unsqueeze(-1)).to(dtype)
        got = [merged, *flash4_backward(d_out.to(dtype), *narrow, merged, lse_all)]
        errors = [(g.float() - w).norm() / w.norm() for g, w in zip(got, wanted, strict=True)]
        return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


# --- how ----------------------------------------------------------------------------------------------------------
# As operators with shapes of their own, so that torch.compile passes them by.


@torch.library.custom_op("sinkpretrain::flash4_forward", mutates_args=())
def flash4_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of [B, H, T, D]: the output and the fp32 logsumexp [B, H, T] of the scaled logits."""
    out, lse = _kernels()._flash_attn_fwd(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, return_lse=True)[:2]
    return out.transpose(1, 2), lse


@flash4_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sinkpretrain::flash4_backward", mutates_args=())
def flash4_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v under the softmax whose logsumexp and output are given (``attention.ColumnAttention``)."""
    d_q, d_k, d_v = (_by_token(x) for x in (q, k, v))
    _kernels()._flash_attn_bwd(
        *(x.transpose(1, 2) for x in (q, k, v, out, d_out)),
        lse,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **{name: x.transpose(1, 2) for name, x in (("dq", d_q), ("dk", d_k), ("dv", d_v))},
    )
    return d_q, d_k, d_v


@flash4_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _by_token(q), _by_token(k), _by_token(v)


def _by_token(x_BHTD: Tensor) -> Tensor:
    """An empty tensor of that shape in which a token's heads lie side by side, as the kernels want it."""
    B, H, T, D = x_BHTD.shape
    return x_BHTD.new_empty(B, T, H, D).transpose(1, 2)


class CausalAttention(torch.autograd.Function):
    """Causal attention [B, H, T, D] without a column."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor
        out, lse = flash4_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = flash4_backward(grads[0], q, k, v, out, lse)
        return d_q, d_k, d_v
