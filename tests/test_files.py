"""Files are whole or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from sinkpretrain.cli import main
from sinkpretrain.errors import UserError
from sinkpretrain.files import read_json, sha256_file, write_atomically, write_json


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def failing(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="disk is full"):
        write_atomically(path, failing)
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_not_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_hash_of_several_files_is_of_their_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "both").write_bytes(b"onetwo")
    assert sha256_file(tmp_path / "a", tmp_path / "b") == sha256_file(tmp_path / "both")


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*: file exists; choose a folder"):
        write_json(tmp_path / "file" / "x.json", {})
    assert (tmp_path / "file").read_text() == "mine"


def test_whatever_a_command_did_not_expect_of_the_disk_is_one_sentence(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("some words here")
    arguments = ["prepare", "--source", str(tmp_path / "a.txt"), "--train-tokenizer", "bpe:300", "--out"]
    assert main([*arguments, str(tmp_path / "a.txt" / "out")]) == 2
    assert capsys.readouterr().err.strip().endswith("not a directory; choose a place you can write to.")
