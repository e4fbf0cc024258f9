"""A whole experiment on this machine, without Slurm: every run trained and streamed, then all of them compared."""

from __future__ import annotations

import os
import queue
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from sinkpretrain.errors import UserError
from sinkpretrain.experiment import Experiment, Member
from sinkpretrain.output import say
from sinkpretrain.signals import PROCESS

POLL_SECONDS = 0.2


def run_here(experiment: Experiment) -> int:
    """Train and stream every run, ``at_once`` of them at a time, then compare all, in processes of their own.

    A run that fails does not stop the others. What is finished is not done again when the command is given again.

    Args:
        experiment: its settings have been checked.

    Returns:
        Exit code: 0 done, 1 some run failed, 128 + n stopped by signal n.

    Raises:
        UserError: more nodes or GPUs than there are here.
    """
    shares = gpu_shares(experiment, gpu_count() if experiment.gpus else 0)
    machine = Machine(Path(experiment.out) / "logs")
    PROCESS.install()
    try:
        with ThreadPoolExecutor(len(shares)) as pool:
            lanes: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            for share in shares:
                lanes.put(share)
            runs = [pool.submit(machine.run, member, lanes) for member in experiment.members()]
            done = machine.watch(runs)
        if done and experiment.evaluate.tokens:
            words = ["compare", *experiment.compare_flags()]
            with ThreadPoolExecutor(1) as pool:
                done = machine.watch([pool.submit(machine.call, "compare", words, None)])
    finally:
        PROCESS.uninstall()
    if PROCESS.signal is not None:
        say("stopped; the same command goes on.", sys.stderr)
        return 128 + PROCESS.signal
    return 0 if done else 1


def commands(member: Member) -> list[list[str]]:
    """The arguments of ``sinkpretrain`` that train and evaluate one run, in order."""
    train = ["train", *member.train_flags()]
    return [train, ["stream", *member.stream_flags()]] if member.experiment.evaluate.tokens else [train]


def as_script(experiment: Experiment) -> list[str]:
    """The same as lines of a shell script, one run after the other."""
    words = [c for m in experiment.members() for c in commands(m)]
    if experiment.evaluate.tokens:
        words.append(["compare", *experiment.compare_flags()])
    return ["set -e", *(shlex.join(["sinkpretrain", *w]) for w in words)]


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def gpu_shares(experiment: Experiment, gpus: int) -> list[str | None]:
    """What each of the runs that go on at the same time sees as CUDA_VISIBLE_DEVICES; None leaves it as it is.

    Without ``at_once``: as many runs as have GPUs of their own, or one where there is none. With it, that many; if they
    are more, they share.

    Raises:
        UserError: more nodes or GPUs than there are here.
    """
    e = experiment
    if e.nodes > 1:
        raise UserError(f"nodes is {e.nodes}, but --local trains on this machine alone; set nodes: 1.")
    if e.gpus and gpus < e.devices:
        raise UserError(
            f"this machine has {gpus} GPUs, fewer than the {e.devices} of a run (devices); set devices, or gpus: false."
        )
    count = min(e.at_once or max(1, gpus // e.devices), len(e.members()))
    if not e.gpus:
        return [None] * count
    from sinkpretrain.device import gpu_names

    names = gpu_names(gpus)
    groups = [names[k : k + e.devices] for k in range(0, gpus - e.devices + 1, e.devices)]
    return [",".join(groups[k % len(groups)]) for k in range(count)]


@dataclass
class Machine:
    """Calls of ``sinkpretrain`` in processes of their own, whose output goes to files in ``logs``."""

    logs: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, member: Member, lanes: queue.SimpleQueue[str | None]) -> bool:
        """Train and evaluate one run on a share of the machine that is free; whether that went well."""
        gpus = lanes.get()
        try:
            return all(
                any(self.call(f"{words[0]}-{member.name}", words, gpus) for _ in range(attempts))
                for words, attempts in zip(commands(member), (member.experiment.attempts, 1), strict=False)
            )
        finally:
            lanes.put(gpus)

    def call(self, name: str, words: list[str], gpus: str | None) -> bool:
        if PROCESS.requested:
            return False
        log = self.logs / f"{name}.log"
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus is not None else {})
        started = time.monotonic()
        say(f"{name}: see {log}")
        self.logs.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
            process = self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "sinkpretrain", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            if PROCESS.signal is not None:
                process.send_signal(PROCESS.signal)  # it came while the process was being started
            code = process.wait()
        del self.processes[name]
        if code == 0:
            say(f"{name}: done in {time.monotonic() - started:,.0f} s")
        elif not PROCESS.requested:
            say(f"{name}: failed ({_last_line(log) or f'exit code {code}'})", sys.stderr)
        return code == 0

    def watch(self, futures: list[Future[bool]]) -> bool:
        """Wait for all, passing on what asks to stop; whether all went well."""
        passed_on = False
        try:
            while wait(futures, timeout=POLL_SECONDS).not_done:
                if PROCESS.signal is not None and not passed_on:
                    self._signal(PROCESS.signal)
                    passed_on = True
        except BaseException:  # a second Ctrl-C
            self._signal(signal.SIGKILL)
            raise
        return all([future.result() for future in futures])

    def _signal(self, number: signal.Signals) -> None:
        for process in list(self.processes.values()):
            process.send_signal(number)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
