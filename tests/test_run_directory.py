"""The run directory: what was lost from it is said, what lies in it belongs to one configuration and its data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_factory import make_data
from test_bad_input import after_step
from test_train import STEPS, config, same, stop_after

from sinkpretrain import attempts, lit, run_directory
from sinkpretrain.config import RunConfig
from sinkpretrain.errors import UserError
from sinkpretrain.train import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("directory") / "data")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(config(data, run)).finished
    return run


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 8, with checkpoints at steps 6 and 8."""
    run = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(8, patch)
        assert not train(config(data, run)).finished
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


# --- the record ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut in a line", "gone", "a line of a validation", "bytes that are no text"])
def test_a_record_that_lacks_lines_is_not_gone_on_with(damage: str, data: Path, run: Path) -> None:
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert b"validation" in lines[0]
    whole = b"".join(lines)
    damaged = {
        "cut in a line": whole[: len(whole) // 2],
        "gone": b"",
        "a line of a validation": b"".join(lines[1:]),
        "bytes that are no text": whole.replace(b'"validation"', b'"val\xff\x00tion', 1),
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"metrics\.jsonl has \d+ of the 12 lines .* up to step 8, from which"):
        train(config(data, run))
    assert file.read_bytes() == damaged[damage]
    assert train(config(data, run), allow_changes=True).finished


def test_checkpoints_ahead_of_the_record_can_be_given_up(data: Path, run: Path, undisturbed: Path) -> None:
    """A copy made while the run went on: the record first, the checkpoints when there were more of them."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["step"] < 8))
    with pytest.raises(UserError, match="delete the checkpoints that are ahead of it"):
        train(config(data, run))
    (run / "checkpoints" / "step-0000008.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"step-0000008\.ckpt is missing"):
        assert train(config(data, run)).finished
    assert same(run, undisturbed)


def test_what_is_no_line_is_passed_over(data: Path, run: Path, undisturbed: Path) -> None:
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'17\n"x"\n{}\n\xff\xfe\x00\n{"kind": "train", "st')
    assert train(config(data, run)).finished
    assert same(run, undisturbed)


# --- whose it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{}", "null", '{"data": 3}', None])
def test_a_damaged_run_json_is_one_sentence_with_a_way_out(
    content: str | None, data: Path, run: Path, undisturbed: Path
) -> None:
    if content is None:
        (run / "run.json").unlink()
    else:
        (run / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json, which says what data .* is damaged or gone; restore it, or give"):
        train(config(data, run))
    with pytest.warns(UserWarning, match="goes on with changes"):
        assert train(config(data, run), allow_changes=True).finished
    assert same(run, undisturbed)
    assert json.loads((run / "run.json").read_text())["wandb_id"]


def test_a_missing_config_yaml_is_said_with_a_way_out(data: Path, run: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The way out is one: another --out gets the same file."""
    weights = Path(shutil.copytree(run / "weights", tmp_path / "weights alone" / "weights")).parent
    (run / "config.yaml").unlink()
    for folder in (run, weights):
        with pytest.raises(UserError, match=r"is a run whose config\.yaml, .* is missing; restore it \(the one that"):
            train(config(data, folder))
    assert train(config(data, tmp_path / "another")).finished
    shutil.copyfile(tmp_path / "another" / "config.yaml", run / "config.yaml")
    assert train(config(data, run)).finished
    assert same(run, undisturbed)


def test_a_missing_tokenizer_is_put_back(data: Path, run: Path) -> None:
    mine, tokenizer = run / "tokenizer.json", (data / "tokenizer.json").read_bytes()
    mine.unlink()
    assert train(config(data, run)).finished
    assert mine.read_bytes() == tokenizer
    mine.unlink()
    assert train(config(data, run)).finished  # nothing is left to train
    assert mine.read_bytes() == tokenizer


def test_a_directory_is_looked_at_again_when_another_process_had_it(data: Path, tmp_path: Path, monkeypatch) -> None:
    """Two commands with different settings name one new directory; the first is done while the second waits."""
    exclusive, first = run_directory.exclusive, config(data, tmp_path / "run")
    second = dataclasses.replace(first, optimizer=dataclasses.replace(first.optimizer, lr=1e-3))

    def after_the_other(*arguments: Any) -> contextlib.AbstractContextManager[None]:
        monkeypatch.setattr(run_directory, "exclusive", exclusive)
        assert train(first).finished
        return exclusive(*arguments)

    monkeypatch.setattr(run_directory, "exclusive", after_the_other)
    with pytest.raises(UserError, match=r"belongs to another configuration: optimizer\.lr"):
        train(second)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(about["attempts"]) == 1
    assert "lr: 0.003" in (tmp_path / "run" / "config.yaml").read_text()


# --- data for validation ------------------------------------------------------------------------------------------


def with_validation(base: RunConfig, path: Path | str) -> RunConfig:
    return dataclasses.replace(base, data=dataclasses.replace(base.data, validation_path=str(path)))


def other_text(data: Path, folder: Path) -> Path:
    """Prepared with the same tokenizer."""
    return make_data(folder, seed=5, tokenizer=(data / "tokenizer.json").read_text())


@pytest.mark.parametrize("change", ["its bytes", "gone", "another path"])
def test_other_data_for_validation_are_refused(change: str, data: Path, run: Path, tmp_path: Path) -> None:
    """They are as long as those before, so nothing but their content tells."""
    mine, other = Path(shutil.copytree(data, tmp_path / "data")), other_text(data, tmp_path / "other")
    setting, sentence = config(mine, run), r"trained on other data \(validation_sha256"
    if change == "its bytes":
        shutil.copyfile(other / "validation.bin", mine / "validation.bin")
        sentence = r"validation\.bin has changed since it was prepared"
    elif change == "gone":
        for suffix in ("bin", "idx"):
            (mine / f"validation.{suffix}").unlink()
    else:
        setting = with_validation(setting, other / "validation")
    with pytest.raises(UserError, match=sentence):
        train(setting)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_replaced_between_attempts_are_found_out_whatever_their_time(
    split: str, data: Path, tmp_path: Path, monkeypatch
) -> None:
    """``cp -p`` and ``rsync -t`` bring the time along; the manifest is that of the data before."""
    mine, other = Path(shutil.copytree(data, tmp_path / "data")), make_data(tmp_path / "other", seed=5)
    run = config(mine, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        train(run)
    before = (mine / f"{split}.bin").stat()
    os.utime(other / f"{split}.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.copy2(other / f"{split}.bin", mine / f"{split}.bin")
    assert (mine / f"{split}.bin").stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(UserError, match=rf"{split}\.bin has changed since it was prepared"):
        train(run)
    shutil.copy2(data / f"{split}.bin", mine / f"{split}.bin")
    assert train(run).finished


def test_a_run_whose_record_knows_less_of_its_data_goes_on(data: Path, run: Path, undisturbed: Path) -> None:
    """Made before the time of the last change was kept: the files are read once."""
    about = json.loads((run / "run.json").read_text())
    about["stamps"] = {split: stamp[:2] for split, stamp in about["stamps"].items()}
    (run / "run.json").write_text(json.dumps(about))
    assert train(config(data, run)).finished
    assert same(run, undisturbed)
    assert [len(stamp) for stamp in json.loads((run / "run.json").read_text())["stamps"].values()] == [3, 3]


def test_data_for_validation_from_elsewhere_are_known_by_their_content(data: Path, tmp_path: Path, monkeypatch) -> None:
    """Also where the manifest of the training data knows of no validation split."""
    mine, elsewhere = Path(shutil.copytree(data, tmp_path / "data")), other_text(data, tmp_path / "other")
    for suffix in ("bin", "idx"):
        (mine / f"validation.{suffix}").unlink()
    manifest = json.loads((mine / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    (mine / "manifest.json").write_text(json.dumps(manifest))
    run = config(mine, tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        assert not train(with_validation(run, elsewhere / "validation")).finished
    with pytest.raises(UserError, match="validation_fingerprint"):
        train(with_validation(run, data / "validation"))
    moved = shutil.copytree(elsewhere, tmp_path / "moved")
    assert train(with_validation(run, Path(moved) / "validation")).finished


def test_data_for_validation_cut_under_a_run_stop_it(tmp_path: Path, monkeypatch) -> None:
    data = make_data(tmp_path / "data")

    def cut() -> None:
        os.truncate(data / "validation.bin", 10)

    monkeypatch.setattr(lit.PretrainModule, "on_train_batch_end", after_step(4, cut))
    with pytest.raises(UserError, match=r"validation\.bin was changed while it was being read"):
        train(config(data, tmp_path / "run"))


# --- its place ----------------------------------------------------------------------------------------------------


def test_a_directory_moved_under_its_run(data: Path, tmp_path: Path, undisturbed: Path, monkeypatch) -> None:
    """One sentence; in its new place the run goes on exactly, and nothing is left in the old one."""
    old, new = tmp_path / "old", tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(lit.PretrainModule, "on_train_batch_end", after_step(7, lambda: old.rename(new)))
        with pytest.raises(UserError, match=r"its folder was moved or deleted meanwhile; put it back"):
            train(config(data, old))
    assert not old.exists()
    assert train(config(data, new)).finished
    assert same(new, undisturbed)


def test_why_a_run_stops_is_said_also_where_nothing_can_be_noted(data: Path, tmp_path: Path, monkeypatch) -> None:
    """A disk that became read-only: the file that tells of an open attempt stays, and is not what is said."""

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system", "attempt.json")

    def disk() -> None:
        monkeypatch.setattr(attempts, "end", refuse)
        raise UserError("cannot write metrics.jsonl")

    monkeypatch.setattr(lit.PretrainModule, "on_train_batch_end", after_step(STEPS // 2, disk))
    with pytest.raises(UserError, match=r"cannot write metrics\.jsonl"):
        train(config(data, tmp_path / "run"))
