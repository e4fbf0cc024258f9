"""What goes wrong around a run: data edited under it, disks that are full, slow or read-only, strange paths."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import refusal
from data_factory import make_data
from test_train import STEPS, config, record, same

from sinkpretrain import checkpoint, lit, metrics
from sinkpretrain.cli import main
from sinkpretrain.config import RunConfig, save_yaml
from sinkpretrain.errors import UserError
from sinkpretrain.signals import PROCESS
from sinkpretrain.train import train

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("bad") / "dätä with spaces")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "rün with spaces"
    assert train(config(data, run)).finished
    return run


# --- data that change ---------------------------------------------------------------------------------------------


def after_step(step: int, act: Any) -> Any:
    original = lit.PretrainModule.on_train_batch_end

    def hook(self: lit.PretrainModule, *args: Any) -> None:
        original(self, *args)
        if self.global_step == step:
            act()

    return hook


@pytest.mark.parametrize("edit", ["a byte", "cut short", "replaced"])
def test_data_edited_under_a_run_stop_it(edit: str, undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    data = make_data(tmp_path / "data")
    path = data / "train.bin"
    whole = path.read_bytes()
    run = config(data, tmp_path / "run", steps=40)
    run = dataclasses.replace(run, log=dataclasses.replace(run.log, checkpoint_every=2))

    def act() -> None:
        if edit == "a byte":
            with path.open("r+b") as file:
                file.write(b"x")
        elif edit == "cut short":
            os.truncate(path, len(whole) // 2)
        else:
            path.with_suffix(".new").write_bytes(whole[:-2] + b"xx")
            path.with_suffix(".new").rename(path)

    with monkeypatch.context() as m:
        m.setattr(lit.PretrainModule, "on_train_batch_end", after_step(5, act))
        with pytest.raises(UserError, match=r"train\.bin was changed while it was being read"):
            train(run)
    with pytest.raises(UserError, match=r"train.bin has (changed since|\d+ bytes but)"):
        train(run)  # it is still not what was prepared
    path.write_bytes(whole)
    assert train(run).finished
    reference = dataclasses.replace(run, out=str(tmp_path / "reference"))
    train(reference)
    assert same(tmp_path / "run", tmp_path / "reference", 40)


def test_a_moved_copy_goes_on(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copy)  # new times
    shutil.copytree(undisturbed, tmp_path / "run")
    assert train(config(tmp_path / "copy", tmp_path / "run", steps=STEPS + 2)).finished


# --- disks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(disk)], check=True)
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _problem(run: RunConfig) -> str | None:
    """The sentence with which a run ends on a full disk; None if it got to its end."""
    try:
        return None if train(run).finished else "not finished"
    except UserError as error:
        text = str(error)
    return text if "the disk is full" in text or "No space left" in text else pytest.fail(text)


@needs_root
def test_a_disk_full_at_any_moment_loses_nothing(small_disk: Path, data: Path, undisturbed: Path) -> None:
    """It fills up at the lock, the configuration, the metrics, the weights, a checkpoint: one sentence each time, and
    with a little more space the same command goes on."""
    run, seen = small_disk / "run", set()
    for pages in (1, 2, 3, 4, 5, 6, 8, 20, 60, 100, 150, 200, 260, 330, 450, 600, 1000, 4000):
        subprocess.run(["mount", "-o", f"remount,size={4 * pages}k", str(small_disk)], check=True)
        problem = _problem(config(data, run))
        if problem is None:
            break
        seen.add(problem.partition(": the disk is full")[0].rpartition(".")[2])
    assert same(run, undisturbed)
    assert {"ckpt", "safetensors"} <= seen
    assert not list(run.rglob(".*.tmp"))


@needs_root
def test_read_only_data_will_do(data: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "--bind", str(data), str(data)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(data)], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (data / "x").touch()
        assert train(config(data, tmp_path / "run", steps=2)).finished
        with pytest.raises(UserError, match="cannot make the run directory"):
            train(config(data, data / "run", steps=2))
    finally:
        subprocess.run(["umount", "-l", str(data)], check=True)


def test_a_slow_disk_does_not_hold_the_training_up(data: Path, undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    """Writing a checkpoint takes half a second here; the steps behind it do not wait."""
    write = checkpoint.write_checkpoint
    ended: list[int] = []

    def slow(content: dict[str, Any], path: Path) -> None:
        time.sleep(0.5)
        write(content, path)
        ended.append(max(x["step"] for x in metrics.read(tmp_path / "run") if x["kind"] == "train"))

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    run = config(data, tmp_path / "run")
    train(dataclasses.replace(run, log=dataclasses.replace(run.log, every=1)))
    assert ended[0] > 6
    lines = [x for x in metrics.read(tmp_path / "run") if x["kind"] == "checkpoint" and x["file"].endswith("ckpt")]
    assert all(x["write_seconds"] > 0.5 for x in lines)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--training.steps=many", "--training.steps must be int, not 'many'"),
        ("--training.stop-margin=soon", "--training.stop-margin must be float, not 'soon'"),
        ("--training.precision=fp4", "--training.precision must be one of"),
        ("--log.keep-doubling=2", "--log.keep-doubling must be bool, not '2'"),
        ("--optimizer.lr=[1,2]", "--optimizer.lr must be float"),
    ],
)
def test_values_of_the_wrong_type_are_named(flag: str, sentence: str, tmp_path: Path, capsys) -> None:
    assert sentence in refusal(["train", "--data.path=x", f"--out={tmp_path / 'out'}", flag], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--training.steps=-3", "training.steps must be at least 1, not -3"),
        ("--training.nodes=0", "training.nodes must be at least 1, not 0"),
        ("--training.devices=-2", "training.devices must be at least 0, not -2"),
        ("--data.batch-size=0", "data.batch_size must be at least 1, not 0"),
        ("--data.seed=-1", "data.seed must be at least 0, not -1"),
        ("--model.context=1", "model.context must be at least 2, not 1"),
        ("--optimizer.lr=-0.1", "optimizer.lr must be at least 0, not -0.1"),
        ("--optimizer.beta1=1.5", "optimizer.beta1 must be below 1, not 1.5"),
        ("--optimizer.warmup=2", "optimizer.warmup must be below 1, not 2.0"),
        ("--log.checkpoint-every=-5", "log.checkpoint_every must be at least 0, not -5"),
        ("--optimizer.lr=1e-5", "optimizer.min_lr 0.0003 is above optimizer.lr 1e-05; lower it"),
        ("--training.nodes=2", "training.nodes is 2, but nothing started this command on several nodes"),
    ],
)
def test_a_number_that_cannot_be_is_refused_and_the_next_try_starts_afresh(
    flag: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    save_yaml(config(data, tmp_path / "run", steps=2), recipe)
    assert message in refusal(["train", "--config", str(recipe), flag], capsys)
    assert main(["train", "--config", str(recipe), "--data.seed=5"]) == 0


def test_a_second_ctrl_c_says_what_a_restart_goes_on_from(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = tmp_path / "recipe.yaml"
    save_yaml(config(data, tmp_path / "run"), recipe)

    def twice() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(lit.PretrainModule, "on_train_batch_end", after_step(8, twice))
    monkeypatch.setattr(PROCESS, "signal", None)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(["train", "--config", str(recipe)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    assert "stopped without saving; the same command goes on from step 6." in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", "--config", str(recipe)]) == 0
    assert [x["step"] for x in record(tmp_path / "run") if x["kind"] == "train"] == list(range(1, STEPS + 1))


def test_strange_paths_work(undisturbed: Path) -> None:
    assert [x["step"] for x in record(undisturbed) if x["kind"] == "train"] == list(range(1, STEPS + 1))


def test_two_processes_cannot_share_a_run(data: Path, tmp_path: Path, monkeypatch) -> None:
    from sinkpretrain import files, run_directory

    quick = lambda path, text: files.exclusive(path, text, patience=0.3)  # noqa: E731
    monkeypatch.setattr(run_directory, "exclusive", quick)
    run = config(data, tmp_path / "run", steps=3)

    def again() -> None:
        with pytest.raises(UserError, match=r"is in use by another process \(process \d+ on"):
            train(run)

    with monkeypatch.context() as m:
        m.setattr(lit.PretrainModule, "on_train_batch_end", after_step(2, again))
        assert train(run).finished
    assert train(run).finished
