"""Checkpoints that are whole or not there, and the newest one that can be trusted."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from sinkpretrain.errors import UserError
from sinkpretrain.files import write_atomically
from sinkpretrain.load import numbered


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints: atomic, re-opened before it counts, data only.

    Raises:
        UserError: disk full (the older checkpoints are intact), or a file that is not a checkpoint.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        def write(temporary: Path) -> None:
            torch.save(checkpoint, temporary)
            # What cannot be read back is not a checkpoint; mmap keeps this to reading the directory of the archive.
            torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)

        write_atomically(Path(path), write)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"cannot read the checkpoint {path}: {error}") from error
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}.ckpt"


def weights_path(run: Path, step: int) -> Path:
    return run / "weights" / f"step-{step:07d}.safetensors"


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the highest step that can be read; a damaged one is passed over with a warning."""
    for path in reversed(numbered(run / "checkpoints", ".ckpt")):
        try:
            AtomicCheckpointIO().load_checkpoint(path)
            return path
        except UserError as error:
            warnings.warn(f"{error}; using the one before it.", stacklevel=2)
    return None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints of this run; nothing else."""
    paths = numbered(run / "checkpoints", ".ckpt")
    for path in paths[: max(0, len(paths) - max(1, keep))]:
        path.unlink()


def is_log_spaced(step: int) -> bool:
    """Pythia's early checkpoints: steps 0, 1, 2, 4, ... 512."""
    return step == 0 or (step <= 512 and step & (step - 1) == 0)


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) is due after a step."""
    return every > 0 and step % every == 0
