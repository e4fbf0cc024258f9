"""Attempts at a run: which of them are open, whether they get anywhere, whether the next one may come by itself.

Standard library only: whoever watches over a job's processes must not need what they need.
"""

from __future__ import annotations

from pathlib import Path

from sinkpretrain import slurm
from sinkpretrain.errors import UserError
from sinkpretrain.files import read_json, write_json

OPEN = "attempt.json"
"""There while an attempt has neither ended nor failed for a reason of its own. Whichever process has such a reason
deletes it, which works on a full disk too; what is left behind tells that the processes were lost."""

FUTILE = 5
"""Attempts without a step after which a job no longer goes back into the queue."""


def begin(run: Path) -> None:
    """Note that all processes of this job's attempt are there and train; outside of Slurm nothing happens."""
    if slurm.job_id() is not None:
        write_json(run / OPEN, {"job": slurm.job_id(), "restart": slurm.restarts()})


def end(run: Path) -> None:
    """Note that the attempt has ended, or failed for a reason that trying again does not remove."""
    (run / OPEN).unlink(missing_ok=True)


def was_lost(run: Path) -> bool:
    """Whether this job's present attempt trained, and nobody has said why it no longer does."""
    try:
        return bool(read_json(run / OPEN) == {"job": slurm.job_id(), "restart": slurm.restarts()})
    except UserError:
        return False


def is_stuck(run: Path, step: int) -> bool:
    """Whether the last attempts all began at this very step: a job that gets nowhere should not go on for ever."""
    begun = [attempt.get("step") for attempt in read_json(run / "run.json").get("attempts", [])]
    return len(begun) >= FUTILE and set(begun[-FUTILE:]) == {step}


def saved_step(run: Path) -> int:
    """The step from which the next attempt will go on, as the pointer to the newest checkpoint says; 0 without one."""
    try:
        return int(read_json(run / "checkpoints" / "newest.json")["step"])
    except (UserError, KeyError, TypeError, ValueError):
        return 0
