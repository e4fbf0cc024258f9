"""Checkpoints: every damage is seen, nothing in them runs, and what is deleted is theirs."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkpretrain import checkpoint as checkpoint_module
from sinkpretrain import files, load
from sinkpretrain.checkpoint import (
    AtomicCheckpointIO,
    BackgroundWriter,
    checkpoint_path,
    clear_leftovers,
    newest_checkpoint,
    prune_checkpoints,
    verify,
    write_checkpoint,
)
from sinkpretrain.errors import UserError
from sinkpretrain.load import METADATA_KEY, NewerVersionError, load_model, numbered, read_checkpoint, step_of


def content(value: float = 0.0) -> dict[str, Any]:
    return {"state_dict": {"model.w": torch.full((1000,), float(value))}, METADATA_KEY: {"version": 1}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        write_checkpoint(content(step), checkpoint_path(tmp_path, step))
    return tmp_path


def test_the_newest_whole_one_is_found_and_pointed_to(run: Path) -> None:
    assert newest_checkpoint(run) == checkpoint_path(run, 3)
    assert json.loads((run / "checkpoints" / "newest.json").read_text())["file"] == "step-0000003.ckpt"
    assert newest_checkpoint(run / "elsewhere") is None


def test_one_flipped_bit_anywhere_in_the_data_is_seen(run: Path) -> None:
    """torch.load alone reads such a file without a word: the control."""
    path = checkpoint_path(run, 3)
    whole = path.read_bytes()
    place = whole.index(torch.full((1000,), 3.0).numpy().tobytes()) + 1234
    damaged = bytearray(whole)
    damaged[place] ^= 4
    path.write_bytes(damaged)
    torch.load(path, weights_only=True)
    with pytest.raises(UserError, match="checksum"):
        verify(path)
    with pytest.warns(UserWarning, match=r"checksum.*using the one before it"):
        assert newest_checkpoint(run) == checkpoint_path(run, 2)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_passed_over(run: Path, share: float) -> None:
    path = checkpoint_path(run, 3)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.warns(UserWarning, match="using the one before it"):
        assert newest_checkpoint(run) == checkpoint_path(run, 2)


def test_a_missing_newest_one_is_said(run: Path) -> None:
    checkpoint_path(run, 3).unlink()
    with pytest.warns(UserWarning, match=r"step-0000003\.ckpt is missing"):
        assert newest_checkpoint(run) == checkpoint_path(run, 2)


def test_when_none_is_whole_a_person_decides(run: Path) -> None:
    for step in (1, 2, 3):
        checkpoint_path(run, step).write_bytes(b"x")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        newest_checkpoint(run)


def test_a_newer_version_is_refused_not_passed_over(run: Path) -> None:
    write_checkpoint(content() | {METADATA_KEY: {"version": 1}}, checkpoint_path(run, 4))
    old = load.CHECKPOINT_VERSION
    try:
        load.CHECKPOINT_VERSION = 0  # as an older program would see it
        with pytest.raises(NewerVersionError, match=r"newer sinkpretrain .format 1, this one reads up to 0"):
            newest_checkpoint(run)
    finally:
        load.CHECKPOINT_VERSION = old


class Code:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", checkpoint_path(tmp_path, 7)
    path.parent.mkdir()
    torch.save(content() | {"evil": Code(proof)}, path)
    for read in (read_checkpoint, load_model, lambda p: AtomicCheckpointIO(BackgroundWriter()).load_checkpoint(p)):
        with pytest.raises(UserError, match="could run code") as caught:
            read(path)
        assert "weights_only" not in str(caught.value)  # torch's own message says how to run it
    path.write_bytes(pickle.dumps(Code(proof)))
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(path)
    assert not proof.exists()
    torch.load(_saved(content() | {"evil": Code(proof)}, path), weights_only=False)
    assert proof.exists()  # the control: it would have run


def _saved(data: Any, path: Path) -> Path:
    torch.save(data, path)
    return path


def test_pruning_keeps_the_newest_and_the_log_spaced_and_touches_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in range(10, 200, 10):
        checkpoint_path(tmp_path, step).touch()
    for name in ("step-best.ckpt", "step-0000010.ckpt.bak", "notes.txt"):
        (folder / name).touch()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "step-0000001.ckpt").touch()
    (folder / "link").symlink_to(outside)
    prune_checkpoints(tmp_path, keep=3, doubling=10)
    assert [step_of(p) for p in numbered(folder, ".ckpt")] == [10, 20, 40, 80, 160, 170, 180, 190]
    prune_checkpoints(tmp_path, keep=2)
    assert [step_of(p) for p in numbered(folder, ".ckpt")] == [180, 190]
    assert {"step-best.ckpt", "step-0000010.ckpt.bak", "notes.txt", "link"} <= {p.name for p in folder.iterdir()}
    assert (outside / "step-0000001.ckpt").exists()


def test_leftovers_of_a_killed_process_are_cleared(run: Path) -> None:
    left = run / "checkpoints" / ".step-0000004.ckpt.4711.tmp"
    mine = run / "checkpoints" / "mine.tmp"
    left.touch()
    mine.touch()
    clear_leftovers(run)
    assert not left.exists()
    assert mine.exists()


# --- beside the training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", ["before", "_leave_cache", "verify", "read_checkpoint", "sync_folder", "put in place"]
)
def test_a_run_moved_while_a_checkpoint_is_written(moment: str, tmp_path: Path, monkeypatch) -> None:
    """Told as that, not as a damaged file or a traceback; and nothing is made in the old place."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)

    def move() -> None:
        if run.exists():
            run.rename(tmp_path / "moved")

    if moment == "before":
        move()
    else:
        where = files if moment == "sync_folder" else checkpoint_module
        name = "write_atomically" if moment == "put in place" else moment
        real = getattr(where, name)

        def moved(*given: Any, **how: Any) -> Any:
            if name == moment:
                move()
            result = real(*given, **how)
            move()
            return result

        monkeypatch.setattr(where, name, moved)
    writer, path = BackgroundWriter(), checkpoint_path(run, 4)
    writer.submit(path, lambda: write_checkpoint(content(), path))
    with pytest.raises(UserError, match=r"its folder was moved or deleted meanwhile; put it back"):
        writer.finish()
    assert not run.exists()


def test_writing_happens_elsewhere_in_order(tmp_path: Path) -> None:
    writer, gate, seen = BackgroundWriter(), threading.Event(), []

    def write(name: str) -> None:
        gate.wait(10)
        seen.append((name, threading.current_thread() is threading.main_thread()))
        (tmp_path / name).write_text(name)

    for name in ("a", "b"):
        writer.submit(tmp_path / name, lambda name=name: write(name))
    assert seen == []
    gate.set()
    writer.finish()
    assert seen == [("a", False), ("b", False)]
    assert [w.path.name for w in writer.take_written()] == ["a", "b"]
    assert writer.take_written() == []


def test_an_error_is_raised_later_and_nothing_after_it_is_written(tmp_path: Path) -> None:
    writer = BackgroundWriter()

    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.submit(tmp_path / "a", fail)
    writer.submit(tmp_path / "b", lambda: (tmp_path / "b").write_text("b"))
    with pytest.raises(UserError, match="the disk is full"):
        writer.finish()
    assert not (tmp_path / "b").exists()
    writer.submit(tmp_path / "c", lambda: (tmp_path / "c").write_text("c"))
    writer.finish()
    assert (tmp_path / "c").exists()


def test_a_checkpoint_holds_what_was_there_when_it_was_taken(tmp_path: Path) -> None:
    writer, gate = BackgroundWriter(), threading.Event()
    writer.submit(tmp_path / "first", lambda: (gate.wait(10), (tmp_path / "first").touch()))
    state = content(1.0)
    AtomicCheckpointIO(writer).save_checkpoint(state, checkpoint_path(tmp_path, 1))
    state["state_dict"]["model.w"].fill_(2.0)
    gate.set()
    writer.finish()
    assert read_checkpoint(checkpoint_path(tmp_path, 1))["state_dict"]["model.w"].eq(1.0).all()
