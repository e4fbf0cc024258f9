"""Matrix times one row in Triton: what a decoding step spends most of its time on. Imported only where Triton is.

A product with one row reads every weight once and does nothing else worth mentioning, so all that counts is how near
the memory's rate it comes. cuBLAS, made for tall inputs, reached 65 % of an H100's at best.

Letters of the axes: N rows of the weight (outputs), K columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST_COLUMNS = 1024
FEWEST_PROGRAMS = 256
"""About two for each multiprocessor: fewer leave some of the memory's rate unused."""


@triton.jit  # type: ignore[untyped-decorator]
def _one_row_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, N, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIAS: tl.constexpr
):
    """out[n] = sum_k weight[n, k] x[k] + bias[n], summed in fp32."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        inside = start + k < K
        row = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        part = tl.load(at + start, mask=(n < N)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += part * row[None, :]
    result = tl.sum(total, axis=1)
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < N)


def one_row_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``F.linear`` for an input [..., K] that is one row."""
    N, K = weight_NK.shape
    columns = min(MOST_COLUMNS, triton.next_power_of_2(K))
    rows = 8
    while rows > 1 and rows * FEWEST_PROGRAMS > N:
        rows //= 2
    out = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    _one_row_kernel[((N + rows - 1) // rows,)](
        x, weight_NK, weight_NK if bias_N is None else bias_N, out, N,
        K=K, ROWS=rows, COLUMNS=columns, BIAS=bias_N is not None,
    )  # fmt: skip
    return out


class OneRow(TorchFunctionMode):
    """While entered, every ``F.linear`` of one row (on a GPU, weight not transposed) is ``one_row_linear``."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs:
            x, weight = args[0], args[1]
            if x.is_cuda and x.numel() == x.shape[-1] and x.dtype == weight.dtype and weight.is_contiguous():
                return one_row_linear(*args)
        return func(*args, **(kwargs or {}))
