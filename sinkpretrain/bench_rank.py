"""``python -m sinkpretrain.bench_rank FOLDER train ...``: the command ``train``, with clocks in every process of it.

What ``bench scaling`` starts. Lightning launches the other processes by the same command, so all of them are watched.
Each leaves ``FOLDER/rank-<r>.json``; nothing but the record of the run is kept, since writing weights is not training.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sinkpretrain import lit
from sinkpretrain.bench import watching
from sinkpretrain.cli import main
from sinkpretrain.data import Batch
from sinkpretrain.device import peak_memory
from sinkpretrain.files import write_json
from sinkpretrain.lit import PretrainModule

Intervals = list[tuple[float, float]]

PROFILED_STEPS = 2
"""The last steps of a run, which no rate is taken from."""


def watched(folder: Path, argv: Sequence[str]) -> int:
    """Run a command line that trains; returns its exit code."""
    lit.is_log_spaced = lambda step: False  # type: ignore[attr-defined]
    PretrainModule._save = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    with watching() as (_, waits):
        watch = Watch(folder, waits)
        watch.install()
        return main(argv)


class Watch:
    """Looks at the last steps of a run on several GPUs, and writes what it saw before the processes part.

    Args:
        folder: for the file.
        waits: seconds that each batch was waited for, filled while the run goes on.
    """

    def __init__(self, folder: Path, waits: list[float]) -> None:
        self._folder, self._waits = folder, waits
        self._peak_memory = 0
        self._profile: Any = None

    def install(self) -> None:
        step, end = PretrainModule.training_step, PretrainModule.on_train_end

        def training_step(module: PretrainModule, batch: Batch, batch_idx: int) -> None:
            if module.global_step == module.config.training.steps - PROFILED_STEPS:
                self._peak_memory = peak_memory(module.device)
                if module.device.type == "cuda" and module.trainer.world_size > 1:
                    torch.cuda.synchronize()
                    self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                    self._profile.__enter__()
            step(module, batch, batch_idx)

        def on_train_end(module: PretrainModule) -> None:
            self._write(module.global_rank)
            end(module)

        PretrainModule.training_step = training_step  # type: ignore[method-assign, assignment]
        PretrainModule.on_train_end = on_train_end  # type: ignore[method-assign, assignment]

    def _write(self, rank: int) -> None:
        seen = None
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.__exit__(None, None, None)
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                self._profile.export_chrome_trace(str(trace))
                events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
            seen = communication(events, PROFILED_STEPS)
        about = {"waits": self._waits, "communication": seen, "peak_memory_bytes": self._peak_memory}
        write_json(self._folder / f"rank-{rank}.json", about)


def communication(events: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Of a trace of ``steps`` steps: milliseconds per step in which NCCL's kernels ran, and in which nothing else did.

    A kernel of NCCL runs until all processes have joined it, so what it takes includes waiting for the slowest.
    """
    own: Intervals = []
    others: Intervals = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            begin = float(event["ts"])  # microseconds
            (own if "nccl" in event["name"].lower() else others).append((begin, begin + float(event["dur"])))
    together = length(own)
    return {
        "milliseconds": round(together / 1000 / steps, 3),
        "exposed_milliseconds": round((length(own + others) - length(others)) / 1000 / steps, 3),
    }


def length(intervals: Intervals) -> float:
    """Of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


if __name__ == "__main__":
    sys.exit(watched(Path(sys.argv[1]), sys.argv[2:]))
