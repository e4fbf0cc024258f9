"""Files that are there whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from sinkpretrain.errors import UserError


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Read once, at import, while there is one thread: it can only be read by setting it."""


UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
"""What a path is that cannot be written to: not allowed, on a read-only disk, below a file or a file itself."""

VANISHED = (errno.ENOENT, errno.ESTALE)
"""What a path is whose folder is no longer there."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file, sync it to disk, then put it in place of ``path`` in one step.

    An interrupted or failing write leaves the old file as it was and no temporary file behind.

    Raises:
        UserError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            # Some writers (safetensors) leave files that only their owner can read; colleagues on a cluster need them.
            temporary.chmod(0o666 & ~_UMASK)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(path: Path, otherwise: str, patience: float = 10.0) -> Iterator[None]:
    """Hold a lock file; the system releases it when the process ends, however it ends.

    Args:
        otherwise: what to say if another process still holds it after ``patience`` seconds.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    with disk_faults(path):
        file = path.open("a+", encoding="utf-8")
    with file:
        deadline = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(f"{otherwise} ({file.read().strip()}); wait for it to end, or stop it.")
            time.sleep(0.2)
        with disk_faults(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: nothing to hold
    return True


@contextlib.contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn what a user can mend while ``path`` is written, a full disk or missing permission, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if out_of_space(error):
            raise UserError(
                f"cannot write {path}: the disk is full; free some space and give the same command again "
                "(what was there before is intact)."
            ) from error
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            why = os.strerror(error.errno).lower()
            raise UserError(f"cannot write {path}: {why}; choose a folder you can write to.") from error
        if isinstance(error, OSError) and error.errno in VANISHED and not path.parent.is_dir():
            raise UserError(
                f"cannot write {path}: its folder was moved or deleted meanwhile; put it back and give the same "
                "command again, or name its new place."
            ) from error
        raise


def out_of_space(error: BaseException) -> bool:
    """Whether a failed write ran out of disk; torch and safetensors wrap the error number in a text of their own."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = ("No space left", "file write failed", "unexpected pos", "Disk quota", "File too large")
    return getattr(error, "errno", None) in codes or any(t in str(error) for t in texts)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    write_atomically(path, lambda p: p.write_bytes(content))


def write_json(path: Path, data: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused, for most readers cannot parse them."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON; raises UserError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def sha256_file(*paths: Path) -> str:
    """Hex digest of a file's content, or of several files' contents one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
