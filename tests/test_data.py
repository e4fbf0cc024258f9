"""Data order: a permutation, a function of (seed, sample number), the same for every number of processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_factory import make_data
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from sinkpretrain.config import MAX_SINK_TOKENS, DataConfig, ModelConfig
from sinkpretrain.data import (
    IGNORED,
    Order,
    Samples,
    Stream,
    open_data,
    permute,
    require_one_tokenizer,
    shared_targets,
    to_batch,
    training_order,
)
from sinkpretrain.errors import UserError
from sinkpretrain.tokens import _HEADER, INDEX_VERSION, MAGIC, TokenFile, TokenWriter

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=64, tokenizer_size=96, vocab_size=128)


@given(st.integers(1, 3000), st.integers(0, 2**70))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_of_a_huge_domain_takes_no_memory() -> None:
    n = 36_621_094  # samples of the Pile
    some = permute(np.arange(1000), n, 1)
    assert len(np.unique(some)) == 1000
    assert some.min() >= 0
    assert some.max() < n


def test_permute_mixes_well() -> None:
    """Neighbours end up as far apart as random ones, and each place is as likely as any other."""
    n = 10_000
    order = permute(np.arange(n), n, 3)
    assert np.abs(np.diff(order)).mean() == pytest.approx(n / 3, rel=0.03)  # E|X - Y| of two uniform draws
    counts = np.histogram(order[:1000], bins=10, range=(0, n))[0]
    assert ((counts - 100) ** 2 / 100).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001


def test_order_is_arithmetic() -> None:
    order = Order(101, seed=5, shuffle=True)
    whole = order(0, 404)
    assert np.array_equal(order(37, 200), whole[37:237])
    for epoch in range(4):
        assert np.array_equal(np.sort(whole[epoch * 101 : (epoch + 1) * 101]), np.arange(101))
    assert not np.array_equal(whole[:101], whole[101:202])
    assert not np.array_equal(whole, Order(101, seed=6, shuffle=True)(0, 404))
    assert np.array_equal(Order(101, seed=5, shuffle=False)(99, 4), [99, 100, 0, 1])


@pytest.mark.parametrize("n", [0, 1, 2, 4, 27])
def test_prefix_displaces_the_end(n: int) -> None:
    rows = np.arange(1, 131).reshape(2, 65)
    prefix = tuple(range(96, 96 + n))
    ids, labels = to_batch(rows, prefix)
    assert ids.shape == labels.shape == (2, 64)
    assert ids[0, :n].tolist() == list(prefix)
    assert ids[0, n:].tolist() == list(range(1, 65 - n))
    if n:
        assert labels[0, : n - 1].tolist() == [IGNORED] * (n - 1)
        assert labels[0, n - 1 :].tolist() == list(range(1, 66 - n))  # the last sink predicts the first token
    else:
        assert labels[0].tolist() == list(range(2, 66))


def test_shared_targets_are_the_same_tokens_for_every_mechanism() -> None:
    rows = np.arange(1, 66).reshape(1, 65)
    seen = set()
    for n in (0, 1, 2, 4, 27):
        batch = shared_targets(to_batch(rows, tuple(range(96, 96 + n))), n)
        kept = batch.labels[batch.labels != IGNORED]
        seen.add(tuple(kept.tolist()))
        # and each is predicted from the token before it
        assert (batch.ids[batch.labels != IGNORED] + 1).tolist() == kept.tolist()
    assert seen == {tuple(range(2, 2 + 64 - MAX_SINK_TOKENS))}


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    return Samples(TokenFile.open(make_data(tmp_path / "data") / "train"), MODEL, (96,))


def test_processes_share_a_step(samples: Samples) -> None:
    order = Order(samples.n_samples, 1, True)
    alone = Stream(samples, order, batch_size=8, first_sample=24)
    together = [Stream(samples, order, 8, rank=r, world=4, first_sample=24) for r in range(4)]
    iterators = [iter(s) for s in together]
    for step, (ids, _) in zip(range(5), alone, strict=False):
        parts = [next(i).ids for i in iterators]
        assert ids.tolist() == [row for part in parts for row in part.tolist()], step


def test_stream_starts_anywhere(samples: Samples) -> None:
    order = Order(samples.n_samples, 1, True)
    whole = [b.ids.tolist() for _, b in zip(range(6), Stream(samples, order, 8), strict=False)]
    later = [b.ids.tolist() for _, b in zip(range(3), Stream(samples, order, 8, first_sample=24), strict=False)]
    assert later == whole[3:]


def test_preshuffled_rows_keep_their_order(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "rows", 96) as writer:
        for row in range(20):
            writer.add_document(np.full(65, row))
    samples = Samples(TokenFile.open(tmp_path / "rows"), MODEL, ())
    order = training_order(DataConfig(), samples)
    assert samples.batch(order(0, 20)).ids[:, 0].tolist() == list(range(20))
    assert training_order(DataConfig(shuffle=True), samples)(0, 20).tolist() != list(range(20))


def test_the_published_files_open_by_their_folder(tmp_path: Path) -> None:
    """As Pythia's are published: one pair and no manifest, the tokens in numbered parts to be joined."""
    pair = tmp_path / "pile_0.87 deduped"
    with TokenWriter(pair, 96) as writer:
        for row in range(20):
            writer.add_document(np.full(65, row))
    opened = open_data(DataConfig(path=str(tmp_path)))
    assert (opened.train.row_length, opened.train.n_documents, opened.manifest) == (65, 20, None)

    whole = pair.with_name(f"{pair.name}.bin")
    tokens = whole.read_bytes()
    whole.unlink()
    for part in range(3):
        start, end = (len(tokens) * n // 3 for n in (part, part + 1))
        (tmp_path / f"{pair.name}-{part:05}-of-00002.bin").write_bytes(tokens[start:end])
    with pytest.raises(UserError, match=r"lies in parts, pile_0\.87 deduped-00000-of-00002\.bin and so on \(3\): join"):
        open_data(DataConfig(path=str(tmp_path)))
    whole.write_bytes(b"".join(p.read_bytes() for p in sorted(tmp_path.glob("*-of-*.bin"))))
    assert open_data(DataConfig(path=str(tmp_path))).train.tokens.tolist() == opened.train.tokens.tolist()

    with TokenWriter(tmp_path / "other", 96) as writer:
        writer.add_document(np.arange(90))
    with pytest.raises(UserError, match="several token files and no manifest"):
        open_data(DataConfig(path=str(tmp_path)))


def test_a_prepared_folder_without_its_manifest_is_no_bare_pair(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "train", 96) as writer:
        writer.add_document(np.arange(90))
    with pytest.raises(UserError, match=r"has no manifest\.json: run prepare"):
        open_data(DataConfig(path=str(tmp_path)))


def test_data_to_validate_on_are_named_as_those_to_train_on(tmp_path: Path) -> None:
    """A prepared folder with or without a validation split, a folder with one pair, or a pair."""
    train, novels = make_data(tmp_path / "train"), make_data(tmp_path / "novels", documents=7, seed=1)

    def opened(path: Path) -> Path:
        file = open_data(DataConfig(path=str(train), validation_path=str(path))).validation
        assert file is not None
        return file.prefix

    assert opened(novels) == novels / "validation"
    assert opened(novels / "train") == novels / "train"
    without_validation(novels)
    assert opened(novels) == novels / "train"
    (tmp_path / "foreign").mkdir()
    with TokenWriter(tmp_path / "foreign" / "document", 96) as writer:
        writer.add_document(np.arange(90))
    assert opened(tmp_path / "foreign") == tmp_path / "foreign" / "document"
    with pytest.raises(UserError, match=r"has no manifest\.json: run prepare"):
        opened(tmp_path)


def without_validation(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for suffix in ("bin", "idx"):
        (folder / f"validation.{suffix}").unlink()


def test_data_to_validate_on_must_have_the_same_ids(tmp_path: Path) -> None:
    """Files of tokenizers may differ as long as ids mean the same."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    swapped = words.to_str().replace('"w5":5,"w6":6', '"w5":6,"w6":5')
    train = make_data(tmp_path / "train", tokenizer=words.to_str())

    def check(name: str, tokenizer: str) -> None:
        novels = make_data(tmp_path / name, seed=1, tokenizer=tokenizer)
        require_one_tokenizer(open_data(DataConfig(path=str(train), validation_path=str(novels))))

    check("the same", words.to_str())
    check("other layout", words.to_str(pretty=True))
    with pytest.raises(
        UserError, match=r"another tokenizer than the training data \('w6' is not the same id in both\)"
    ):
        check("other ids", swapped)
    with pytest.raises(UserError, match="another tokenizer than the training data, as far as can be told"):
        check("none", "{}")
    require_one_tokenizer(open_data(DataConfig(path=str(train))))


def test_bad_data_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "short", 96) as writer:
        writer.add_document(np.arange(50))
    with pytest.raises(UserError, match="fewer than one sample of 65"):
        Samples(TokenFile.open(tmp_path / "short"), MODEL, ())
    with TokenWriter(tmp_path / "wide", 200) as writer:
        writer.add_document(np.arange(100, 180))
    with pytest.raises(UserError, match="token id 164"):
        Samples(TokenFile.open(tmp_path / "wide"), MODEL, ()).batch(np.array([0]))
    file = TokenFile.open(tmp_path / "wide")
    signed = TokenFile(file.prefix, file.tokens.astype(np.int16) - 101, file.sizes, file.pointers, file.doc_idx)
    with pytest.raises(UserError, match="token id -1,"):
        Samples(signed, MODEL, ()).batch(np.array([0]))
    with pytest.raises(UserError, match=r"data\.path is not set"):
        open_data(DataConfig())


def test_a_fault_in_the_reading_thread_reaches_the_loop(tmp_path: Path) -> None:
    with TokenWriter(tmp_path / "wide", 200) as writer:
        writer.add_document(np.arange(100, 180))
    samples = Samples(TokenFile.open(tmp_path / "wide"), MODEL, ())
    with pytest.raises(UserError, match="token id"):
        next(iter(Stream(samples, Order(1, 0, False), 1)))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: what a copy of the data would be in."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_the_reading_thread_is_gone_before_the_interpreter_is(tmp_path: Path) -> None:
    """One that lives on into finalization aborts the process now and then, after all is done and saved."""
    program = """
import atexit, sys, threading
from pathlib import Path
from sinkpretrain.config import ModelConfig
from sinkpretrain.data import Order, Samples, Stream
from sinkpretrain.tokens import TokenFile

model = ModelConfig(n_layer=1, d_model=8, n_head=1, context=16).resolved(96)
samples = Samples(TokenFile.open(Path(sys.argv[1]) / "train"), model, ())
stream = iter(Stream(samples, Order(samples.n_samples, 0, False), 4))
next(stream)
print([t.name for t in threading.enumerate()])
atexit.register(lambda: print([t.name for t in threading.enumerate()]))
"""
    words = [sys.executable, "-c", program, str(make_data(tmp_path / "data"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["['MainThread', 'batches']", "['MainThread']"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="asks Linux for the memory")
def test_a_file_of_100_gigabytes_is_ready_at_once_and_never_copied(tmp_path: Path) -> None:
    """50 billion tokens in a file with holes: opened, told apart and read from two places."""
    documents, length = 50, 10**9
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(documents * length * 2)
        file.seek(2 * (documents * length - 4096))
        file.write((np.arange(4096) % 1000).astype("<u2").tobytes())
    if (tmp_path / "huge.bin").stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system has no files with holes")
    with (tmp_path / "huge.idx").open("wb") as file:
        file.write(_HEADER.pack(MAGIC, INDEX_VERSION, 8, documents, documents + 1))
        file.write(np.full(documents, length, "<i4").tobytes())
        file.write((2 * length * np.arange(documents)).astype("<i8").tobytes())
        file.write(np.arange(documents + 1).astype("<i8").tobytes())
    model = ModelConfig(n_layer=1, d_model=16, n_head=1, context=2048, tokenizer_size=1000, vocab_size=1024)
    before, started = anonymous_bytes(), time.perf_counter()
    data = DataConfig(path=str(tmp_path / "huge"), batch_size=32)
    tokens = open_data(data)
    tokens.identity()
    samples = Samples(tokens.train, model, ())
    streams = [iter(Stream(samples, training_order(data, samples), 32, rank=r, world=2)) for r in range(2)]
    first = next(streams[0])
    assert time.perf_counter() - started < 5
    assert first.ids.shape == (16, 2048)
    for stream in streams:
        for _ in range(4):
            next(stream)
        stream.close()
    assert anonymous_bytes() - before < 256 << 20
    assert samples.n_samples == (documents * length - 1) // 2048
    last = samples.batch(np.array([samples.n_samples - 1])).labels[0]
    assert last.max() > 0  # the end of the file, beyond what 32 bits can count
