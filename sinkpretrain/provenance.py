"""What a result must carry to be believed: versions, commit, device, time."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sinkpretrain import __version__
from sinkpretrain.files import sha256_file


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Command, device, library versions, commit of this code and the current time, as plain data."""
    return {
        "command": command(),
        "device": device_name(torch.device(device)),
        "versions": versions(),
        "commit": commit(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command() -> str:
    """The command line of this process, as one would type it again."""
    program = Path(sys.argv[0]).name
    return shlex.join(["sinkpretrain" if program == "__main__.py" else program, *sys.argv[1:]])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that numbers depend on."""
    found = {"sinkpretrain": __version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "tokenizers", "numpy", "flash-attn-4"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


COMMIT_VARIABLE = "SINKPRETRAIN_COMMIT"
"""Names the commit where the code was copied to a machine without its history."""


def commit() -> str | None:
    """Commit of the checkout that this code runs from, with ``+changes`` if it was edited; None outside of git."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    here = Path(__file__).parent.parent
    if not (here / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def source_hash() -> str:
    """Short hash of this package's source, which tells copies of the code apart where there is no commit."""
    return sha256_file(*sorted(Path(__file__).parent.glob("*.py")))[:12]
