"""Data order as arithmetic: which tokens are in a batch follows from (data seed, number of the first sample) alone.

Nothing about the loader is ever saved. A checkpoint knows how many samples were seen; from there the order goes on,
whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkpretrain.config import MAX_SINK_TOKENS, DataConfig, ModelConfig
from sinkpretrain.errors import UserError
from sinkpretrain.ops import IGNORED
from sinkpretrain.tokens import MANIFEST_NAME, TOKENIZER_NAME, Manifest, SplitRecord, TokenFile, open_split

Indices = NDArray[np.int64]


class Batch(NamedTuple):
    """Token ids and the id that each position has to predict, both int64 [samples, context]."""

    ids: Tensor
    labels: Tensor


# --- order --------------------------------------------------------------------------------------------------------


def permute(indices: Indices, n: int, key: int) -> Indices:
    """A pseudo-random permutation of 0 .. n - 1, evaluated at ``indices`` only.

    A Feistel network over the smallest even number of bits that holds n, walked until it lands inside (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains"): exactly a bijection, no memory, no start-up time, however
    large the corpus.

    Args:
        indices: int64, any shape, each in 0 .. n - 1.
        n: size of the domain.
        key: which permutation.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(key).generate_state(8, np.uint64)
    out = indices.astype(np.uint64)
    outside = np.ones(out.shape, dtype=bool)
    while outside.any():
        x = out[outside]
        left, right = x >> half, x & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[outside] = (left << half) | right
        outside = out >= n
    return out.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """Which sample of the file is the g-th one of training, for any g: epochs follow each other without end."""

    n_samples: int
    seed: int
    shuffle: bool

    def __call__(self, first: int, count: int) -> Indices:
        """File indices, int64 [count], of the training samples first .. first + count - 1."""
        g = np.arange(first, first + count, dtype=np.int64)
        epochs, within = np.divmod(g, self.n_samples)
        if not self.shuffle:
            return within
        out = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            # Seed and epoch are spread apart so that (seed 1, epoch 0) is not (seed 0, epoch 1).
            out[chosen] = permute(within[chosen], self.n_samples, (self.seed << 32) + int(epoch))
        return out


# --- samples ------------------------------------------------------------------------------------------------------


def to_batch(rows: Indices, prefix: tuple[int, ...]) -> Batch:
    """Put the sinks in front of samples of context + 1 tokens and line up the targets.

    With n prefix ids the inputs are the prefix and the first context - n tokens, so that positions never exceed the
    context; the last prefix position predicts the first token, the ones before it predict nothing.
    """
    n, context = len(prefix), rows.shape[1] - 1
    if n == 0:
        return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()))
    ids = np.empty((len(rows), context), dtype=np.int64)
    labels = np.full((len(rows), context), IGNORED, dtype=np.int64)
    ids[:, :n], ids[:, n:] = prefix, rows[:, : context - n]
    labels[:, n - 1 :] = rows[:, : context - n + 1]
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels))


def shared_targets(batch: Batch, n_prefix: int) -> Batch:
    """Keep only the targets that every mechanism has: tokens 1 .. context - 27 of a sample.

    The first text token has no target without a sink, and the last ones are displaced by up to 27 sinks.
    """
    labels = batch.labels.clone()
    labels[:, :n_prefix] = IGNORED
    last = n_prefix + max(1, labels.shape[1] - MAX_SINK_TOKENS)
    labels[:, last:] = IGNORED
    return Batch(batch.ids, labels)


class Samples:
    """The samples of one token file, with the mechanism's prefix in front."""

    def __init__(self, file: TokenFile, model: ModelConfig, prefix: tuple[int, ...]) -> None:
        self.file, self.model, self.prefix = file, model, prefix
        self._stamp = stamp(file)
        self.n_samples = file.n_samples(model.context)
        if self.n_samples < 1:
            raise UserError(
                f"{file.prefix} holds {file.n_tokens:,} tokens, fewer than one sample of {model.context + 1:,}; "
                "prepare more text or lower model.context."
            )

    def require_unchanged(self) -> None:
        """Raises UserError if the file was written to since it was opened: a mapped file changes under its reader."""
        now = stamp(self.file)
        if now is not None and now != self._stamp:
            raise UserError(
                f"{bin_file(self.file)} was changed while it was being read; put it back as it was, and give the same "
                "command again to go on from the last checkpoint."
            )

    def batch(self, indices: Indices) -> Batch:
        """The samples at these file indices; raises UserError for an id that the vocabulary does not have."""
        rows = self.file.samples(indices, self.model.context)
        lowest, highest, known = int(rows.min(initial=0)), int(rows.max(initial=0)), self.model.tokenizer_size
        if lowest < 0 or highest >= known:  # files of other makers may have signed types
            raise UserError(
                f"{self.file.prefix} holds the token id {lowest if lowest < 0 else highest}, but the model's text "
                f"vocabulary is 0 .. {known - 1}; prepare the data with the tokenizer that model.tokenizer_size speaks "
                "of."
            )
        return to_batch(rows, self.prefix)


@dataclass(frozen=True)
class Stream:
    """This process's share of every optimizer step, from a given sample on, without end.

    One item is one whole step of this rank: [batch_size / world, context]. The next ones are read and pinned by a
    thread while the step runs.
    """

    samples: Samples
    order: Order
    batch_size: int
    rank: int = 0
    world: int = 1
    first_sample: int = 0
    pin: bool = False

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=2)
        closed = threading.Event()

        def fill() -> None:
            first = self.first_sample
            try:
                while _wanted(closed):
                    item = self.share(first)
                    if self.pin:
                        item = Batch(item.ids.pin_memory(), item.labels.pin_memory())
                    first += self.batch_size
                    _put(ready, item, closed)
            except BaseException as error:
                # Shown where the batch is asked for, in the training loop.
                _put(ready, error, closed)

        # Not a daemon: one that still runs while the interpreter is taken down can end the process with SIGABRT, and a
        # training that is done would count as failed.
        threading.Thread(target=fill, name="batches").start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()

    def share(self, first: int) -> Batch:
        """This rank's slice of the step whose first sample is number ``first``."""
        per_rank = self.batch_size // self.world
        self.samples.require_unchanged()  # a file cut short would end the process where it is read
        batch = self.samples.batch(self.order(first + self.rank * per_rank, per_rank))
        self.samples.require_unchanged()
        return batch


def _wanted(closed: threading.Event) -> bool:
    """Whether anybody may still ask for batches: Python waits for this thread when the main one is done."""
    return not closed.is_set() and threading.main_thread().is_alive()


def _put(ready: queue.Queue[Batch | BaseException], item: Batch | BaseException, closed: threading.Event) -> None:
    while _wanted(closed):
        try:
            ready.put(item, timeout=0.2)
        except queue.Full:
            continue
        return


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The opened data of a run. ``manifest`` and ``tokenizer`` are None for a bare ``.bin``/``.idx`` pair."""

    train: TokenFile
    validation: TokenFile | None
    manifest: Manifest | None
    tokenizer: Path | None

    def identity(self) -> dict[str, str | int]:
        """What must be the same for two runs to have seen the same data."""
        about: dict[str, str | int] = {"train_tokens": self.train.n_tokens}
        if self.manifest is None:
            about["train_fingerprint"] = fingerprint(self.train, 1 << 16)
        else:
            about |= {
                "train_sha256": self.manifest.data_hash("train"),
                "tokenizer": self.manifest.tokenizer_sha256,
            }
        if self.validation is not None:
            if self.described(self.validation) is None:
                about["validation_fingerprint"] = fingerprint(self.validation, 1 << 16)
            else:
                assert self.manifest is not None
                about["validation_sha256"] = self.manifest.data_hash(self.validation.prefix.name)
        return about

    def described(self, file: TokenFile) -> SplitRecord | None:
        """What the manifest of the training data says about a file; None if it is not of its folder."""
        name = file.prefix.name
        if self.manifest is None or file.prefix.absolute() != self.train.prefix.with_name(name).absolute():
            return None
        return self.manifest.splits.get(name)


def bin_file(file: TokenFile) -> Path:
    return file.prefix.with_name(f"{file.prefix.name}.bin")


def stamp(file: TokenFile) -> tuple[int, int] | None:
    """Size and time of the last change of the ``.bin``; None if it cannot be asked (a moved file stays mapped)."""
    try:
        status = bin_file(file).stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def fingerprint(file: TokenFile, count: int) -> str:
    """Hash of so many ids spread evenly over a file: tells data apart without reading 100 GB."""
    places = np.linspace(0, max(0, file.n_tokens - 1), min(file.n_tokens, count)).astype(np.int64)
    file.expect_scattered_reads(True)
    found = hashlib.sha256(file.tokens[places].astype("<i8").tobytes()).hexdigest()
    file.expect_scattered_reads(False)
    return found


def open_data(config: DataConfig) -> Tokens:
    """Open what the configuration names; raises UserError if it is missing, damaged or not token data."""
    if not config.path:
        raise UserError("data.path is not set; give the folder that `sinkpretrain prepare` wrote.")
    path = _lone_pair(Path(config.path))
    manifest = tokenizer = validation = None
    if path.is_dir():
        train = open_split(path, "train")
        manifest = Manifest.load(path)
        tokenizer = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else None
        if (path / "validation.idx").is_file() and not config.validation_path:
            validation = open_split(path, "validation")
    else:
        train = TokenFile.open(path)
    if config.validation_path:
        validation = _open_elsewhere(Path(config.validation_path))
    return Tokens(train, validation, manifest, tokenizer)


def _open_elsewhere(path: Path) -> TokenFile:
    """Data to validate on that are not the training data's own: a pair, or a split of another prepared folder."""
    path = _lone_pair(path)
    if not path.is_dir():
        return TokenFile.open(path)
    return open_split(path, "validation" if "validation" in Manifest.load(path).splits else "train")


def manifest_beside(file: TokenFile) -> Manifest | None:
    """The manifest of the folder that a file lies in, if it tells of the file."""
    folder = file.prefix.parent
    manifest = Manifest.load(folder) if (folder / MANIFEST_NAME).is_file() else None
    return manifest if manifest is not None and file.prefix.name in manifest.splits else None


def require_one_tokenizer(tokens: Tokens) -> None:
    """Raises UserError if data to validate on come from another tokenizer than the training data, as far as manifests
    say: a loss over ids that mean something else looks like a bad model."""
    other = None if tokens.validation is None else manifest_beside(tokens.validation)
    if other is None or tokens.manifest is None or other.tokenizer_sha256 == tokens.manifest.tokenizer_sha256:
        return
    assert tokens.validation is not None
    from data_prep.tokenizer import require_same_ids

    folder = tokens.validation.prefix.parent
    require_same_ids(
        tokens.tokenizer,
        folder / TOKENIZER_NAME,
        f"{folder} was prepared with another tokenizer than the training data",
        "prepare it with theirs, or leave data.validation_path out",
    )


def _lone_pair(path: Path) -> Path:
    """The prefix of the one pair in a folder that ``prepare`` did not write, as Pythia's are published; or ``path``."""
    pairs = sorted(p.with_suffix("") for p in path.glob("*.idx"))
    # A folder of ``prepare`` that lost its manifest is no bare pair: its tokenizer and validation would be lost unsaid.
    if (path / MANIFEST_NAME).exists() or not pairs or {p.name for p in pairs} & {"train", "validation"}:
        return path
    if len(pairs) > 1:
        raise UserError(
            f"{path} has several token files and no {MANIFEST_NAME}: give one of them, for example {pairs[0]}."
        )
    return pairs[0]


def training_order(config: DataConfig, samples: Samples) -> Order:
    """Shuffled, unless the configuration says otherwise or the file's rows are samples in an order of their own."""
    shuffle = config.shuffle
    if shuffle is None:
        shuffle = samples.file.row_length != samples.model.context + 1
    return Order(samples.n_samples, config.seed, shuffle)
