"""Where a step's time goes: the GPU's kernels by class, and how much of the time the GPU had something to do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

CLASSES = {
    "attention": r"flash|fmha|cudnn|sdpa|attention",
    "matrix products": r"gemm|cutlass|nvjet|wgmma|matmul|_mm_|splitk",
    "loss": r"_cross_entropy|log_softmax|nll",
    "GELU": r"_gelu",
    "residual sums and norms": r"_add_norms|layer_norm",
    "rotary": r"_rotate|_unrotate|rotary",
    "optimizer and clipping": r"multi_tensor|adam|lpnorm|foreach",
    "embedding": r"embedding|index_put|indexing|radix|sort",
    "compiled elementwise": r"triton_",
    "copies": r"memcpy|memset|copy",
}
"""Classes of kernels and what their names match, first match wins; what matches nothing is "other"."""


def kernel_class(name: str) -> str:
    return next((c for c, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def profile(step: Callable[[], Any], steps: int = 3) -> dict[str, Any]:
    """Run a warmed-up training step under torch's profiler on a GPU.

    Returns:
        ``classes``: milliseconds per step of each class of kernels; ``busy``: share of the wall time in which a kernel
        ran; ``kernels``: the longest ones with milliseconds and launches per step.
    """
    from torch.profiler import ProfilerActivity

    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize()
    kernels = {e.key: (e.self_device_time_total / 1000 / steps, e.count / steps) for e in profiler.key_averages()}
    classes: defaultdict[str, float] = defaultdict(float)
    for name, (milliseconds, _) in kernels.items():
        classes[kernel_class(name)] += milliseconds
    wall = begin.elapsed_time(end) / steps
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:30]
    return {
        "milliseconds": round(wall, 3),
        "busy": round(sum(classes.values()) / wall, 4),
        "classes": {k: round(v, 3) for k, v in sorted(classes.items(), key=lambda item: -item[1])},
        "kernels": [
            {"name": name[:120], "milliseconds": round(ms, 3), "launches": round(count, 1)}
            for name, (ms, count) in longest
        ],
    }
