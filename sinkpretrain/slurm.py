"""What a process has to know about, and ask of, the Slurm job that it runs in. Standard library only."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime

SECONDS_PER_ANSWER = 20.0
"""A controller that takes longer than this to answer counts as not answering."""


def job_id() -> str | None:
    """Id of the job (of one task of an array: ``array_task``), or None outside of Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        # The last task's own id is the array's: requeueing that would requeue every task.
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often Slurm has started this job again."""
    said = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(said) if said.isdigit() else 0


def requeue(job: str) -> str | None:
    """Put the job back into the queue; returns why that did not work, None if it did."""
    # First of all Slurm ends the job's processes, the one that asks included: it must live to hear the answer.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        answer, problem = _scontrol("requeue", job)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return problem if answer is None else None


def show(job: str) -> str | None:
    """What ``scontrol`` says about a job, on one line; None if it does not answer."""
    return _scontrol("-o", "show", "job", job)[0]


def end_time(job: str) -> float | None:
    """When the job's time limit ends, in seconds since 1970; None if nobody says."""
    answer = show(job)
    found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", answer or "")
    if found:
        return datetime.fromisoformat(found.group(1)).timestamp()
    said = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(said) if said.isdigit() else None


class TimeLeft:
    """Tells a run to stop by itself before its job's time limit does.

    Args:
        margin: seconds before the end at which to stop; a quarter of a job that is shorter than four times that.
        ask: returns the end of the job in seconds since 1970, or None for no end. It is asked again at the last
            moment, since limits are raised while jobs run.
    """

    def __init__(self, margin: float, ask: Callable[[], float | None]) -> None:
        self._ask = ask
        self._end = ask()
        # Never so much of a short job that nothing gets done.
        self.margin = min(margin, 0.25 * max(0.0, self._end - time.time())) if self._end else margin

    def over(self) -> bool:
        """Whether the time has come to save and leave."""
        if self._end is None or time.time() < self._end - self.margin:
            return False
        self._end = self._ask()
        return self._end is not None and time.time() >= self._end - self.margin


def time_left(margin: float) -> TimeLeft | None:
    """The clock of the job that this process runs in; None outside of Slurm."""
    job = job_id()
    return TimeLeft(margin, lambda: end_time(job)) if job else None


def _scontrol(*arguments: str) -> tuple[str | None, str]:
    """What ``scontrol`` answers, and what went wrong if that is None."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments],
            # A user's own format of times, relative ones for example, is for the eye.
            env=os.environ | {"SLURM_TIME_FORMAT": "standard"},
            capture_output=True,
            text=True,
            timeout=SECONDS_PER_ANSWER,
            check=False,
        )
    except FileNotFoundError:
        return None, "there is no scontrol on this node"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"scontrol does not answer ({error})"
    if done.returncode:
        return None, " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"
    return done.stdout, ""
