"""The first process of a training job: starts srun, hands signals on, and queues the job again if processes were lost.

A killed process, a dead node or a standstill ends the other processes too: srun kills them before they could speak with
Slurm, and NCCL may never tell them. Slurm itself queues a job again only for a lost node that it noticed in time. So
the one who decides is this process, which computes nothing and outlives the step. Standard library only, until then.
"""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sinkpretrain import attempts, slurm
from sinkpretrain.errors import UserError
from sinkpretrain.output import say
from sinkpretrain.signals import SIGNALS, to_take

USAGE = """usage: sinkpretrain supervise srun ... sinkpretrain train FLAGS

Runs the step of a training job (slurm/train.sbatch does so) and puts the job back into the queue if its processes were
lost: killed, gone with their node, or standing still. docs/cluster.md has the rule."""


def supervise(argv: Sequence[str]) -> int:
    """Run a command line that holds ``sinkpretrain train FLAGS``; returns its exit code."""
    words = list(argv)
    if words[:1] in (["-h"], ["--help"]):
        print(USAGE)
        raise SystemExit(0)
    flags = train_flags(words)
    code, ended_from_outside = run_step(words)
    # Who ends the job (scancel, pre-emption, the time limit) also decides whether it comes back.
    if code and not ended_from_outside:
        _put_back(flags, code)
    return code


def train_flags(words: list[str]) -> list[str]:
    """The flags of ``train``; raises UserError if that is not what the command line starts."""
    for number, pair in enumerate(itertools.pairwise(words)):
        if Path(pair[0]).name == "sinkpretrain" and pair[1] == "train":
            return words[number + 2 :]
    raise UserError(f"there is no 'sinkpretrain train' in {' '.join(words)!r}; see sinkpretrain supervise --help.")


def run_step(words: list[str]) -> tuple[int, bool]:
    """Run a command to its end. Returns its exit code (128 + n for signal n), and whether this process was told to end.

    Raises:
        UserError: there is no such command.
    """
    told: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if process is not None:
            process.send_signal(number)

    for number in to_take():
        signal.signal(number, hand_on)
    # The job scripts block signals until here, because one that arrives while Python starts would end the process.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        process = subprocess.Popen(words)
    except OSError as error:
        raise UserError(f"cannot run {words[0]}: {error.strerror}.") from error
    for early in list(told):  # came before there was somebody to hand it on to
        process.send_signal(early)
    code = process.wait()
    return (128 - code if code < 0 else code), bool({signal.SIGINT, signal.SIGTERM, signal.SIGHUP} & set(told))


def _put_back(flags: list[str], code: int) -> None:
    """Queue the job again if its processes were lost, and say so; whatever prevents that is said too."""
    job = slurm.job_id()
    if job is None:
        return
    from sinkpretrain.commands import parse_run  # only now: jsonargparse is not needed to start

    config, _ = parse_run(flags)
    run = Path(config.folder)
    if not attempts.was_lost(run):
        return  # they did not get as far as training, or have said what is wrong
    step = attempts.saved_step(run)
    stopped = code == 128 + signal.SIGUSR1  # with a checkpoint, and without scontrol where the processes run
    lost = f"job {job} was asked to stop" if stopped else f"processes of job {job} were lost (exit code {code})"
    if attempts.is_stuck(run, step):
        say(
            f"{lost}; it does not go back into the queue: its last {attempts.FUTILE} attempts made no step.", sys.stderr
        )
        return
    answer = slurm.show(job)
    if answer and not (" JobState=RUNNING " in answer and f" Restarts={slurm.restarts()} " in answer):
        say(f"{lost}; Slurm has already decided what becomes of it.", sys.stderr)
        return
    say(f"{lost}; it goes back into the queue and on from step {step:,}.", sys.stderr)
    problem = slurm.requeue(job)
    if problem:
        say(f"job {job} does not go back into the queue: {problem}.", sys.stderr)
