"""What goes wrong around a run: data edited under it, disks that are full, slow or read-only, strange paths."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_factory import make_data
from test_train import STEPS, config, record, same

from sinkpretrain import checkpoint, lit, metrics
from sinkpretrain.cli import main
from sinkpretrain.config import RunConfig
from sinkpretrain.errors import UserError
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
    assert main(["train", "--data.path=x", f"--out={tmp_path / 'out'}", flag]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


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
