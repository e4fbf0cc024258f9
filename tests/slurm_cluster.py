"""A real Slurm cluster on this machine for the tests, and what they do to its jobs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAMS = ("slurmctld", "slurmd", "srun", "munged", "unshare", "ss")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
PATIENCE = 240.0
"""Seconds to wait for anything: an idle machine needs a tenth of it, one that others use needs it."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY")


def missing_programs() -> list[str]:
    return [p for p in PROGRAMS if shutil.which(p, path=PATH) is None]


class Cluster:
    """Two nodes in name spaces of their own. ``folder`` is readable on all of them."""

    def __init__(self, folder: Path) -> None:
        # Short, and open to all above it: munge insists.
        self.folder, self.full = folder, folder.parent / "full"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "MINI_SLURM_DIR": str(folder),
            "MINI_SLURM_CPUS": "4",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": PATH,
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "SINKPRETRAIN_SLURM": str(ROOT / "slurm"),
            "SINKPRETRAIN_SITE": str(ROOT / "slurm" / "site.env"),
        }

    def mini(self, *arguments: str) -> None:
        done = subprocess.run(
            [str(ROOT / "tests" / "mini_slurm.sh"), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if arguments[0] != "start" else (self.folder.parent / "start.log").open("w"),
            text=True,
            timeout=120,
        )
        log = self.folder.parent / "start.log"
        assert done.returncode == 0, (done.stdout or "") + (log.read_text() if log.exists() else "")

    def mount_full_disk(self) -> None:
        """A file system of one megabyte."""
        self.full.mkdir()
        self.call("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(self.full))

    def call(self, *words: str) -> str:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, script: Path | str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        return self.call("sbatch", "--parsable", *options, str(script), *arguments)

    def job(self, number: str) -> dict[str, str]:
        text = self.call("scontrol", "-o", "show", "job", number)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait_state(self, number: str, *states: str) -> str:
        return self.wait(lambda: s if (s := self.state(number)) in states else None, f"job {number} to be {states}")

    def wait_end(self, number: str) -> str:
        return self.wait_state(number, *ENDED)

    def wait(self, condition: Callable[[], str | None], what: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = condition()
            if found is not None:
                return found
            time.sleep(0.2)
        raise AssertionError(f"waited {PATIENCE:.0f} s for {what}\n{self.call('squeue')}")

    def processes(self, text: str) -> list[int]:
        """Python processes on the nodes whose command line holds ``text``, by rank; pids as seen from outside."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode().split("\0")
                rank = re.search(r"SLURM_PROCID=(\d+)", (folder / "environ").read_bytes().decode(errors="replace"))
            except OSError:
                continue
            if rank and "python" in words[0] and "supervise" not in words and any(text in w for w in words):
                found.append((int(rank.group(1)), int(folder.name)))
        return [pid for _, pid in sorted(found)]


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    os.kill(pid, number)
