"""The rule by which a job goes back into the queue, with a Slurm that is three lines of shell; the real one is in
test_slurm.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sinkpretrain import attempts
from sinkpretrain.cli import main
from sinkpretrain.signals import SIGNALS

ROOT = Path(__file__).parent.parent
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >> "{folder}/requeued"; else cat "{folder}/show"; fi
"""


class Job:
    """A training job of which the test decides how its step ends and what Slurm says."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "rün"
        (folder / "bin").mkdir()
        script = folder / "bin" / "scontrol"
        script.write_text(SCONTROL.format(folder=folder))
        script.chmod(0o755)
        self.says("RUNNING", restarts=1)
        self.has_attempts([0, 40])
        self.has_saved(80)

    def says(self, state: str, restarts: int) -> None:
        (self.folder / "show").write_text(f"JobId=7 JobState={state} Requeue=1 Restarts={restarts} BatchFlag=1\n")

    def has_attempts(self, steps: list[int]) -> None:
        self.run.mkdir(exist_ok=True)
        (self.run / "run.json").write_text(json.dumps({"attempts": [{"step": s} for s in steps]}))

    def has_saved(self, step: int) -> None:
        (self.run / "checkpoints").mkdir(exist_ok=True)
        (self.run / "checkpoints" / "newest.json").write_text(json.dumps({"step": step}))

    def words(self, step: str) -> list[str]:
        """A step that runs a line of shell; the rest of the words are there to be read."""
        return ["supervise", "bash", "-c", step, "sinkpretrain", "train", "--data.path=x", f"--out={self.run}"]

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    job = Job(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    attempts.begin(job.run)
    return job


@pytest.fixture(autouse=True)
def handlers() -> object:
    """The command takes over the signals of its process, which is this one."""
    before = {n: signal.getsignal(n) for n in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("step", "code"), [("kill -9 $$", 137), ("exit 75", 75), ("exit 1", 1)])
def test_lost_processes_bring_the_job_back(step: str, code: int, job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(job.words(step)) == code
    assert job.requeued == ["7"]
    sentence = f"processes of job 7 were lost (exit code {code}); it goes back into the queue and on from step 80."
    assert sentence in capfd.readouterr().err


def test_tasks_of_an_array_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sweep.sbatch does: the run is named by the experiment's file and a number."""
    file = job.folder / "experiment.yaml"
    file.write_text(f"out: {job.folder}/all\nvariants: [vanilla, one-sink-token]\nsettings: {{data.path: x}}\n")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    target = job.folder / "all" / "runs" / "one-sink-token"
    target.parent.mkdir(parents=True)
    job.run.rename(target)
    attempts.begin(target)
    words = ["supervise", "bash", "-c", "exit 75", "sinkpretrain", "train", f"--experiment={file}", "--member", "1"]
    assert main(words) == 75
    assert job.requeued == ["7_1"]


def test_an_end_that_was_explained_is_final(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(job.words(f"rm '{job.run}/{attempts.OPEN}'; exit 2")) == 2
    assert (job.requeued, capfd.readouterr().err) == ([], "")


def test_an_end_before_the_training_is_final(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies there is of the attempt before this one."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    job.says("RUNNING", restarts=2)
    assert main(job.words("exit 1")) == 1
    assert job.requeued == []


def test_a_good_end_is_one(job: Job) -> None:
    assert main(job.words("exit 0")) == 0
    assert job.requeued == []


@pytest.mark.parametrize(("state", "restarts"), [("COMPLETING", 1), ("PENDING", 1), ("RUNNING", 2)])
def test_what_slurm_has_decided_is_left_alone(state: str, restarts: int, job: Job, capfd) -> None:
    """It noticed the dead node itself; the job may even run again by now, and must not be torn down."""
    job.says(state, restarts)
    assert main(job.words("exit 75")) == 75
    assert job.requeued == []
    assert "Slurm has already decided" in capfd.readouterr().err


def test_a_job_that_gets_nowhere_stays_away(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    job.has_attempts([0, *[80] * (attempts.FUTILE - 1)])
    main(job.words("exit 75"))
    assert job.requeued == ["7"]  # one more
    job.has_attempts([0, *[80] * attempts.FUTILE])
    main(job.words("exit 75"))
    assert job.requeued == ["7"]
    assert "does not go back into the queue: its last 5 attempts made no step" in capfd.readouterr().err
    job.has_saved(120)  # the last of them did
    main(job.words("exit 75"))
    assert job.requeued == ["7", "7"]


def test_a_job_that_never_saved_anything_stays_away_too(job: Job) -> None:
    (job.run / "checkpoints" / "newest.json").unlink()
    job.has_attempts([0] * attempts.FUTILE)
    main(job.words("kill -9 $$"))
    assert job.requeued == []


def test_without_scontrol_it_is_said(job: Job, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    (job.folder / "bin" / "scontrol").write_text("#!/bin/bash\necho 'slurm_load_jobs error: timed out' >&2; exit 1")
    assert main(job.words("exit 75")) == 75
    error = capfd.readouterr().err
    assert "job 7 does not go back into the queue: slurm_load_jobs error: timed out." in error


def test_asking_survives_what_it_brings_about(job: Job, capfd: pytest.CaptureFixture[str]) -> None:
    """Slurm ends the job, scontrol included, before scontrol has its answer."""
    script = job.folder / "bin" / "scontrol"
    script.write_text(script.read_text().replace("echo", "kill -TERM $$; echo"))
    main(job.words("exit 75"))
    assert job.requeued == ["7"]
    assert "does not go back" not in capfd.readouterr().err


def test_signals_reach_the_step_and_termination_is_final(job: Job) -> None:
    """In a process of its own, and blocked until it listens, as in the job scripts."""
    ready = job.folder / "ready"
    step = f"trap 'exit 41' TERM; trap 'exit 42' USR1; trap 'exit 43' HUP; touch '{ready}'; sleep 60 & wait"
    for number, code, requeued in ((signal.SIGUSR1, 42, 1), (signal.SIGTERM, 41, 0), (signal.SIGHUP, 43, 0)):
        before = len(job.requeued)
        block = ["env", "--default-signal=HUP", "--block-signal=USR1", "--block-signal=TERM"]
        process = subprocess.Popen([*block, sys.executable, "-m", "sinkpretrain", *job.words(step)], cwd=ROOT)
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.05)
        ready.unlink()
        process.send_signal(number)
        assert process.wait(60) == code
        assert len(job.requeued) - before == requeued


def test_a_command_that_trains_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["supervise", "srun", "hostname"]) == 2
    assert "there is no 'sinkpretrain train' in 'srun hostname'" in capsys.readouterr().err
    words = ["supervise", "/no/such/srun", "sinkpretrain", "train", "--out=x"]
    assert main(words) == 2
    assert "cannot run /no/such/srun" in capsys.readouterr().err


def test_only_the_standard_library_waits_beside_the_training() -> None:
    code = (
        "import sys, sinkpretrain.supervise\n"
        "print([m for m in ('torch', 'numpy', 'yaml', 'jsonargparse', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
