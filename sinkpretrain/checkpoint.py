"""Checkpoints that are whole or not there, the newest one that can be trusted, and writing beside the training."""

from __future__ import annotations

import os
import threading
import time
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from sinkpretrain import outside
from sinkpretrain.errors import UserError
from sinkpretrain.files import disk_faults, read_json, write_atomically, write_json
from sinkpretrain.load import NewerVersionError, numbered, read_checkpoint, step_of

POINTER = "newest.json"
"""Names the newest valid checkpoint, for people and for noticing that it has gone."""


# --- writing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A file that is safely on disk: how large, and how long that took beside the training."""

    path: Path
    bytes: int
    seconds: float


class BackgroundWriter:
    """One thread that writes what it is given, in order, while the training goes on.

    What is handed over must be a copy that nobody changes. An error is kept and raised at the next ``finish``.
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[Path | None, Callable[[], None]]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: list[Written] = []

    def submit(self, path: Path | None, write: Callable[[], None]) -> None:
        """Have ``write`` produce ``path``, or with None do something else, once everything so far is written, and only
        if it was; returns at once."""
        with self._lock:
            self._jobs.append((path, write))
            if self._thread is None:
                # Not a daemon: the process does not end in the middle of a file because its main thread did.
                self._thread = threading.Thread(target=self._work, name="checkpoints")
                self._thread.start()

    def finish(self) -> None:
        """Wait until everything is written; raises the error of whatever could not be."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def take_written(self) -> list[Written]:
        """What was written since the last call."""
        with self._lock:
            done, self._written = self._written, []
        return done

    @property
    def failed(self) -> bool:
        """Whether ``finish`` would raise."""
        return self._error is not None

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                path, write = self._jobs.popleft()
            if self._error is None:  # else: a later file must not look newer than one that is missing
                self._do(path, write)

    def _do(self, path: Path | None, write: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            if path is None:
                write()
                return
            with disk_faults(path):
                path.parent.mkdir(exist_ok=True)  # not its parents: a moved run does not begin anew in its old place
                write()
                written = Written(path, path.stat().st_size, time.perf_counter() - started)
            with self._lock:
                self._written.append(written)
        except BaseException as error:
            self._error = error


def on_cpu(data: Any, copies: bool = False) -> Any:
    """A copy of nested data with every tensor on the CPU, where nobody else changes it.

    Args:
        copies: the tensors that are on the CPU already are nobody else's (a model on GPUs), which saves their memory.
    """
    return apply_to_collection(data, Tensor, lambda t: t.detach().to("cpu", copy=not copies))


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's reading and writing of checkpoints: copied at once, written beside the training, data only.

    Args:
        writer: does the writing.
        copies: as for ``on_cpu``.

    Raises:
        UserError: disk full (the older checkpoints are intact), or a file that is not a checkpoint.
    """

    def __init__(self, writer: BackgroundWriter, copies: bool = False) -> None:
        self._writer, self._copies = writer, copies

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self._writer.submit(Path(path), partial(write_checkpoint, on_cpu(checkpoint, self._copies), Path(path)))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location or "cpu", mmap=False)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write, sync, read back from the disk, put in place, point to it; raises UserError if any of it fails."""

    def write(temporary: Path) -> None:
        torch.save(checkpoint, temporary)
        _leave_cache(temporary)
        try:
            verify(temporary)
        except UserError:
            temporary.stat()  # raises where the run was moved meanwhile: then it is not damaged
            raise

    write_atomically(path, write)
    write_json(path.parent / POINTER, {"file": path.name, "step": step_of(path), "bytes": path.stat().st_size})


def _leave_cache(path: Path) -> None:
    """Sync a file and drop it from memory, so that what is read next is what the disk holds."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def verify(path: Path) -> None:
    """Check every byte of a checkpoint against the checksums in it (torch writes them but does not read them).

    Raises:
        UserError: it is damaged.
        NewerVersionError: a later version of this project wrote it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        raise UserError(f"the checkpoint {path} is damaged or cut short ({error}).") from error
    if damaged is not None:
        raise UserError(f"the checkpoint {path} is damaged (checksum of {damaged}).")
    read_checkpoint(path)


# --- the folder ---------------------------------------------------------------------------------------------------


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:07d}.ckpt"


def weights_path(run: Path, step: int) -> Path:
    return run / "weights" / f"step-{step:07d}.safetensors"


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the highest step that is whole; a damaged or missing one is passed over with a warning.

    Raises:
        UserError: there were checkpoints, but none of them is left whole: starting again must be a decision.
        NewerVersionError: a later version of this project wrote the newest one.
    """
    folder = run / "checkpoints"
    paths = numbered(folder, ".ckpt")
    missing = _missing(folder)
    if missing is not None:
        warnings.warn(f"the newest checkpoint {missing} is missing; using the one before it.", stacklevel=2)
    for path in reversed(paths):
        try:
            verify(path)
            return path
        except NewerVersionError:
            raise
        except UserError as error:
            warnings.warn(f"{str(error).rstrip('.')}; using the one before it.", stacklevel=2)
    if paths or missing is not None:
        raise UserError(f"no checkpoint in {folder} is whole; restore one, or delete the folder to start from step 0.")
    return None


def _missing(folder: Path) -> Path | None:
    """The checkpoint that the pointer names, if it is not there."""
    if not (folder / POINTER).is_file():
        return None
    try:
        named = folder / str(read_json(folder / POINTER)["file"])
    except (UserError, KeyError, TypeError):
        return None  # only a pointer: the files speak for themselves
    return None if named.is_file() else named


def prune_checkpoints(run: Path, keep: int, doubling: int = 0) -> None:
    """Delete checkpoints of this run, nothing else, but for the ``keep`` newest and the log-spaced ones.

    Args:
        doubling: also keep the steps that are this number times 1, 2, 4, 8, ...; 0 for none.
    """
    paths = numbered(run / "checkpoints", ".ckpt")
    for path in paths[: max(0, len(paths) - max(1, keep))]:
        if not (doubling and _is_doubling(step_of(path), doubling)):
            path.unlink(missing_ok=True)


def _is_doubling(step: int, first: int) -> bool:
    times, rest = divmod(step, first)
    return rest == 0 and times > 0 and times & (times - 1) == 0


def clear_leftovers(run: Path) -> None:
    """Delete the unfinished temporary files of a process that was killed while it wrote into this run."""
    for folder in (run, run / "checkpoints", run / "weights", run / outside.FOLDER):
        for path in folder.glob(".*.[0-9]*.tmp"):
            path.unlink(missing_ok=True)


def is_log_spaced(step: int) -> bool:
    """Pythia's early checkpoints: steps 0, 1, 2, 4, ... 512."""
    return step == 0 or (step <= 512 and step & (step - 1) == 0)


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) is due after a step."""
    return every > 0 and step % every == 0
