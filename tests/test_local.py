"""``submit --local``: the whole chain on this machine, interrupted and given again."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from data_factory import make_data

from sinkpretrain.cli import main
from sinkpretrain.errors import UserError
from sinkpretrain.experiment import Experiment, load_experiment
from sinkpretrain.local import gpu_shares
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


def test_interrupted_and_given_again(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = Path(load_experiment(file).out)
    words = [sys.executable, "-m", "sinkpretrain", "submit", str(file), "--local"]
    slow = yaml.safe_load(file.read_text()) | {"settings": {"training.steps": 10**6}}
    file.write_text(yaml.safe_dump(slow))
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    runs = [out / "runs" / name for name in ("vanilla", "one-sink-token")]
    deadline = time.monotonic() + 120
    while not all((run / "metrics.jsonl").is_file() and len(list(read(run))) > 5 for run in runs):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, text
    assert "the same command goes on" in text
    assert not (out / "comparison").exists()
    stopped = [max(x["step"] for x in read(run) if x["kind"] == "train") for run in runs]

    more = max(stopped) + 20
    file.write_text(yaml.safe_dump(slow | {"settings": {"training.steps": more}}))
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
