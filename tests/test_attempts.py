"""What processes leave behind when they end: a reason, or none because they were lost."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from data_factory import make_data
from forked import Forked, Forks
from test_train import config, start_two

from sinkpretrain import attempts, metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("attempts") / "data")


def start(
    forks: Forks,
    data: Path,
    folder: Path,
    code: str = "",
    port: int = 0,
    stall_seconds: float = 1800.0,
    ranks: tuple[int, ...] = (0, 1),
) -> list[Forked]:
    """Two processes of one run, or one of them, as in a job."""
    run = config(data, folder / "run", steps=100_000, devices=2, stall_seconds=stall_seconds)
    return start_two(forks, run, folder, code=code, port=port, ranks=ranks, SLURM_JOB_ID="7")


def finish(processes: list[Forked]) -> list[str]:
    return [p.communicate(timeout=240)[0] for p in processes]


def wait_steps(run: Path, processes: list[Forked], step: int = 8) -> None:
    while not any(x["step"] > step for x in metrics.read(run)):
        assert all(p.poll() is None for p in processes), finish(processes)
        time.sleep(0.1)


def test_a_killed_process_leaves_no_reason(
    forks: Forks, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run, processes = tmp_path / "run", start(forks, data, tmp_path)
    wait_steps(run, processes)
    assert attempts.was_lost(run)  # nothing is explained as yet
    processes[1].send_signal(signal.SIGKILL)
    survivor = finish(processes)[0]
    assert "sinkpretrain train: rank 0 has lost the connection to another process" in survivor
    assert "the same command goes on from the last checkpoint" in survivor
    assert "Traceback" not in survivor
    assert processes[0].returncode == 75
    assert attempts.was_lost(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not attempts.was_lost(run)  # that was another attempt


@pytest.mark.parametrize("end", ["an error of one process", "SIGTERM"])
def test_a_reason_is_given_by_whoever_has_it(end: str, forks: Forks, data: Path, tmp_path: Path) -> None:
    """One process fails by itself; the other only sees it go. Or both were asked to stop."""
    code = (
        "from sinkpretrain import lit\n"
        "step = lit.PretrainModule.training_step\n"
        "def fail(self, *a):\n"
        "    if self.global_step == 9 and self.trainer.global_rank == 1: raise RuntimeError('a mistake')\n"
        "    return step(self, *a)\n"
        "lit.PretrainModule.training_step = fail\n"
    )
    run, processes = tmp_path / "run", start(forks, data, tmp_path, code if end != "SIGTERM" else "")
    if end == "SIGTERM":
        wait_steps(run, processes)
        for process in processes:
            process.send_signal(signal.SIGTERM)
    outputs = finish(processes)
    if end == "SIGTERM":
        assert [p.returncode for p in processes] == [143, 143], outputs
    else:
        assert "a mistake" in outputs[1]
        assert "has lost the connection" in outputs[0]
        assert 0 not in [p.returncode for p in processes]
    assert (run / "config.yaml").is_file()
    assert not (run / attempts.OPEN).exists()


IMPATIENT = (
    "from sinkpretrain import lit\n"
    "require_same = lit.Ranks.require_same\n"
    "def same(self, facts):\n"
    "    require_same(self, facts)\n"
    "    self.set_patience(7.0)\n"
    "lit.Ranks.require_same = same\n"
)
"""Exchanges that wait for seven seconds, unless the run says otherwise; else it would take two minutes to see."""


def test_a_suspended_job_goes_on_and_a_stopped_process_is_named(forks: Forks, data: Path, tmp_path: Path) -> None:
    """``scontrol suspend`` stops all processes of a job, one node a little after the other, for longer than anything
    else may take. Who is stopped alone is late, also after that."""
    run, processes = tmp_path / "run", start(forks, data, tmp_path, IMPATIENT, stall_seconds=6.0)
    wait_steps(run, processes)
    for number, order in ((signal.SIGSTOP, processes), (signal.SIGCONT, processes[::-1])):
        for process in order:  # who waits for the other is stopped last and goes on first
            process.send_signal(number)
            time.sleep(0.3)
        reached = max(x["step"] for x in metrics.read(run))
        time.sleep(8 if number == signal.SIGSTOP else 0)
    wait_steps(run, processes, reached + 8)
    processes[1].send_signal(signal.SIGSTOP)
    said, _ = processes[0].communicate(timeout=240)
    processes[1].kill()
    finish(processes[1:])
    assert processes[0].returncode == 75
    assert "rank 0 has made no step for 6 s: rank 1 on" in said
    assert said.rstrip().endswith("has not been heard from.")


def test_a_taken_port_is_named(forks: Forks, data: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        (first,) = start(forks, data, tmp_path, port=port, ranks=(0,))  # the other one could only wait for it
        (output,) = finish([first])
    assert first.returncode == 2, output
    assert f"port {port} of rank 0's node is taken by another program; export another MASTER_PORT." in output


def test_outside_of_slurm_nothing_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    attempts.begin(tmp_path)
    assert list(tmp_path.iterdir()) == []
