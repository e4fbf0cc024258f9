"""The .bin/.idx format byte by byte, round trips, and every way in which the files can be broken."""

import contextlib
import pickle
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkpretrain import tokens as tokens_module
from sinkpretrain.errors import UserError
from sinkpretrain.files import sha256_file, write_bytes
from sinkpretrain.tokens import (
    Manifest,
    TokenFile,
    TokenWriter,
    open_split,
    summarise,
    verify,
)

DOCUMENTS = [[5, 6, 0], [7, 0], [8, 9, 10, 0]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 50277) -> TokenFile:
    with TokenWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return TokenFile.open(prefix)


def prepared_folder(folder: Path) -> Path:
    """A folder as prepare leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    record = summarise(write(folder / "train", DOCUMENTS), eod_id=0, skipped_documents=2)
    sha256 = sha256_file(folder / "tokenizer.json")
    Manifest(sha256, 50277, 0, [{"name": "text"}], {"train": record}).save(folder)
    return folder


def test_layout_of_both_files(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<9H", 5, 6, 0, 7, 0, 8, 9, 10, 0)
    assert (tmp_path / "a.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + b"\x01\x00\x00\x00\x00\x00\x00\x00"  # version
        + b"\x08"  # uint16
        + b"\x03\x00\x00\x00\x00\x00\x00\x00"  # sequences
        + b"\x04\x00\x00\x00\x00\x00\x00\x00"  # document index entries
        + struct.pack("<3i", 3, 2, 4)
        + struct.pack("<3q", 0, 6, 10)
        + struct.pack("<4q", 0, 1, 2, 3)
    )


@pytest.mark.parametrize(("vocab_size", "code", "width"), [(65_499, 8, 2), (65_500, 4, 4), (250_000, 4, 4)])
def test_width_of_an_id_follows_the_vocabulary(tmp_path: Path, vocab_size: int, code: int, width: int) -> None:
    file = write(tmp_path / "a", [[vocab_size - 1, 0]], vocab_size)
    assert (tmp_path / "a.idx").read_bytes()[17] == code
    assert (tmp_path / "a.bin").stat().st_size == 2 * width
    assert file.tokens.tolist() == [vocab_size - 1, 0]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 50_276), min_size=1, max_size=40), max_size=30),
    vocab_size=st.sampled_from([50_277, 100_000]),
    chunk=st.sampled_from([3, 1 << 20]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int, chunk: int
) -> None:
    prefix = tmp_path_factory.mktemp("tokens") / "a"
    flat = [id_ for document in documents for id_ in document]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "_CHUNK", chunk)
        with TokenWriter(prefix, vocab_size) as writer:
            writer.add_documents(np.array(flat, dtype=np.int64), [len(document) for document in documents])
        file = TokenFile.open(prefix.with_suffix(".idx"))
        assert file.tokens.tolist() == flat
        assert file.sizes.tolist() == [len(document) for document in documents]
        assert (file.n_documents, file.n_tokens) == (len(documents), len(flat))
        bounds = file.document_bounds()
        assert [file.tokens[a:b].tolist() for a, b in pairwise(bounds)] == documents
        # copying in two pieces, as merging does, changes nothing
        with TokenWriter(prefix.with_name("b"), vocab_size) as writer:
            writer.add_file(file, 0, len(documents) // 2)
            writer.add_file(file, len(documents) // 2)
    for suffix in (".bin", ".idx"):
        assert prefix.with_suffix(suffix).read_bytes() == prefix.with_name("b" + suffix).read_bytes()


def test_every_token_is_in_a_document_whatever_the_index_of_another_maker_leaves_out(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "a", 100) as writer:
        writer.add_documents(np.arange(12), [3, 4, 5])
    file = TokenFile.open(tmp_path / "a")

    def bounds(*doc_idx: int) -> list[int]:
        return replace(file, doc_idx=np.array(doc_idx, dtype=np.int64)).document_bounds().tolist()

    assert bounds(0, 2, 3) == [0, 7, 12]
    assert bounds(0, 2) == [0, 7, 12]
    assert bounds(1, 2) == [0, 3, 7, 12]
    assert bounds() == [0, 3, 7, 12]
    with pytest.raises(UserError, match="outside the file"):
        bounds(0, 4)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20), context=st.integers(1, 12))
def test_samples_overlap_by_one_token(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], context: int
) -> None:
    prefix = tmp_path_factory.mktemp("tokens") / "a"
    flat = np.arange(sum(lengths))
    with TokenWriter(prefix, 1000) as writer:
        writer.add_documents(flat, lengths)
    file = TokenFile.open(prefix)
    if file.row_length == context + 1:
        expected = flat.reshape(-1, context + 1)
    else:
        n = (len(flat) - 1) // context
        expected = np.array([flat[context * i : context * i + context + 1] for i in range(n)])
    n_samples = file.n_samples(context)
    assert n_samples == len(expected)
    order = np.arange(n_samples)[::-1]
    samples = file.samples(order, context)
    assert samples.dtype == np.int64
    assert samples.shape == (n_samples, context + 1)
    assert samples.tolist() == [expected[i].tolist() for i in order]
    for index in (-1, n_samples):
        with pytest.raises(IndexError):
            file.samples(np.array([index]), context)


def test_rows_of_pythia_open_in_their_order(tmp_path: Path) -> None:
    # Written by hand as the published files are: 2,049 tokens per row, uint16.
    rows = np.random.default_rng(0).integers(0, 50_277, size=(7, 2049)).astype("<u2")
    (tmp_path / "document.bin").write_bytes(rows.tobytes())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 7, 8)
    index = np.full(7, 2049, "<i4").tobytes() + (np.arange(7, dtype="<i8") * 4098).tobytes()
    (tmp_path / "document.idx").write_bytes(header + index + np.arange(8, dtype="<i8").tobytes())
    file = TokenFile.open(str(tmp_path / "document"))
    assert file.row_length == 2049
    assert file.n_samples(2048) == 7
    assert (file.samples(np.array([0, 6, 3]), 2048) == rows[[0, 6, 3]]).all()
    # another context walks the same tokens in overlapping windows
    assert file.n_samples(512) == (7 * 2049 - 1) // 512
    assert (file.samples(np.array([5]), 512)[0] == rows.ravel()[5 * 512 : 5 * 512 + 513]).all()


def test_a_file_without_tokens(tmp_path: Path) -> None:
    file = write(tmp_path / "a", [])
    assert (file.n_tokens, file.n_documents, file.row_length, file.n_samples(4)) == (0, 0, None, 0)
    assert file.samples(np.array([], dtype=np.int64), 4).shape == (0, 5)


def test_pickled_by_path_and_read_only(tmp_path: Path) -> None:
    file = write(tmp_path / "a", [[1] * 20_000])
    copied = pickle.dumps(file)
    assert len(copied) < 1000
    assert pickle.loads(copied).n_tokens == 20_000
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 1


def test_extend_writes_what_add_document_writes(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    with TokenWriter(tmp_path / "b", 50277) as writer:
        for document in DOCUMENTS:
            writer.extend(document[:1])
            writer.extend(document[1:])
            writer.end_document()
    assert (tmp_path / "a.idx").read_bytes() == (tmp_path / "b.idx").read_bytes()


@pytest.mark.parametrize(("bad", "named"), [([1, 50277], "50277"), ([-1, 3], "-1")])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, bad: list[int], named: str) -> None:
    with pytest.raises(UserError, match=f"token id {named} is outside the vocabulary of 50277"):
        write(tmp_path / "a", [bad])
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = TokenWriter(tmp_path / "a", 50277)
    with contextlib.suppress(KeyboardInterrupt), writer:
        writer.add_document([1, 2, 3])
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_the_old_pair(tmp_path: Path) -> None:
    write(tmp_path / "a", DOCUMENTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with (
            pytest.raises(UserError, match=r"cannot write .*a: the disk is full; free some space"),
            TokenWriter(tmp_path / "a", 50277) as writer,
        ):
            writer.add_document(np.zeros(1 << 20, dtype=np.int64))
        with pytest.raises(UserError, match="the disk is full"):
            write_bytes(tmp_path / "a.idx", bytes(1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_idx_never_stands_beside_an_old_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames: no pair is better than a wrong one."""
    write(tmp_path / "a", DOCUMENTS)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", [[1, 2, 3]])
    assert not (tmp_path / "a.idx").exists()
    with pytest.raises(UserError, match=r"a\.idx does not exist"):
        TokenFile.open(tmp_path / "a")


def damage_idx(offset: int, value: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / "train.idx").read_bytes())
        content[offset : offset + len(value)] = value
        (folder / "train.idx").write_bytes(content)

    return change


def shorten(name: str, by: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-by])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "train.bin").unlink(), r"train\.bin does not exist"),
        (lambda folder: (folder / "train.idx").unlink(), r"train\.idx does not exist"),
        (shorten("train.bin", 2), r"train\.bin has 16 bytes but its \.idx describes 18"),
        (shorten("train.bin", 1), r"train\.bin has 17 bytes"),
        (shorten("train.idx", 8), r"train\.idx has 94 bytes but its header describes 102"),
        (shorten("train.idx", 80), r"train\.idx is truncated inside its header"),
        (damage_idx(0, b"X"), "does not begin like"),
        (damage_idx(9, b"\x02"), r"\.idx version 2"),
        (damage_idx(17, b"\x63"), "dtype code 99"),
        (damage_idx(17, b"\x06"), "dtype code 6, which is no integer type"),
        (damage_idx(34, b"\x04"), "sizes that do not sum"),
        (lambda folder: write(folder / "train", [[1, 0]]), r"manifest\.json says 3 and 9"),
        (lambda folder: (folder / "manifest.json").unlink(), r"has no manifest\.json: run prepare"),
        (shorten("manifest.json", 9), r"manifest\.json is not a manifest"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    folder = prepared_folder(tmp_path / "data")
    assert open_split(folder, "train").n_documents == 3
    assert verify(folder) == []
    change(folder)
    with pytest.raises(UserError, match=message):
        open_split(folder, "train")
    if (folder / "manifest.json").exists() and "not a manifest" not in message:
        assert any(verify(folder))


def test_verify_sees_what_opening_cannot(tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path / "data")
    (folder / "train.bin").write_bytes(struct.pack("<9H", 5, 6, 0, 7, 0, 8, 9, 11, 0))
    (folder / "tokenizer.json").unlink()
    open_split(folder, "train")
    assert [problem.split()[1:3] for problem in verify(folder)] == [["is", "missing."], ["has", "changed"]]


def test_manifest_round_trip_and_versions(tmp_path: Path) -> None:
    folder = prepared_folder(tmp_path / "data")
    manifest = Manifest.load(folder)
    record = manifest.split("train")
    assert (record.documents, record.tokens, record.end_of_document) == (3, 9, 3)
    assert (record.skipped_documents, record.max_token_id) == (2, 10)
    manifest.save(folder)
    assert Manifest.load(folder) == manifest
    hash_before = manifest.data_hash("train")
    write(folder / "train", [[5, 6, 0, 7, 0], [8, 9, 10, 0]])  # same ids, other boundaries
    manifest.splits["train"] = summarise(TokenFile.open(folder / "train"), 0, 0)
    assert manifest.data_hash("train") != hash_before
    with pytest.raises(UserError, match="no split 'validation', only train"):
        open_split(folder, "validation")
    manifest.format_version = 2
    manifest.save(folder)
    with pytest.raises(UserError, match="format version 2 and this release reads 1"):
        Manifest.load(folder)
