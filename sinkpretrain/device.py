"""Where a command computes, and how much memory that took."""

from __future__ import annotations

import resource

import torch

from sinkpretrain.errors import UserError


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device; raises UserError where torch sees no GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU; use --device cpu.")
    return torch.device(name)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU since the last reset, or of this process since its start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
