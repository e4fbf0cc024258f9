"""Shards: the work done so far, made safe piece by piece, and joined at the end."""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.batches import Batch, Position
from data_prep.tokenizer import EncodedBatch
from sinkpretrain.errors import UserError
from sinkpretrain.files import write_bytes
from sinkpretrain.tokens import SplitRecord, TokenFile, TokenWriter, summarise

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


@dataclass(frozen=True)
class ShardRecord:
    """Progress at the end of a shard; its file is what makes the shard count.

    Attributes:
        after: where to continue
        train_documents: documents read from the train source so far, skipped ones included
        skipped: empty and one-token documents so far, per split
        finished: whether the source ended here
    """

    after: Position = field(default_factory=Position)
    train_documents: int = 0
    skipped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    finished: bool = False


class Shard:
    """The shard being written: a pair per split, and the record that makes them count.

    Args:
        folder: that holds the shards
        number: of this shard
        vocab_size: number of token ids
        fraction: of the train source's documents that go to validation
        record: of the shard before
    """

    def __init__(self, folder: Path, number: int, vocab_size: int, fraction: float, record: ShardRecord) -> None:
        self.number = number
        self.record = record
        self._folder = folder
        self._vocab_size, self._fraction = vocab_size, fraction
        self._writers = {split: TokenWriter(_shard(folder, number, split), vocab_size) for split in SPLITS}
        self._below = np.uint64(int(fraction * 2**64))
        self._open_split = TRAIN  # of a document that arrives in parts

    @property
    def n_tokens(self) -> int:
        return sum(writer.n_tokens for writer in self._writers.values())

    def add(self, batch: Batch, encoded: EncodedBatch) -> None:
        """Append what a batch became and advance the record."""
        first, last = batch[0], batch[-1]
        chosen = np.full(len(encoded.keys), True) if first.role == VALIDATION else encoded.keys < self._below
        if first.is_whole:
            for split, mask in ((TRAIN, ~chosen), (VALIDATION, chosen)):
                ids = encoded.ids[np.repeat(mask, encoded.sizes)]
                self._writers[split].add_documents(ids, encoded.sizes[mask])
        else:
            if first.is_first:
                self._open_split = VALIDATION if chosen[0] else TRAIN
            self._writers[self._open_split].extend(encoded.ids)
            if last.is_last:
                self._writers[self._open_split].end_document()
        if last.is_last:
            skipped = dict(self.record.skipped)
            skipped[first.role] += encoded.skipped
            n_train = self.record.train_documents + (len(batch) if first.role == TRAIN else 0)
            self.record = ShardRecord(last.after, n_train, skipped)

    def commit(self) -> None:
        """Make the shard count: data first, record last."""
        for writer in self._writers.values():
            writer.close()
        record = json.dumps(asdict(self.record)).encode()
        write_bytes(_record_path(self._folder, self.number), record)

    def following(self) -> "Shard":
        """The next shard, to be opened once this one is committed."""
        return Shard(self._folder, self.number + 1, self._vocab_size, self._fraction, self.record)

    def abort(self) -> None:
        """Remove what is not committed."""
        for writer in self._writers.values():
            writer.abort()


def _shard(folder: Path, number: int, split: str) -> Path:
    return folder / f"{number:06d}.{split}"


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"


def complete_shards(folder: Path) -> list[ShardRecord]:
    """Records of the shards that an earlier run finished."""
    records: list[ShardRecord] = []
    while (path := _record_path(folder, len(records))).is_file():
        raw = json.loads(path.read_text(encoding="utf-8"))
        records.append(ShardRecord(**raw | {"after": Position(**raw["after"])}))
    return records


def drop_shards(folder: Path, kept: int) -> None:
    """Remove all but the first complete shards; the last goes first, so that an interruption leaves no gap."""
    for number in reversed(range(kept, len(complete_shards(folder)))):
        _record_path(folder, number).unlink()
        for file in folder.glob(f"{number:06d}.*"):
            file.unlink()


def merge(shards: Path, vocab_size: int, eod_id: int, fallback_fraction: float) -> tuple[Path, dict[str, SplitRecord]]:
    """Join the shards into one pair per split, still inside the shards folder; bounded memory.

    Args:
        shards: their folder
        vocab_size: number of token ids
        eod_id: end-of-document token, counted for the manifest
        fallback_fraction: where validation got no document it gets one with this share of the tokens and that one's
            copies; 0: none

    Returns:
        folder of the pairs, and what the manifest says of each split that is not empty

    Raises:
        UserError: there is no document, none for training, or the disk is full.
    """
    records = complete_shards(shards)
    files = {split: [TokenFile.open(_shard(shards, n, split)) for n in range(len(records))] for split in SPLITS}
    n_documents = {split: sum(file.n_documents for file in files[split]) for split in SPLITS}
    if not n_documents[TRAIN] + n_documents[VALIDATION]:
        raise UserError("the source holds no document of two tokens or more: check --source and --column.")
    if not n_documents[TRAIN]:
        raise UserError("every document went to validation: lower --validation-fraction or give more text.")
    moved: dict[int, list[int]] = {}
    if not n_documents[VALIDATION] and fallback_fraction:
        moved = _documents_for_validation(files[TRAIN], fallback_fraction)

    merged = shards / "merged"
    summaries = {}
    for split in SPLITS:
        with TokenWriter(merged / split, vocab_size) as writer:
            for number, file in enumerate(files[split]):
                train, indices = files[TRAIN][number], moved.get(number, [])
                if indices and split == VALIDATION:
                    for index in indices:
                        writer.add_file(train, index, index + 1)
                else:
                    for start, stop in pairwise([-1, *indices, file.n_documents]):
                        writer.add_file(file, start + 1, stop)
        summary = summarise(TokenFile.open(merged / split), eod_id, records[-1].skipped[split])
        if summary.documents:
            summaries[split] = summary
    return merged, summaries


def _documents_for_validation(files: list[TokenFile], fraction: float) -> dict[int, list[int]]:
    """The smallest document with this share of all tokens, and all of its copies: per file, their numbers in order.

    Empty if there is none, or if nothing else would be left.
    """
    least = fraction * sum(file.n_tokens for file in files)
    best: tuple[int, int, int] | None = None  # size, file, document
    for number, file in enumerate(files):
        large = np.flatnonzero(file.sizes >= least)
        if len(large):
            index = int(large[np.argmin(file.sizes[large])])
            if best is None or file.sizes[index] < best[0]:
                best = int(file.sizes[index]), number, index
    if best is None:
        return {}
    size, wanted = best[0], _document(files[best[1]], best[2])
    copies = {
        number: [int(n) for n in np.flatnonzero(file.sizes == size) if np.array_equal(_document(file, int(n)), wanted)]
        for number, file in enumerate(files)
    }
    all_documents = sum(file.n_documents for file in files)
    return copies if sum(map(len, copies.values())) < all_documents else {}


def _document(file: TokenFile, index: int) -> NDArray[np.integer[Any]]:
    start = int(file.pointers[index]) // file.tokens.itemsize
    return file.tokens[start : start + int(file.sizes[index])]
