"""Measuring speed: ceilings of the machine, a bare training loop, and figures that can be compared."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sinkpretrain.device import peak_memory

FLUSH = 5
"""Steps between two readings of the clock; reading it waits for the GPU."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_clean() -> None:
    """Forget compiled code, free memory and reset its peak, so that one measurement does not bear on the next."""
    torch._dynamo.reset()
    free_memory()


def free_memory() -> None:
    """What nobody holds any more; the peak is counted from here on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def matmul_rate(where: torch.device | None = None) -> float:
    """Floating-point operations per second of a large bf16 product (fp32 and smaller on a CPU), on random data."""
    where = where or device()
    cuda = where.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=where, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        started = time.perf_counter()
        for _ in range(5 if cuda else 1):
            a @ b
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / (5 if cuda else 1))
    return 2 * n**3 / statistics.median(times[3:])


def product_weights(model: nn.Module) -> int:
    """Weights that are in a matrix product for each token: 2 floating-point operations each."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def bare_step(loss: Callable[[], Tensor], net: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """One step of a plain training loop: forward, backward, clipping, optimizer."""
    kind = next(net.parameters()).device.type

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        return value

    return step


def seconds_per_step(step: Callable[[], Tensor], steps: int) -> tuple[float, float]:
    """(median seconds of a step after a third of them, seconds of the first one)."""
    started = clock = time.perf_counter()
    first, times = 0.0, []
    for number in range(max(steps, 2 * FLUSH)):
        value = step()
        if number == 0:
            value.item()
            first = time.perf_counter() - started
        if number % FLUSH == FLUSH - 1:
            value.item()
            times.append((time.perf_counter() - clock) / FLUSH)
            clock = time.perf_counter()
    # The first group has the first step in it.
    return statistics.median(times[max(1, len(times) // 3) :]), first


def figure(name: str, seconds: float, tokens: int, flops_per_token: float, **more: Any) -> dict[str, Any]:
    """A measurement as it stands in the JSON; rates per second, peak memory (``device.peak_memory``)."""
    return {
        "name": name,
        "tokens_per_second": round(tokens / seconds, 1),
        "milliseconds": round(1000 * seconds, 3),
        "tokens_per_step": tokens,
        "model_flops_per_second": tokens / seconds * flops_per_token,
        "peak_memory_bytes": peak_memory(device()),
        **{k: round(v, 5) if isinstance(v, float) else v for k, v in more.items()},
    }
