"""Where a command computes, and how much memory that took."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkpretrain.errors import UserError, out_of_memory


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device; raises UserError where torch sees no GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but torch sees no GPU; use --device cpu.")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    dtype: torch.dtype = getattr(torch, name if name != "auto" else "bfloat16" if device.type == "cuda" else "float32")
    return dtype


def gpu_names(count: int) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` calls the GPUs that this process sees, of which there are ``count``."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(k) for k in range(count)]


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None for the CPU, whose processes share them."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@contextlib.contextmanager
def device_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory, of a GPU or of the host, into a UserError with these words."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error) is None:
            raise
        raise UserError(advice()) from error


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU since the last reset, or of this process since its start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """On the device, without waiting for what it was told to do before."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(tensor: Tensor) -> Callable[[], NDArray[Any]]:
    """A function that waits for the values and returns them: for those alone, not for what the device is told next."""
    if tensor.device.type != "cuda":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
    sent.record()

    def values() -> NDArray[Any]:
        sent.synchronize()
        return host.numpy()

    return values
