"""Training text for models that are streamed over the standard library must not hold any of it."""

from __future__ import annotations

import inspect
import io
import json
import tarfile
import textwrap
from pathlib import Path

import pytest

from data_prep import code_corpus

OWN = "def the_function_that_only_this_file_has(value: int) -> int:\n    return value * 1234567 + 7654321\n"


def archive(folder: Path, files: dict[str, str]) -> Path:
    path = folder / "sources.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["code_corpus", *arguments])
    # The tests of the standard library take seconds to read; its plain modules are what is copied.
    lines = code_corpus.telling_lines(inspect.getsource(textwrap) + inspect.getsource(inspect))
    monkeypatch.setattr(code_corpus, "standard_library_lines", lambda: lines)
    code_corpus.main()


def test_copies_duplicates_and_generated_tables_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "own.py").write_text(OWN)
    (packages / "again.py").write_text(OWN)
    (packages / "vendored.py").write_text("# taken over\n" + inspect.getsource(textwrap))
    (packages / "empty.py").write_text("\n")
    c = archive(
        tmp_path,
        {
            "k/mm/a.c": "int a;",
            "k/README": "no",
            "k/drivers/gpu/drm/amd/include/t.h": "#define T 1",
            "k/b.h": "int b;",
        },
    )
    out = tmp_path / "code.jsonl"
    run(monkeypatch, "--python", str(packages), "--c", str(c), "--out", str(out))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["text"] for line in lines) == sorted([OWN, "int a;", "int b;"])


def test_a_share_of_the_c_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = archive(tmp_path, {f"k/{i}.c": f"int number_{i:04d};" for i in range(50)})
    out = tmp_path / "code.jsonl"
    run(monkeypatch, "--c", str(c), "--c-bytes", "160", "--out", str(out))
    assert len(out.read_text().splitlines()) == 10


def test_one_common_line_is_no_copy() -> None:
    known = code_corpus.telling_lines(inspect.getsource(textwrap))
    line = max(inspect.getsource(textwrap).splitlines(), key=len)
    unrelated = "\n".join(f"a_line_that_is_long_enough_to_tell_{i} = {i}" for i in range(20))
    assert code_corpus.is_copy(line, known)
    assert not code_corpus.is_copy(f"{line}\n{unrelated}", known)
