"""``submit --local``: the whole chain on this machine, interrupted and given again."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from data_factory import make_data
from test_train import TOLD

from sinkpretrain.attempts import saved_step
from sinkpretrain.cli import main
from sinkpretrain.errors import UserError
from sinkpretrain.experiment import Experiment, load_experiment
from sinkpretrain.files import exclusive
from sinkpretrain.local import Machine, gpu_shares
from sinkpretrain.metrics import read

STEPS = 60


@pytest.fixture
def file(tmp_path: Path) -> Path:
    recipe = {
        "model": {"n_layer": 1, "d_model": 32, "n_head": 2, "context": 16},
        "data": {"path": str(make_data(tmp_path / "data")), "batch_size": 4, "validation_samples": 4},
        "training": {"steps": STEPS, "precision": "32-true", "accelerator": "cpu"},
        "log": {"every": 1, "validate_every": 0, "probe_every": 0, "progress": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    experiment = {
        "out": str(tmp_path / "my experiment"),
        "recipe": str(tmp_path / "recipe.yaml"),
        "variants": ["vanilla", "one-sink-token"],
        "devices": 1,
        "gpus": False,
        "at_once": 2,
        "attempts": 1,
        "evaluate": {"tokens": str(tmp_path / "data"), "cache": "0+8,1+7"},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


def command(file: Path) -> list[str]:
    return [sys.executable, "-m", "sinkpretrain", "submit", str(file), "--local"]


def start(file: Path, before: Sequence[str] = ()) -> tuple[subprocess.Popen[str], list[Path]]:
    """The experiment with runs that do not end by themselves, both of them training."""
    slow = yaml.safe_load(file.read_text()) | {"settings": {"training.steps": 10**6}}
    file.write_text(yaml.safe_dump(slow))
    process = subprocess.Popen([*before, *command(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = [Path(load_experiment(file).out) / "runs" / name for name in ("vanilla", "one-sink-token")]
    deadline = time.monotonic() + 120
    while not all((run / "metrics.jsonl").is_file() and len(list(read(run))) > 5 for run in runs):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process, runs


def test_a_closed_terminal_ends_all_runs_with_checkpoints(file: Path) -> None:
    """They are in sessions of their own: nobody else would tell them."""
    process, runs = start(file, TOLD)
    assert process.stdout is not None
    process.stdout.close()  # nobody reads what is printed either
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    for run in runs:
        last = max(x["step"] for x in read(run) if x["kind"] == "train")
        assert saved_step(run) == last
        with exclusive(run / "lock", "it still trains", patience=0):
            pass


def test_interrupted_and_given_again(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, words = Path(load_experiment(file).out), command(file)
    process, runs = start(file)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, text
    assert "the same command goes on" in text
    assert not (out / "comparison").exists()
    stopped = [max(x["step"] for x in read(run) if x["kind"] == "train") for run in runs]

    more = max(stopped) + 20
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"settings": {"training.steps": more}}))
    assert subprocess.run(words, check=False).returncode == 0, capfd.readouterr()
    for run in runs:
        steps = [x["step"] for x in read(run) if x["kind"] == "train"]
        assert steps == list(range(1, more + 1))
    assert "sink_tokens(n=1)" in (out / "comparison" / "table3.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("nll.npy")}
    assert len(before) == 4
    assert main(["submit", str(file), "--local"]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("nll.npy")} == before


def test_a_failed_run_is_said_and_does_not_stop_the_other(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    experiment = load_experiment(file)
    blocked = Path(experiment.out) / "runs" / "vanilla"
    blocked.mkdir(parents=True)
    (blocked / "something else").touch()
    assert main(["submit", str(file), "--local"]) == 1
    shown = capfd.readouterr()
    assert "train-vanilla: failed (sinkpretrain train: " in shown.err
    assert "stream-one-sink-token: done" in shown.out
    results = Path(experiment.out) / "results"
    assert list(json.loads((results / "one-sink-token" / "results.json").read_text())["settings"]) == ["0+8", "1+7"]
    assert not (results / "vanilla").exists()
    assert not (Path(experiment.out) / "comparison").exists()


def test_lines_of_two_runs_do_not_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        """Where another thread gets its turn after every write."""

        def write(self, text: str) -> int:
            count = super().write(text)
            time.sleep(0.2)
            return count

    terminal, machine = Terminal(), Machine(tmp_path / "logs")
    monkeypatch.setattr(sys, "stdout", terminal)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda name: machine.call(name, ["--version"], None), ["one", "two"]))
    lines = sorted(terminal.getvalue().splitlines())
    names = [re.fullmatch(r"(one|two): (see .*\.log|done in \d+ s)", line) for line in lines]
    assert [name and name.group(1) for name in names] == ["one", "one", "two", "two"], lines


def test_dry_run_prints_a_script(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(file), "--local", "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines[1:]] == ["train", "stream", "train", "stream", "compare"]
    assert not Path(load_experiment(file).out).exists()


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    four = Experiment(variants=["a", "b", "c", "d"], devices=1)
    two = Experiment(variants=["a", "b", "c", "d"], devices=2)
    assert gpu_shares(four, 2) == ["0", "1"]
    assert gpu_shares(Experiment(variants=["a", "b", "c", "d"], devices=1, at_once=4), 2) == ["0", "1", "0", "1"]
    assert gpu_shares(two, 5) == ["0,1", "2,3"]
    assert gpu_shares(Experiment(variants=["a", "b"], devices=2, gpus=False), 0) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert gpu_shares(four, 2) == ["3", "5"]
    with pytest.raises(UserError, match="has 2 GPUs, fewer than the 8"):
        gpu_shares(Experiment(variants=["a"]), 2)
    with pytest.raises(UserError, match="nodes is 2"):
        gpu_shares(Experiment(variants=["a"], nodes=2), 8)
