"""Faults on a real Slurm cluster: nothing is lost, and what comes after training waits for a finished model.

One run goes through all of them and must end with the weights, moments and record of a run that nothing happened to.
SINKPRETRAIN_FAULTS=20 sends that many signals instead of a few and adds what happened to results/faults/slurm.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from data_factory import make_data
from slurm_cluster import ROOT, Cluster, kill, missing_programs
from test_train import same

from sinkpretrain import metrics
from sinkpretrain.checkpoint import newest_checkpoint
from sinkpretrain.load import step_of
from sinkpretrain.provenance import provenance

THOROUGH = int(os.environ.get("SINKPRETRAIN_FAULTS", "0"))
RECORD = ROOT / "results" / "faults" / "slurm.jsonl"

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(7200 if THOROUGH else 1800)]

SIGNALS_SENT = THOROUGH or 2
STEPS = 800 + 100 * SIGNALS_SENT
CHECKPOINT_EVERY = 50


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing_programs() and not os.environ.get("CI"):
        pytest.skip(f"not installed: {', '.join(missing_programs())}")
    cluster = Cluster(Path(f"/tmp/ms-{os.getpid()}/c"))
    if THOROUGH:
        RECORD.parent.mkdir(exist_ok=True)
        about = {"command": f"SINKPRETRAIN_FAULTS={THOROUGH} pytest tests/test_slurm.py", "cores": os.cpu_count()}
        RECORD.write_text(json.dumps(provenance("cpu") | about) + "\n")
    cluster.folder.parent.mkdir(mode=0o755)
    cluster.mount_full_disk()  # before the nodes' name spaces are made
    try:
        cluster.mini("start")
        yield cluster
    finally:
        cluster.mini("stop")
        cluster.call("umount", str(cluster.full))
        shutil.rmtree(cluster.folder.parent)


@pytest.fixture(scope="session")
def work(cluster: Cluster) -> Path:
    """A folder that the nodes see, with data and a recipe; its name has a space and a letter beyond ASCII."""
    work = cluster.folder.parent / "wörk space"
    work.mkdir()
    make_data(work / "data")
    settings = {
        "model": {"n_layer": 1, "d_model": 32, "n_head": 2, "context": 16},
        "data": {"path": str(work / "data"), "batch_size": 4, "validation_samples": 4},
        "optimizer": {"lr": 0.003, "min_lr": 0.0003},
        "training": {
            "steps": STEPS,
            "micro_batch": 2,
            "precision": "32-true",
            "accelerator": "cpu",
            "devices": 1,
            "nodes": 2,
        },
        "log": {
            "every": 10,
            "validate_every": 250,
            "probe_every": 0,
            "checkpoint_every": CHECKPOINT_EVERY,
            "weights_every": 0,
            "progress": False,
        },
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return work


NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60")
ONE = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60")


@dataclass
class Train:
    """A training job, or several one after the other, in one run directory."""

    cluster: Cluster
    run: Path
    log: Path
    job: str = ""
    faults: list[dict[str, object]] = field(default_factory=list)

    @classmethod
    def submit(cls, cluster: Cluster, work: Path, name: str, *flags: str, options: tuple[str, ...] = NODES) -> Train:
        train = cls(cluster, work / "runs" / name, work / f"{name}.log")
        train.job = train.send(*flags, options=options)
        return train

    def send(self, *flags: str, options: tuple[str, ...] = NODES) -> str:
        arguments = ["--config", str(self.log.parent / "recipe.yaml"), f"--out={self.run}", *flags]
        script = ROOT / "slurm" / "train.sbatch"
        return self.cluster.sbatch(script, *arguments, options=(*options, f"--output={self.log}"))

    def step(self) -> int:
        """The last step that is on record."""
        return max((x["step"] for x in metrics.read(self.run) if x["kind"] == "train"), default=0)

    def attempts(self) -> list[int]:
        """The step at which each process group that got so far began."""
        text = self.log.read_text() if self.log.is_file() else ""
        return [
            int(n.replace(",", "")) if n else 0
            for n in re.findall(r": (?:resuming at step ([\d,]+)|training) of", text)
        ]

    def wait_steps(self, more: int) -> None:
        """Until the current attempt has made this many steps."""
        begun = self.attempts()[-1] if self.attempts() else 0
        self.cluster.wait(lambda: "" if self.step() >= begun + more else self._alive(), f"{more} steps after {begun}")

    def _alive(self) -> None:
        assert self.cluster.state(self.job) in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING"), self.log.read_text()

    def wait_restart(self, name: str, before: int, attempts: int) -> None:
        """Until the next attempt has begun; takes note of what the fault cost."""
        self.cluster.wait(lambda: "" if len(self.attempts()) > attempts else None, f"a restart after {name}")
        at = self.attempts()[-1]
        self.note(name, before, at)

    def note(self, name: str, before: int, at: int) -> None:
        fault = {"fault": name, "at": before, "resumed_at": at, "lost": max(0, before - at)}
        self.faults.append(fault)
        if THOROUGH:
            with RECORD.open("a") as file:
                file.write(json.dumps(fault) + "\n")


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, work: Path) -> dict[str, Train]:
    """Jobs that do not disturb each other, started together because starting is what takes time."""
    (work / "experiment.yaml").write_text(
        yaml.safe_dump(
            {
                "out": str(work / "experiment"),
                "recipe": str(work / "recipe.yaml"),
                "variants": ["vanilla", "one-sink-token"],
                "settings": {"training.steps": 60, "log.validate_every": 0},
                "devices": 1,
                "gpus": False,
                "cpus": 1,
                "hours": 0.5,
                "attempts": 1,
                "array": True,
                "evaluate": {"tokens": str(work / "data"), "cache": "0+8,1+7", "hours": 0.5},
            }
        )
    )
    alone = ("--training.nodes=1",)
    full = Train(cluster, cluster.full / "run", work / "full.log")
    full.job = full.send(*alone, "--log.checkpoint-every=5", "--log.keep=1000", options=ONE)
    (work / "differing.sh").write_text(
        f"sinkpretrain train --config '{work}/recipe.yaml' --out '{work}/runs/differing' "
        "--optimizer.weight-decay 0.$SLURM_PROCID"
    )
    (work / "doctor.sh").write_text(
        f"sinkpretrain doctor --config '{work}/recipe.yaml' --out '{work}/runs/doctor' --model.context 64"
    )

    def srun(name: str) -> Train:
        wrapped = f"--wrap=srun --kill-on-bad-exit=1 bash '{work}/{name}.sh'"
        job = cluster.call("sbatch", "--parsable", *NODES, "--requeue", f"--output={work}/{name}.log", wrapped)
        return Train(cluster, work / "runs" / name, work / f"{name}.log", job)

    return {
        "undisturbed": Train.submit(cluster, work, "undisturbed"),
        "full": full,
        "limit": Train.submit(
            cluster, work, "limit", *alone, "--training.steps=100000", options=(*ONE, "--signal=USR1@90")
        ),
        "stalled": Train.submit(cluster, work, "stalled", "--training.stall-seconds=10", "--training.steps=100000"),
        "half": Train.submit(cluster, work, "half", *alone, "--training.steps=100000", options=ONE),
        "differing": srun("differing"),
        "doctor": srun("doctor"),
    }


def test_an_evaluation_never_starts_on_a_half_trained_model(cluster: Cluster, jobs: dict[str, Train]) -> None:
    """SIGTERM leaves a code that is not 0, and what waits for success is cancelled instead of waiting for ever."""
    train = jobs["half"]
    after = (f"--dependency=afterok:{train.job}", "--kill-on-invalid-dep=yes", "--output=/dev/null", *ONE)
    evaluation = cluster.sbatch(ROOT / "slurm" / "eval.sbatch", "stream", str(train.run), options=after)
    train.wait_steps(CHECKPOINT_EVERY + 20)
    kill(cluster.processes(str(train.run))[0])
    train.wait_restart("kill -9 of the only process", train.step(), 1)
    train.wait_steps(20)
    cluster.call("scancel", "--signal=TERM", train.job)
    assert cluster.wait_end(train.job) == "FAILED"
    assert cluster.job(train.job)["ExitCode"] == "143:0"
    assert newest_checkpoint(train.run) is not None
    assert cluster.wait_end(evaluation) == "CANCELLED"
    train.note("TERM to the job", train.step(), step_of(newest_checkpoint(train.run) or Path()))


def test_processes_with_other_settings_are_refused(cluster: Cluster, jobs: dict[str, Train]) -> None:
    train = jobs["differing"]
    assert cluster.wait_end(train.job) == "FAILED"
    assert "rank 1 on node2 differs from rank 0 on node1: setting optimizer.weight_decay" in train.log.read_text()
    assert train.step() == 0


def test_doctor_meets_all_processes(cluster: Cluster, jobs: dict[str, Train]) -> None:
    train = jobs["doctor"]
    assert cluster.wait_end(train.job) == "COMPLETED", train.log.read_text()
    text = train.log.read_text()
    assert "ok   hello: 2 processes on 2 nodes met at node1:" in text
    for name in ("same everywhere", "SLURM_NNODES", "SLURM_NTASKS", "time limit", "requeue: allowed", "attention"):
        assert f"ok   {name}" in text
    assert "FAIL" not in text
    assert not train.run.exists()


def test_a_stalled_rank_is_named_and_the_job_goes_on(cluster: Cluster, jobs: dict[str, Train]) -> None:
    train = jobs["stalled"]
    train.wait_steps(20)
    attempts = len(train.attempts())
    kill(cluster.processes(str(train.run))[1], signal.SIGSTOP)
    train.wait_restart("a process stands still", train.step(), attempts)
    cluster.call("scancel", train.job)
    text = train.log.read_text()
    assert "rank 0 has made no step for 10 s: rank 1 on node2 has not been heard from" in text
    assert re.search(rf"processes of job {train.job} were lost .* it goes back into the queue", text)


def test_a_run_stops_before_its_time_limit(cluster: Cluster, jobs: dict[str, Train]) -> None:
    train = jobs["limit"]
    train.wait_steps(20)
    # The limit comes near only now: in a minute or two, whatever the start took on a busy machine.
    ran = [int(n) for n in cluster.job(train.job)["RunTime"].split(":")]
    cluster.call("scontrol", "update", f"jobid={train.job}", f"timelimit={60 * ran[0] + ran[1] + 2}")
    cluster.wait(lambda: "" if len(train.attempts()) > 1 else None, "the job to come back")
    cluster.call("scancel", train.job)
    text = train.log.read_text()
    assert "SIGUSR1: finishing this step" in text
    assert f"job {train.job} is back in the queue" in text
    stopped = int(re.findall(r"stopped after step ([\d,]+)", text)[0].replace(",", ""))
    assert train.attempts()[1] == stopped >= 20
    train.note("time limit, --signal", stopped, train.attempts()[1])


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, jobs: dict[str, Train]) -> Path:
    train = jobs["undisturbed"]
    assert cluster.wait_end(train.job) == "COMPLETED", train.log.read_text()
    return train.run


def test_two_nodes_train_one_model(undisturbed: Path) -> None:
    lines = [x for x in metrics.read(undisturbed) if x["kind"] == "train"]
    assert [x["step"] for x in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    attempt = json.loads((undisturbed / "run.json").read_text())["attempts"][0]
    assert attempt["job"]


def test_a_full_disk_loses_nothing(cluster: Cluster, work: Path, jobs: dict[str, Train]) -> None:
    """The job ends with a sentence; with more space, the same command goes on from its last whole checkpoint."""
    train = jobs["full"]
    assert cluster.wait_end(train.job) == "FAILED"
    assert "the disk is full; free some space and give the same command again" in train.log.read_text()
    before = train.step()
    cluster.call("mount", "-o", "remount,size=64m", str(cluster.full))
    train.job = train.send("--training.nodes=1", "--training.steps=400", options=ONE)
    assert cluster.wait_end(train.job) == "COMPLETED", train.log.read_text()
    resumed = train.attempts()[-1]
    assert 0 < resumed <= before
    assert [x["step"] for x in metrics.read(train.run) if x["kind"] == "train"] == list(range(1, 401))
    train.note("disk full", before, resumed)


def test_an_array_of_variants_is_compared(cluster: Cluster, work: Path, jobs: dict[str, Train]) -> None:
    """`sinkpretrain submit`: two variants as an array, streaming evaluation of each, one comparison."""
    output = cluster.call("sinkpretrain", "submit", str(work / "experiment.yaml"))
    ids = {name: number for number, name in (line.split("\t") for line in output.splitlines())}
    assert list(ids) == ["sweep-1", "stream-vanilla", "stream-one-sink-token", "compare"]
    assert cluster.wait_end(ids["compare"]) == "COMPLETED"
    out = work / "experiment"
    assert "sink_tokens(n=1)" in (out / "comparison" / "table3.md").read_text()
    variants = ("vanilla", "one-sink-token")
    trained = {name: cluster.job(f"{ids['sweep-1']}_{task}") for task, name in enumerate(variants)}
    streamed = {name: cluster.job(ids[f"stream-{name}"]) for name in variants}
    # A stream waits for the training of its own variant, not for the whole array; the comparison for all streams.
    for name in variants:
        assert streamed[name]["StartTime"] >= trained[name]["EndTime"], name
    assert cluster.job(ids["compare"])["StartTime"] >= max(job["EndTime"] for job in streamed.values())


def test_one_run_survives_everything(cluster: Cluster, work: Path, undisturbed: Path) -> None:
    train = Train.submit(cluster, work, "disturbed", options=(*NODES, "--partition=main"))
    # What waits for its end, and must not take going back into the queue for one: a second attempt (in a partition
    # without grace), and what needs a finished model.
    first = train.job
    waits = "--kill-on-invalid-dep=yes"
    second = train.send(options=(*NODES, "--partition=low", f"--dependency=afterany:{first}", waits))
    finished = (f"--dependency=afterok:{second}", waits, "--output=/dev/null", "--wrap=true")
    evaluation = cluster.call("sbatch", "--parsable", *finished)
    chance = random.Random(7)

    def fault(name: str, strike: object, steps: int = 15) -> None:
        train.wait_steps(chance.randrange(steps, steps + 40))
        time.sleep(chance.random() / 4)
        attempts = len(train.attempts())
        strike()  # type: ignore[operator]
        # Until the next attempt is there, the record has the steps that it will compute again.
        train.wait_restart(name, train.step(), attempts)

    for _ in range(SIGNALS_SENT):
        fault("USR1 to all processes", lambda: cluster.call("scancel", "--signal=USR1", train.job))
    fault("USR1 to one of two processes", lambda: kill(cluster.processes(str(train.run))[1], signal.SIGUSR1))
    fault("USR1, then TERM at once", lambda: _signals(cluster, train, "USR1", "TERM"))
    fault("scontrol requeue", lambda: cluster.call("scontrol", "requeue", train.job))
    fault("preemption with grace", lambda: _preempt(cluster, train))
    fault("newest checkpoint cut in half", lambda: _cut(cluster, train), steps=CHECKPOINT_EVERY + 20)

    fault("kill -9 of rank 0 of two", lambda: kill(cluster.processes(str(train.run))[0]))
    if THOROUGH:
        fault("kill -9 of rank 1 of two", lambda: kill(cluster.processes(str(train.run))[1]))

    # SIGTERM ends the job for good: the next attempt goes on.
    assert cluster.state(second) == "PENDING"

    def end_first() -> None:
        cluster.call("scancel", "--signal=TERM", first)
        train.job = second

    fault("TERM, and the next of the attempts", end_first)
    assert cluster.state(first) == "FAILED"
    fault("preemption without grace", lambda: _preempt(cluster, train))
    fault("a node's power cut", lambda: _power_cut(cluster, 2))
    fault("power cut of the node with the job script", lambda: _power_cut(cluster, 1))
    assert cluster.wait_end(train.job) == "COMPLETED", train.log.read_text()
    assert cluster.wait_end(evaluation) == "COMPLETED"
    assert cluster.job(evaluation)["StartTime"] >= cluster.job(second)["EndTime"]

    assert same(train.run, undisturbed, STEPS)
    graceful = [f for f in train.faults if not _violent(str(f["fault"]))]
    assert all(f["lost"] == 0 for f in graceful), train.faults
    # At most what lies between two checkpoints (two of them where one was cut), and what was not yet on record.
    assert all(int(str(f["lost"])) <= 2 * CHECKPOINT_EVERY for f in train.faults), train.faults


def _violent(fault: str) -> bool:
    return fault.startswith(("newest", "kill", "preemption without", "a node", "power"))


def _signals(cluster: Cluster, train: Train, *names: str) -> None:
    for name in names:
        cluster.call("scancel", f"--signal={name}", train.job)


def _preempt(cluster: Cluster, train: Train) -> None:
    """A job of a partition that goes first needs both nodes for a moment."""
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    high = cluster.call("sbatch", "--parsable", *options, "--wrap=sleep 1")
    assert cluster.wait_end(high) == "COMPLETED"


def _cut(cluster: Cluster, train: Train) -> None:
    """Stop it; while it waits in the queue, half of its newest checkpoint goes."""
    cluster.call("scancel", "--signal=USR1", train.job)
    cluster.wait_state(train.job, "PENDING")
    newest = newest_checkpoint(train.run)
    assert newest is not None
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])


def _power_cut(cluster: Cluster, node: int) -> None:
    """Everything on a node is gone at once; it comes back when Slurm has noticed."""
    cluster.mini("kill-node", str(node))
    down = ("sinfo", "-h", "-n", f"node{node}", "-o", "%T")
    cluster.wait(lambda: "" if "down" in cluster.call(*down) else None, f"node{node} to be down")
    cluster.mini("start-node", str(node))
