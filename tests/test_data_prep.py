"""Preparation end to end: the same bytes whatever the workers, the interruptions and the form of the text."""

import codecs
import contextlib
import gzip
import json
import lzma
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from data_prep import batches, sources
from data_prep.benchmark import benchmark
from data_prep.prepare import PrepareConfig, describe, prepare
from data_prep.shards import ShardRecord
from data_prep.sources import HubOptions, resolve
from data_prep.tokenizer import (
    Encoder,
    TokenizerFile,
    cut,
    cut_blocks,
    load_tokenizer,
    splits_at_words,
    train_tokenizer,
)
from sinkpretrain.errors import UserError
from sinkpretrain.tokens import Manifest, TokenFile, open_split, verify

OUTPUT = ("train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json", "manifest.json")
WORDS = Path(__file__).read_text(encoding="utf-8").split()


def make_texts(n: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 400 words with line breaks, digits and some letters beyond ASCII."""
    random = np.random.default_rng(seed)
    separators = np.array([" ", " ", " ", "\n", "\n\n", "  ", " \u00e9t\u00e9 ", " \u4e2d\u6587 "])
    texts = []
    for size in random.integers(1, 400, size=n):
        words, gaps = random.choice(WORDS, size), random.choice(separators, size)
        texts.append("".join(word + gap for word, gap in zip(words, gaps, strict=True)))
    return texts


def write_jsonl(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train_tokenizer("bpe:400", make_texts(50)).content)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "text.jsonl", make_texts(300, seed=1))


@pytest.fixture
def configure(tmp_path: Path, tokenizer_file: Path) -> Callable[..., PrepareConfig]:
    def build(*source: Path | str, out: str = "out", **options: Any) -> PrepareConfig:
        options = {"tokenizer": str(tokenizer_file), "workers": 1} | options
        return PrepareConfig([str(name) for name in source], tmp_path / out, **options)

    return build


def contents(folder: Path, names: tuple[str, ...] = OUTPUT) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def documents_of(folder: Path, split: str = "train") -> list[str]:
    """Texts of a split, each without its end-of-document token."""
    file = open_split(folder, split)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bounds = file.document_bounds()
    assert all(file.tokens[end - 1] == 0 for end in bounds[1:])
    return [tokenizer.decode(file.tokens[a : b - 1]) for a, b in pairwise(bounds)]


# The whole path


def test_every_document_arrives_once_in_order(corpus: Path, configure: Callable[..., PrepareConfig]) -> None:
    config = configure(corpus, validation_fraction=0.1)
    manifest = prepare(config)
    texts = [json.loads(line)["text"] for line in corpus.open(encoding="utf-8")]
    train, validation = documents_of(config.out, "train"), documents_of(config.out, "validation")
    assert 10 < len(validation) < 60
    held_out = set(validation)
    assert [text for text in texts if text not in held_out] == train
    assert [text for text in texts if text in held_out] == validation
    record = manifest.split("train")
    assert record.end_of_document == record.documents == len(train)
    assert manifest.tokenizer_size == 400
    assert manifest.eod_id == 0
    assert verify(config.out) == []
    assert sorted(path.name for path in config.out.iterdir()) == sorted(OUTPUT)
    summary = describe(manifest)
    assert f"{record.tokens:,} tokens in {len(train)} documents" in summary
    assert "tokens/s" in summary


def test_workers_and_shards_do_not_change_a_byte(
    corpus: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 5000)
    one = configure(corpus, out="one")
    prepare(one)
    two = configure(corpus, out="two", workers=2, shard_tokens=3000)
    prepare(two)
    assert contents(one.out) == contents(two.out)


SCRIPT = """
import sys
from pathlib import Path
from data_prep import batches
from data_prep.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    batches.BATCH_CHARACTERS = 2000
    source, out, tokenizer, workers = sys.argv[1:]
    settings = {"workers": int(workers), "shard_tokens": 10_000, "validation_fraction": 0.05}
    prepare(PrepareConfig([source], Path(out), tokenizer, **settings))
"""


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGKILL, 2), (signal.SIGINT, 2), (signal.SIGKILL, 1)])
def test_killed_and_restarted_gives_the_same_bytes(
    tmp_path: Path,
    configure: Callable[..., PrepareConfig],
    tokenizer_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    workers: int,
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2000)  # as in the script, where many batches are in flight
    corpus = write_jsonl(tmp_path / "large.jsonl", make_texts(1500, seed=2))
    undisturbed = configure(corpus, out="undisturbed", validation_fraction=0.05)
    prepare(undisturbed)
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "killed"
    command = [sys.executable, "script.py", str(corpus), str(out), str(tokenizer_file), str(workers)]
    root = str(Path(batches.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell ignores SIGINT and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (out / ".shards" / "000002.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert ("the same command continues" in errors) == (number == signal.SIGINT)
    assert not (out / "manifest.json").exists()
    while alive_in_group(process.pid):  # workers end with their parent
        assert time.monotonic() < deadline
        time.sleep(0.05)

    finished = [path.stat().st_mtime_ns for path in sorted((out / ".shards").glob("00000[012].*.bin"))]
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert "continuing behind" in again.stderr
    assert len(finished) == 6
    assert contents(undisturbed.out) == contents(out)


@pytest.mark.parametrize("ready", ["prepare.json", "000002.json"])
def test_an_impatient_ctrl_c_ends_everything(tmp_path: Path, tokenizer_file: Path, ready: str) -> None:
    """Twice in quick succession, while workers start and while they work: one sentence, and no process left."""
    corpus = write_jsonl(tmp_path / "large.jsonl", make_texts(3000, seed=2))
    (tmp_path / "script.py").write_text(SCRIPT)
    for attempt in range(3):
        out = tmp_path / f"out{attempt}"
        process = subprocess.Popen(
            [sys.executable, "script.py", str(corpus), str(out), str(tokenizer_file), "2"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(batches.__file__).parents[1])},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not (out / ".shards" / ready).exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.3 if ready == "prepare.json" else 0)
        for _ in range(2):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.02)
        try:
            _, errors = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode != 0
        assert "SpawnProcess" not in errors
        assert "spawn_main" not in errors
        while alive_in_group(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def alive_in_group(group: int) -> bool:
    """Whether a process of the group still runs; one that is dead and merely not reaped does not count."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end while we look
            state, _, pgid = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == group and state != "Z":
                return True
    return False


def test_repeated_changed_and_overwritten(
    corpus: Path, configure: Callable[..., PrepareConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(corpus)
    prepare(config)
    before = {name: (config.out / name).stat().st_mtime_ns for name in OUTPUT}
    manifest = prepare(configure(corpus, workers=2, shard_tokens=7))
    assert "already prepared" in capsys.readouterr().err
    assert manifest == Manifest.load(config.out)
    assert {name: (config.out / name).stat().st_mtime_ns for name in OUTPUT} == before
    with pytest.raises(UserError, match=r"another seed \(0 then, 1 now\)"):
        prepare(configure(corpus, seed=1))
    other = write_jsonl(corpus.with_name("other.jsonl"), make_texts(20, seed=3))
    with pytest.raises(UserError, match=r"another source \(1 files, [\d,]+ bytes then, 1 files, [\d,]+ bytes now\)"):
        prepare(configure(other))
    assert prepare(configure(other, overwrite=True)).split("train").documents < 20
    assert verify(config.out) == []


def test_an_interrupted_folder_refuses_other_settings(
    corpus: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2000)
    config = configure(corpus, shard_tokens=2000)
    original = "data_prep.prepare.merge"
    with monkeypatch.context() as patch:
        patch.setattr(original, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    with pytest.raises(UserError, match="another validation_fraction"):
        prepare(configure(corpus, validation_fraction=0.2))
    prepare(configure(corpus, validation_fraction=0.2, overwrite=True))
    assert documents_of(config.out, "validation")


def interrupted_before_it_is_merged(config: PrepareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.prepare.merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(config)


@pytest.mark.parametrize("options", [{}, {"tokenizer": None, "train_tokenizer": "bpe:300"}])
def test_a_file_repaired_between_two_runs_costs_what_was_made_of_it(
    tmp_path: Path,
    configure: Callable[..., PrepareConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr("data_prep.prepare.TRAINING_CHARACTERS", 30_000)  # not as far as the fault
    options |= {"validation_fraction": 0.1, "shard_tokens": 3000}
    files = [write_jsonl(tmp_path / f"{n}.jsonl", make_texts(40, seed=20 + n)) for n in range(3)]
    undisturbed, config = configure(*files, out="undisturbed", **options), configure(*files, **options)
    prepare(undisturbed)
    times = files[1].stat().st_mtime_ns
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"1\.jsonl, line 40: not valid JSON"):
        prepare(config)
    shards = config.out / ".shards"
    records = [ShardRecord(**json.loads(path.read_text())) for path in sorted(shards.glob("0*.json"))]
    units = [record.after["unit"] for record in records]  # type: ignore[index]
    assert units.count(0) > 2
    assert units.count(1) > 2
    kept = {path: path.stat().st_mtime_ns for n in range(units.count(0)) for path in shards.glob(f"{n:06d}.*.bin")}

    files[1].write_bytes(whole)
    os.utime(files[1], ns=(times, times))  # as it was for the undisturbed run, whose manifest has its time
    with pytest.raises(UserError, match="another source"):
        prepare(configure(*files[:2], **options))  # another list could be a slip, which costs no work
    interrupted_before_it_is_merged(config, monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    told = capsys.readouterr().err
    assert "the sources have changed: what was made of those before the first change is kept" in told
    assert f"continuing behind {records[units.count(0) - 1].train_documents} documents" in told
    prepare(config)
    assert contents(undisturbed.out) == contents(config.out)


def test_sources_added_or_taken_away_between_two_runs(
    tmp_path: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2000)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", make_texts(40, seed=30 + n)) for n in range(3)]
    for number, (first, second) in enumerate([([0, 1], [0, 1, 2]), ([0, 1, 2], [0, 2]), ([0], [1]), ([0, 1], [0])]):
        reference = configure(*(files[n] for n in second), out=f"reference{number}")
        prepare(reference)
        before = configure(*(files[n] for n in first), out=f"out{number}", shard_tokens=3000)
        after = configure(*(files[n] for n in second), out=f"out{number}", shard_tokens=3000)
        interrupted_before_it_is_merged(before, monkeypatch)
        with pytest.raises(UserError, match=r"another source .* --overwrite replaces it"):
            prepare(after)
        after.overwrite = True
        prepare(after)
        assert contents(reference.out) == contents(after.out)


def test_a_changed_file_that_trains_another_tokenizer_is_another_source(
    tmp_path: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2000)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", make_texts(40, seed=40 + n)) for n in range(2)]
    config = configure(*files, tokenizer=None, train_tokenizer="bpe:300", shard_tokens=3000)
    interrupted_before_it_is_merged(config, monkeypatch)
    write_jsonl(files[1], ["zq xj zq xj zq xj"] * 4000)
    with pytest.raises(UserError, match="another source"):
        prepare(config)
    config.overwrite = True
    prepare(config)
    reference = configure(*files, out="reference", tokenizer=None, train_tokenizer="bpe:300")
    prepare(reference)
    assert contents(reference.out) == contents(config.out)


def test_a_second_run_is_refused(corpus: Path, configure: Callable[..., PrepareConfig]) -> None:
    from data_prep.prepare import _locked

    config = configure(corpus)
    (config.out / ".shards").mkdir(parents=True)
    with _locked(config.out / ".shards"), pytest.raises(UserError, match="another run is preparing"):
        prepare(config)
    prepare(config)


def test_a_full_disk_keeps_the_finished_shards(
    corpus: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 2000)
    reference = configure(corpus, out="reference")
    prepare(reference)
    config = configure(corpus, shard_tokens=2000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, limits[1]))  # shards fit, the merged file does not
    try:
        with pytest.raises(UserError, match="the disk is full; free some space"):
            prepare(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in config.out.iterdir()) == [".shards"]
    prepare(config)
    assert contents(reference.out) == contents(config.out)


# Splits, limits, odd documents


def test_empty_and_one_token_documents_are_counted(tmp_path: Path, configure: Callable[..., PrepareConfig]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", ["", "two words", None, "x", "three more words", "\n"])
    manifest = prepare(configure(corpus, validation_fraction=0))
    assert manifest.split("train").skipped_documents == 4
    assert documents_of(tmp_path / "out") == ["two words", "three more words"]
    assert list(manifest.splits) == ["train"]


def test_a_small_corpus_gets_a_validation_document(
    tmp_path: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 10)
    texts = [
        "a long document " * 200,
        "the smallest with half a percent " * 5,
        "tiny",
        "another document " * 200,
    ]
    manifest = prepare(configure(write_jsonl(tmp_path / "a.jsonl", texts), validation_fraction=1e-2, shard_tokens=1))
    assert documents_of(tmp_path / "out", "validation") == [texts[1]]
    assert documents_of(tmp_path / "out") == [texts[0], texts[2], texts[3]]
    assert manifest.split("validation").documents == 1


def test_copies_of_a_document_are_on_the_same_side(tmp_path: Path, configure: Callable[..., PrepareConfig]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", make_texts(40, seed=4) * 3)
    prepare(configure(corpus, validation_fraction=0.3))
    train, validation = set(documents_of(tmp_path / "out")), set(documents_of(tmp_path / "out", "validation"))
    assert len(train | validation) == 40
    assert not train & validation


def test_copies_of_the_document_that_a_small_corpus_gives_go_with_it(
    tmp_path: Path, configure: Callable[..., PrepareConfig]
) -> None:
    texts = [f"{letter} document of some words " * (5 + n) for n, letter in enumerate("abcd")]
    corpus = write_jsonl(tmp_path / "a.jsonl", texts * 3)
    prepare(configure(corpus, validation_fraction=1e-9, shard_tokens=1))
    assert documents_of(tmp_path / "out", "validation") == [texts[0]] * 3
    assert documents_of(tmp_path / "out") == texts[1:] * 3
    only = write_jsonl(tmp_path / "b.jsonl", texts[:1] * 3)
    assert list(prepare(configure(only, out="only", validation_fraction=1e-9)).splits) == ["train"]


def test_validation_source_and_limit(tmp_path: Path, configure: Callable[..., PrepareConfig]) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", make_texts(30, seed=5))
    validation = write_jsonl(tmp_path / "held_out.jsonl", make_texts(4, seed=6))
    manifest = prepare(configure(train, validation_source=[str(validation)], limit_documents=7))
    assert documents_of(tmp_path / "out") == make_texts(30, seed=5)[:7]
    assert documents_of(tmp_path / "out", "validation") == make_texts(4, seed=6)
    assert [source["role"] for source in manifest.source] == ["train", "validation"]


def test_text_that_quotes_the_end_of_document_token_stays_text(
    tmp_path: Path, configure: Callable[..., PrepareConfig]
) -> None:
    text = "before <|endoftext|> after"
    manifest = prepare(configure(write_jsonl(tmp_path / "a.jsonl", [text]), validation_fraction=0))
    assert manifest.split("train").end_of_document == 1
    assert documents_of(tmp_path / "out") == [text]


def test_an_end_of_document_token_that_is_not_special_is_said(
    tmp_path: Path, configure: Callable[..., PrepareConfig]
) -> None:
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate("abc")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens(["<|endoftext|>"])  # an added token, but an ordinary one
    tokenizer.save(str(tmp_path / "own.json"))
    source = write_jsonl(tmp_path / "a.jsonl", ["abc<|endoftext|>cba", "abcabc"])
    with pytest.warns(UserWarning, match=r"end-of-document token 3 also occurs inside documents \(1 times\)"):
        prepare(configure(source, tokenizer=str(tmp_path / "own.json"), validation_fraction=0))


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path, configure: Callable[..., PrepareConfig]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "broken \\ud83d emoji"}\n')
    prepare(configure(tmp_path / "a.jsonl", validation_fraction=0))
    assert documents_of(tmp_path / "out") == ["broken \ufffd emoji"]


def test_a_document_longer_than_a_batch(
    tmp_path: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", 777)
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 1000)
    texts = [" ".join(make_texts(60, seed=seed)) for seed in (7, 8)] + ["short one", "x" * 5000]
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text, encoding="utf-8", newline="")
    config = configure(*sorted(tmp_path.glob("*.txt")), validation_fraction=0, shard_tokens=100)
    prepare(config)
    tokenizer = load_tokenizer(str(config.tokenizer)).load()
    expected = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    assert open_split(config.out, "train").tokens.tolist() == expected


# Forms of text


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.jsonl", jsonl),
        ("a.jsonl.gz", lambda texts: gzip.compress(jsonl(texts))),
        ("a.jsonl.xz", lambda texts: lzma.compress(jsonl(texts))),
        ("a.jsonl.zst", lambda texts: zstandard.compress(jsonl(texts))),
        (
            "a.jsonl.zst",  # several frames, as parallel compressors write
            lambda texts: b"".join(zstandard.compress(jsonl([text])) for text in texts),
        ),
        ("a.json", jsonl),
        ("a.json", lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode()),
        ("a.json.gz", lambda texts: gzip.compress(json.dumps([{"text": text} for text in texts]).encode())),
    ],
)
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_formats(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    name: str,
    encode: Callable[[list[str]], bytes],
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    texts = make_texts(20, seed=9)
    (tmp_path / name).write_bytes(encode(texts))
    assert read(tmp_path / name) == texts
    assert read(tmp_path / name, skip=13) == texts[13:]


def test_parquet(tmp_path: Path) -> None:
    texts = make_texts(600, seed=10)
    table = pyarrow.table({"other": range(600), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert read(tmp_path / "a.parquet") == texts
    assert read(tmp_path / "a.parquet", skip=257) == texts[257:]
    with pytest.raises(UserError, match="no column 'body', only 'other', 'text'"):
        read(tmp_path / "a.parquet", column="body")


def test_folder_glob_and_plain_text(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "one.md").write_text("\ufeffone\r\ntwo", encoding="utf-8", newline="")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("été\n".encode()))
    (tmp_path / "c.py").write_bytes(b"caf\xe9")  # not UTF-8
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("dé\r\n".encode("utf-16")))  # with its mark, as Windows writes it
    (tmp_path / "e.txt").write_bytes(codecs.BOM_UTF16_BE + "é".encode("utf-16-be") + b"x")  # cut short
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.warns(UserWarning, match=r"files of other formats in .* are not read: image\.png\."):
        assert read(tmp_path) == ["été\n", "one\r\ntwo", "caf\ufffd", "dé\r\n", "é\ufffd"]
    assert read(f"{tmp_path}/**/*.md") == ["one\r\ntwo"]


def test_links_in_a_folder_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "a.txt").write_text("here")
    (elsewhere / "b.txt").write_text("there")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "round").symlink_to(folder)
    assert sorted(read(folder)) == ["here", "there"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_cannot_be_read_in_a_folder_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    if kind == "link":
        (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    else:
        os.mkfifo(tmp_path / "b.txt")  # opening it would wait for a writer for ever
    with pytest.raises(
        UserError, match=rf"b\.txt is {'a link to nothing' if kind == 'link' else 'no file that can be'}"
    ):
        read(tmp_path)


def test_a_source_folder_may_hold_what_is_made_of_it(tmp_path: Path, configure: Callable[..., PrepareConfig]) -> None:
    (tmp_path / "books").mkdir()
    write_jsonl(tmp_path / "books" / "a.jsonl", make_texts(30))
    config = configure(tmp_path / "books", out="books/tokens")
    assert prepare(config) == prepare(config)


def read(source: Path | str, skip: int = 0, column: str = "text") -> list[str]:
    texts = []
    for unit in resolve(str(source), column, HubOptions()).units:
        texts += ["".join(document.blocks) for document in unit.documents(skip)]
    return texts


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_data_set(
    tmp_path: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = make_texts(150, seed=11)
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", texts)
    write_jsonl(tmp_path / "set" / "validation.jsonl", texts[:3])
    source = f"hub:{tmp_path / 'set'}"
    options: dict[str, Any] = {"streaming": streaming, "validation_source": [source]}
    prepare(configure(source, **options))
    assert documents_of(tmp_path / "out") == texts
    assert documents_of(tmp_path / "out", "validation") == texts[:3]
    unit = resolve(source, "text", HubOptions(streaming=streaming)).units[0]
    assert ["".join(document.blocks) for document in unit.documents(skip=70)] == texts[70:]
    with pytest.raises(UserError, match="no column 'body', only 'text', 'n'"):
        prepare(configure(source, out="b", column="body", **options))
    with pytest.raises(UserError, match="split test\\) cannot be loaded"):
        prepare(configure(source, out="b", split="test", **options))
    assert not (tmp_path / "b").exists()


@pytest.fixture
def hub_requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of a Hub that has no data set."""
    import datasets
    import huggingface_hub

    asked: list[str] = []

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/datasets/" in self.path or "/models/" in self.path:
                asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Empty) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        place = f"http://127.0.0.1:{server.server_port}"
        for settings_, name in ((huggingface_hub.constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
            monkeypatch.setattr(settings_, name, place)
        for settings_ in (huggingface_hub.constants, datasets.config):  # CI is offline, this Hub is not
            monkeypatch.setattr(settings_, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()  # one that was opened offline stays so
        yield asked
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["typo", "owner/typo"])
def test_a_name_that_is_neither_here_nor_on_the_hub(
    corpus: Path, configure: Callable[..., PrepareConfig], hub_requests: list[str], name: str
) -> None:
    config = configure(corpus, name)  # the file in front must not be encoded first
    with pytest.raises(UserError, match=f"^source {name}: there is no file or folder .* the Hub has no such data set"):
        prepare(config)
    assert hub_requests == [f"/api/datasets/{name}"]
    assert not config.out.exists()


def test_a_tokenizer_that_is_neither_here_nor_on_the_hub(
    tmp_path: Path,
    corpus: Path,
    configure: Callable[..., PrepareConfig],
    hub_requests: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    with pytest.raises(UserError, match=r"^tokenizer typo: there is no file or folder .* the Hub has no such model"):
        prepare(configure(corpus, tokenizer="typo"))
    assert hub_requests == ["/api/models/typo"]
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"bare cannot be loaded \(.*\): it has no tokenizer\.json"):
        prepare(configure(corpus, tokenizer=str(tmp_path / "bare")))

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    hub_requests.clear()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(UserError, match=r"no file .* Hub cannot be asked .*\(Name or service not known\): check"):
        prepare(configure(corpus, tokenizer="owner/typo"))
    assert not hub_requests
    assert not (tmp_path / "out").exists()


def test_a_hub_out_of_reach_is_asked_once(
    tmp_path: Path, configure: Callable[..., PrepareConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was loaded before is read from the cache."""
    import datasets
    import huggingface_hub

    asked = []

    def refuse(_: Any, name: str, **__: Any) -> None:
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", lambda *_, **__: pytest.fail("asked again"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"no file .* Hub cannot be asked .*\(Name or service not known\): check the name"
    ):
        prepare(configure("typo"))
    assert asked == ["typo"]
    texts = make_texts(30, seed=12)
    loaded = datasets.load_dataset("json", data_files=str(write_jsonl(tmp_path / "a.jsonl", texts)), split="train")
    made = Path(loaded.cache_files[0]["filename"])
    (tmp_path / "cache" / "owner___name" / "default" / "0.0.0").mkdir(parents=True)
    kept = made.parent.rename(tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / "abc")
    (kept / made.name).rename(kept / made.name.replace("json", "name"))
    assert read("owner/name") == texts
    with pytest.raises(UserError, match=r"subset other, split train\) cannot be loaded"):
        prepare(configure("owner/name", subset="other"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok now"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "ok now"}\n\n{"txt": "a"}\n', r"line 3: no column 'text', only 'txt'"),
        ("a.jsonl", b"[1]\n", r"line 1: expected an object with 'text', found \[1\]"),
        ("a.jsonl", b'{"text": 3}\n', "column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"line 1: not valid JSON \('utf-8' codec"),
        ("a.json", b'[{"text": "ok now"},\n {"text" "b"}]', r"a\.json, line 2: not valid JSON"),
        ("a.json", b'[{"text": "ok now"},\n', r"a\.json, line 2: .*the array is not closed"),
        ("a.jsonl.gz", gzip.compress(jsonl(["abc"] * 99), mtime=0)[:-9], r"a\.jsonl\.gz is unreadable or damaged"),
        ("a.jsonl.xz", lzma.compress(jsonl(["abc"] * 99))[:-9], r"a\.jsonl\.xz is unreadable or damaged"),
        ("a.jsonl.zst", zstandard.compress(jsonl(["abc"] * 99))[:-9], r"a\.jsonl\.zst is unreadable"),
        ("a.jsonl.zst", b"nonsense", r"a\.jsonl\.zst is unreadable"),
        ("a.parquet", b"nonsense", r"a\.parquet is unreadable"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not valid JSON \(maximum recursion"),
        ("a.json", b"[" * 100_000, r"a\.json, line 1: not valid JSON \(maximum recursion"),
        ("a.jsonl", b"", "the source holds no document of two tokens or more"),
        ("a.csv", b"a,b", r"a\.csv has an unknown format"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, configure: Callable[..., PrepareConfig], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(configure(tmp_path / name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": []}, "no source given"),
        ({"source": [""]}, "no source given"),
        ({"source": ["no/such/file.txt"]}, r"source no/such/file\.txt matches no file"),
        ({"source": ["../nowhere"]}, r"source \.\./nowhere matches no file"),
        ({"source": ["./nowhere"]}, r"source \./nowhere matches no file"),
        ({"tokenizer": None}, "either --tokenizer or --train-tokenizer"),
        ({"train_tokenizer": "bpe:400"}, "and not both"),
        ({"tokenizer": None, "train_tokenizer": "bpe:100"}, "is not bpe:<number"),
        ({"tokenizer": "missing/tokenizer.json"}, "does not exist"),
        ({"eod_token": "<nothing>"}, "no token '<nothing>'"),
        ({"validation_fraction": 1.0}, "--validation-fraction 1.0"),
        ({"workers": -1}, "workers -1 is too small"),
    ],
)
def test_bad_settings(
    corpus: Path, configure: Callable[..., PrepareConfig], options: dict[str, Any], message: str
) -> None:
    config = configure(corpus)
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        prepare(config)
    assert not config.out.exists()


def test_text_to_train_on_is_not_text_to_validate_on(corpus: Path, configure: Callable[..., PrepareConfig]) -> None:
    with pytest.raises(UserError, match=r"in --source and in --validation-source"):
        prepare(configure(corpus, validation_source=[str(corpus.parent / "*.jsonl")]))


def test_text_that_is_not_utf8_is_named(tmp_path: Path, configure: Callable[..., PrepareConfig]) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\u00e9 au lait, d\u00e9j\u00e0".encode("latin-1"))
    with pytest.warns(UserWarning, match=r"latin\.txt is not UTF-8: 3 characters became U\+FFFD"):
        prepare(configure(tmp_path / "latin.txt", validation_fraction=0.0))


# Tokenizers


def test_training_a_tokenizer_repeats(corpus: Path, configure: Callable[..., PrepareConfig]) -> None:
    options = {"tokenizer": None, "train_tokenizer": "bpe:500"}
    first = prepare(configure(corpus, out="first", **options))
    second = prepare(configure(corpus, out="second", workers=2, **options))
    assert first == second
    assert (first.tokenizer_size, first.eod_id) == (500, 0)
    out = configure(corpus, out="first").out
    assert Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab_size() == 500
    assert TokenFile.open(out / "train").n_documents + TokenFile.open(out / "validation").n_documents == 300


def test_tokenizer_folder_eos_and_stored_truncation(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no end-of-document token"):
        loaded.eod_id()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eod_id() == 1
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).eod_id() == 1
    assert loaded.eod_id("a") == 0
    assert loaded.content == (tmp_path / "tokenizer.json").read_bytes()
    encoded = Encoder(loaded, 1).documents(["a" * 10, "aa"])
    assert encoded.sizes.tolist() == [11, 3]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab1 \n'.,\u00e9\u4e2d_\u0301"), max_size=200),
    limit=st.integers(2, 30),
    block=st.integers(1, 50),
)
def test_fragments_join_to_the_same_tokens(tokenizer_file: Path, text: str, limit: int, block: int) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file)).load()
    assert splits_at_words(tokenizer)
    whole = tokenizer.encode(text).ids
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    for parts in (list(cut(text, limit)), list(cut_blocks(blocks, limit, longest=10_000))):
        assert "".join(parts) == text
        assert [id_ for part in parts for id_ in tokenizer.encode(part).ids] == whole


def test_tokenizers_that_must_not_see_fragments() -> None:
    texts = make_texts(30)
    alphabet = sorted(set("".join(texts)))
    plain = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(alphabet)}, []))
    assert not splits_at_words(plain)  # nothing splits words
    plain.normalizer = normalizers.Prepend("_")
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert not splits_at_words(plain)  # every text gets a prefix
    plain = Tokenizer(models.BPE(json.loads(train_tokenizer("bpe:300", texts).content)["model"]["vocab"], []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    encoder = Encoder(TokenizerFile(plain.to_str().encode()), 0)
    text = " ".join(texts)
    assert encoder.documents([text]).ids[:-1].tolist() == plain.encode(text).ids


def test_benchmark_measures_both(corpus: Path, tokenizer_file: Path) -> None:
    result = benchmark([str(corpus)], str(tokenizer_file), seconds=0.01, rounds=1, workers=1)
    assert result["documents"] == 64
    assert result["ratio"] > 0
