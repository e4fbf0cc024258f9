"""Packed tokens on disk: reader and writer of the Megatron/GPT-NeoX `.bin`/`.idx` pair and its manifest.

`.bin` holds the token ids of all sequences one after another. `.idx` says where each begins (little endian)::

    9 bytes   magic "MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     dtype code of .bin: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float32, 7 float64, 8 uint16
    uint64    S, number of sequences
    uint64    D, number of document-index entries
    int32[S]  sizes, in tokens
    int64[S]  pointers, in bytes from the start of .bin
    int64[D]  document index: document d is sequences doc_idx[d] .. doc_idx[d + 1]; D = documents + 1

Our own files hold one sequence per document, each ending with the end-of-document token. Pythia's published
pre-shuffled files hold rows of 2,049 tokens, each of them one training sample.
"""

import contextlib
import glob
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sinkpretrain import __version__
from sinkpretrain.errors import UserError
from sinkpretrain.files import disk_faults, sha256_file, sync_folder, write_json

MAGIC = b"MMIDIDX\x00\x00"
INDEX_VERSION = 1
MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
TOKENIZER_NAME = "tokenizer.json"

_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float32,
    7: np.float64,
    8: np.uint16,
}
_UINT16_VOCABULARY = 65_500  # Megatron's threshold: below it token ids are stored in two bytes
_CHUNK = 1 << 20  # elements handled at once wherever a whole file is walked, so that memory stays flat


@dataclass(frozen=True, eq=False)
class TokenFile:
    """A memory-mapped `.bin`/`.idx` pair; opening costs the same whatever its size.

    Attributes:
        prefix: path without suffix
        tokens: read-only [n_tokens], in the dtype on disk
        sizes: int32 [sequences], tokens per sequence
        pointers: int64 [sequences], bytes from the start of .bin
        doc_idx: int64 [documents + 1], first sequence of each document
    """

    prefix: Path
    tokens: NDArray[Any]
    sizes: NDArray[np.int32]
    pointers: NDArray[np.int64]
    doc_idx: NDArray[np.int64]

    @classmethod
    def open(cls, prefix: Path | str) -> "TokenFile":
        """Map the pair at `prefix` (a path ending in .bin or .idx will do).

        Raises:
            UserError: either file is missing, truncated, not of this format, or they do not belong together.
        """
        prefix = _without_suffix(Path(prefix))
        bin_path, idx_path = _pair(prefix)
        # Pythia's files are published in numbered parts, whose bytes follow each other.
        parts = sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}-*-of-*.bin"))
        if parts and not bin_path.is_file():
            raise UserError(
                f"{bin_path} lies in parts, {parts[0].name} and so on ({len(parts)}): join them first, as in "
                f"cat {prefix}-*-of-*.bin > {bin_path}."
            )
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise UserError(f"token file {path} does not exist: give the path of a .bin/.idx pair, or run prepare.")
        dtype, sizes, pointers, doc_idx = _map_index(idx_path)
        n_bytes = bin_path.stat().st_size
        # The last sequence ends where the file ends: this one comparison catches a truncated .bin without
        # reading gigabytes of index.
        expected = int(pointers[-1]) + int(sizes[-1]) * dtype.itemsize if len(sizes) else 0
        if n_bytes != expected:
            raise UserError(
                f"{bin_path} has {n_bytes} bytes but its .idx describes {expected}: "
                "the file is truncated or belongs to another .idx, copy or prepare it again."
            )
        tokens = _map(bin_path, dtype, 0, n_bytes // dtype.itemsize)
        return cls(prefix, tokens, sizes, pointers, doc_idx)

    def __reduce__(self) -> tuple[Callable[[Path], "TokenFile"], tuple[Path]]:
        # numpy would pickle the whole file into a worker process; the path is enough.
        return TokenFile.open, (self.prefix,)

    def expect_scattered_reads(self, scattered: bool) -> None:
        """Tell the kernel whether reads jump about: it would otherwise fetch up to megabytes around each of them."""
        mapping = getattr(self.tokens, "_mmap", None)
        if mapping is not None and hasattr(mmap, "MADV_RANDOM"):
            mapping.madvise(mmap.MADV_RANDOM if scattered else mmap.MADV_NORMAL)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return max(len(self.doc_idx) - 1, 0)

    @cached_property
    def row_length(self) -> int | None:
        """The length common to all sequences, None where they differ or there are none."""
        if not len(self.sizes) or int(self.sizes[0]) * len(self.sizes) != self.n_tokens:
            return None
        first = self.sizes[0]
        same = all((self.sizes[i : i + _CHUNK] == first).all() for i in range(0, len(self.sizes), _CHUNK))
        return int(first) if same else None

    def n_samples(self, context: int) -> int:
        """Training samples of `context + 1` tokens: the rows, or the windows that overlap by one token."""
        if self.row_length == context + 1:
            return len(self.sizes)
        return max(self.n_tokens - 1, 0) // context

    def samples(self, indices: NDArray[np.integer[Any]], context: int) -> NDArray[np.int64]:
        """Samples by index: row i where rows are samples, else `context + 1` tokens from `context * i` on.

        Args:
            indices: integers [n], each in 0 .. n_samples(context) - 1
            context: tokens that the model reads

        Returns:
            int64 [n, context + 1]

        Raises:
            IndexError: an index is negative or beyond the last sample.
        """
        indices = np.asarray(indices, dtype=np.int64)
        n_samples = self.n_samples(context)
        if not len(indices):
            return np.empty((0, context + 1), dtype=np.int64)
        if indices.min() < 0 or indices.max() >= n_samples:
            raise IndexError(f"sample indices {indices.min()} .. {indices.max()} of {n_samples} in {self.prefix}")
        stride = context + 1 if self.row_length == context + 1 else context
        windows = np.lib.stride_tricks.sliding_window_view(self.tokens, context + 1)[::stride]
        return np.asarray(windows[indices], dtype=np.int64)

    def document_bounds(self) -> NDArray[np.int64]:
        """Where documents begin, int64 [documents + 1]: document d is tokens [bounds[d], bounds[d + 1]).

        A file without a document index counts every sequence as a document; what an index of another maker leaves out
        in front of its first document or behind its last is a document of its own.

        Raises:
            UserError: the document index points outside the file.
        """
        starts = np.append(self.pointers // self.tokens.itemsize, self.n_tokens)
        if len(self.doc_idx) < 2:
            return starts
        doc_idx = np.asarray(self.doc_idx)
        if doc_idx[0] < 0 or doc_idx[-1] > len(self.sizes) or (np.diff(doc_idx) < 0).any():
            raise UserError(f"{_pair(self.prefix)[1]} has a document index outside the file: prepare it again.")
        if doc_idx[0] > 0:
            doc_idx = np.insert(doc_idx, 0, 0)
        if doc_idx[-1] < len(self.sizes):
            doc_idx = np.append(doc_idx, len(self.sizes))
        return starts[doc_idx]


class TokenWriter:
    """Writes a `.bin`/`.idx` pair in bounded memory; the pair appears at `close`, whole, or not at all.

    Used as a context manager. An exception inside removes what was begun and leaves an older pair untouched.
    `extend` and `end_document` serve documents too large to hold in memory.

    Args:
        prefix: path without suffix; its folder is created
        vocab_size: number of token ids; below 65,500 ids are stored as uint16, else as int32

    Raises:
        UserError: the disk is full, an id is outside the vocabulary, or a document exceeds 2**31 - 1 tokens.
    """

    def __init__(self, prefix: Path | str, vocab_size: int) -> None:
        self.prefix = _without_suffix(Path(prefix))
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)
        self.n_documents = 0
        self.n_tokens = 0
        self._vocab_size = vocab_size
        self._open_tokens = 0  # of the document that `extend` has begun
        self._temporaries = [path.with_name(path.name + ".tmp") for path in _pair(self.prefix)]
        with disk_faults(self.prefix):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin, self._idx = (path.open("w+b", buffering=_CHUNK) for path in self._temporaries)
            self._idx.write(bytes(_HEADER.size))  # filled in at close, when the counts are known

    def add_document(self, ids: ArrayLike) -> None:
        """Append one document: integers [tokens], its end-of-document token included."""
        self.extend(ids)
        self.end_document()

    def add_documents(self, flat_ids: ArrayLike, sizes: ArrayLike) -> None:
        """Append documents laid end to end: integers [sum(sizes)] and sizes [documents]."""
        sizes = np.asarray(sizes, dtype=np.int64)
        assert not self._open_tokens, "a document begun with extend is still open"
        count = self._append_tokens(flat_ids)
        assert count == sizes.sum(), f"{count} tokens given, sizes sum to {sizes.sum()}"
        self._append_sizes(sizes)

    def extend(self, ids: ArrayLike) -> None:
        """Append a part of a document: integers [tokens]."""
        self._open_tokens += self._append_tokens(ids)

    def end_document(self) -> None:
        """Close the document that `extend` has begun."""
        self._append_sizes(np.array([self._open_tokens]))
        self._open_tokens = 0

    def add_file(self, file: TokenFile, start: int = 0, stop: int | None = None) -> None:
        """Append sequences start .. stop - 1 of another file (all of them by default), in bounded memory."""
        assert not self._open_tokens, "a document begun with extend is still open"
        stop = len(file.sizes) if stop is None else stop
        if start >= stop:
            return
        first = int(file.pointers[start]) // file.tokens.itemsize
        last = int(file.pointers[stop - 1]) // file.tokens.itemsize + int(file.sizes[stop - 1])
        for begin in range(first, last, _CHUNK):
            self._append_tokens(file.tokens[begin : min(begin + _CHUNK, last)])
        for begin in range(start, stop, _CHUNK):
            self._append_sizes(file.sizes[begin : min(begin + _CHUNK, stop)])

    def close(self) -> None:
        """Make the pair durable and visible.

        The .idx is what makes a pair: an old one goes first and the new one comes last, so that whatever
        happens in between there is never an .idx beside the wrong .bin.
        """
        assert not self._open_tokens, "a document begun with extend is still open"
        bin_path, idx_path = _pair(self.prefix)
        try:
            with disk_faults(self.prefix):
                self._finish_index()
                for file in (self._bin, self._idx):
                    file.flush()
                    os.fsync(file.fileno())
                    file.close()
                idx_path.unlink(missing_ok=True)
                self._temporaries[0].replace(bin_path)
                self._temporaries[1].replace(idx_path)
                sync_folder(self.prefix.parent)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the temporaries; an older pair stays."""
        for file in (self._bin, self._idx):
            with contextlib.suppress(OSError):  # a full disk fails the last flush once more
                file.close()
        for path in self._temporaries:
            path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _append_tokens(self, ids: ArrayLike) -> int:
        array = np.asarray(ids)
        if len(array) == 0:
            return 0
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self._vocab_size:
            raise UserError(
                f"token id {high if low >= 0 else low} is outside the vocabulary of {self._vocab_size} ids "
                f"while writing {self.prefix}.bin: check that the tokenizer is the right one."
            )
        with disk_faults(self.prefix):
            self._bin.write(np.ascontiguousarray(array, dtype=self.dtype).data)
        self.n_tokens += len(array)
        return len(array)

    def _append_sizes(self, sizes: NDArray[np.integer[Any]]) -> None:
        if len(sizes) and sizes.max() > np.iinfo(np.int32).max:
            raise UserError(f"a document of {sizes.max()} tokens exceeds the .idx format (2**31 - 1): split it.")
        with disk_faults(self.prefix):
            self._idx.write(sizes.astype("<i4").data)
        self.n_documents += len(sizes)

    def _finish_index(self) -> None:
        """Append pointers and document index to the sizes already written, then fill in the header."""
        self._idx.flush()
        sizes = _map(self._temporaries[1], np.dtype("<i4"), _HEADER.size, self.n_documents)
        start = 0
        for begin in range(0, self.n_documents, _CHUNK):
            ends = start + np.cumsum(sizes[begin : begin + _CHUNK], dtype="<i8") * self.dtype.itemsize
            self._idx.write(np.concatenate(([start], ends[:-1])).astype("<i8").data)
            start = int(ends[-1])
        for begin in range(0, self.n_documents + 1, _CHUNK):
            self._idx.write(np.arange(begin, min(begin + _CHUNK, self.n_documents + 1), dtype="<i8").data)
        code = next(code for code, dtype in _DTYPES.items() if dtype == self.dtype)
        self._idx.seek(0)
        self._idx.write(_HEADER.pack(MAGIC, INDEX_VERSION, code, self.n_documents, self.n_documents + 1))


@dataclass
class SplitRecord:
    """What the manifest says of one split.

    Attributes:
        documents: documents written
        tokens: tokens written, end-of-document tokens included
        end_of_document: how often the end-of-document id occurs
        skipped_documents: source documents left out because they were empty or one token long
        max_token_id: largest id that occurs, -1 in an empty split
        sha256_bin: of the .bin file
        sha256_idx: of the .idx file
    """

    documents: int
    tokens: int
    end_of_document: int
    skipped_documents: int
    max_token_id: int
    sha256_bin: str
    sha256_idx: str


@dataclass
class Manifest:
    """Where a folder of packed tokens comes from and what it holds.

    Attributes:
        tokenizer_sha256: of the folder's tokenizer.json
        tokenizer_size: number of token ids, added tokens included (50277 for Pythia's)
        eod_id: id of the end-of-document token
        source: one description per source
        splits: "train" and, where there is one, "validation"
        settings: what decided the content, for telling a repeated command from a different one
        format_version: of this file
        created_by: package and version that wrote it
        tokens_per_second: of the run that returned this manifest; not stored
    """

    tokenizer_sha256: str
    tokenizer_size: int
    eod_id: int
    source: list[dict[str, Any]]
    splits: dict[str, SplitRecord]
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = MANIFEST_VERSION
    created_by: str = f"sinkpretrain {__version__}"
    tokens_per_second: float | None = field(default=None, compare=False)

    @classmethod
    def load(cls, directory: Path | str) -> "Manifest":
        """Read `manifest.json`.

        Raises:
            UserError: it is missing, unreadable, or of a version this release does not know.
        """
        path = Path(directory) / MANIFEST_NAME
        if not path.is_file():
            raise UserError(f"{directory} has no {MANIFEST_NAME}: run prepare to make a folder of packed tokens.")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = raw["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a manifest ({error!r}): run prepare again.") from error
        if version != MANIFEST_VERSION:
            raise UserError(
                f"{path} has format version {version} and this release reads {MANIFEST_VERSION}: "
                "use the release that wrote it, or run prepare again."
            )
        try:
            raw["splits"] = {name: SplitRecord(**record) for name, record in raw["splits"].items()}
            return cls(**raw)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is not a complete manifest ({error}): run prepare again.") from error

    def save(self, directory: Path | str) -> None:
        """Write `manifest.json` atomically."""
        stored = asdict(self)
        del stored["tokens_per_second"]
        write_json(Path(directory) / MANIFEST_NAME, stored)

    def data_hash(self, split: str) -> str:
        """One sha256 for the content of a split: ids and sequence boundaries."""
        record = self.split(split)
        return hashlib.sha256((record.sha256_bin + record.sha256_idx).encode()).hexdigest()

    def split(self, name: str) -> SplitRecord:
        """The record of a split.

        Raises:
            UserError: the manifest has no such split.
        """
        if name not in self.splits:
            known = ", ".join(self.splits)
            raise UserError(f"the packed tokens have no split {name!r}, only {known}: choose one or prepare it.")
        return self.splits[name]


def open_split(directory: Path | str, split: str) -> TokenFile:
    """Open one split of a folder written by prepare and check it against the manifest.

    Raises:
        UserError: a file is missing, truncated or does not agree with the manifest.
    """
    record = Manifest.load(directory).split(split)
    file = TokenFile.open(Path(directory) / split)
    if (file.n_documents, file.n_tokens) != (record.documents, record.tokens):
        raise UserError(
            f"{file.prefix}.bin holds {file.n_documents} documents and {file.n_tokens} tokens but "
            f"{MANIFEST_NAME} says {record.documents} and {record.tokens}: they do not belong together, "
            "run prepare again."
        )
    if int(file.sizes.sum(dtype=np.int64)) != file.n_tokens:
        raise UserError(f"{file.prefix}.idx has sizes that do not sum to the length of .bin: run prepare again.")
    return file


def verify(directory: Path | str, only: str = "") -> list[str]:
    """Re-read everything in a folder written by prepare, or ``only`` one split; one sentence per problem, none if all
    is well.

    Raises:
        UserError: there is no readable manifest to verify against.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    expected = {TOKENIZER_NAME: manifest.tokenizer_sha256}
    problems = []
    for split in [only] if only else manifest.splits:
        record = manifest.split(split)
        expected |= {f"{split}.bin": record.sha256_bin, f"{split}.idx": record.sha256_idx}
        try:
            problems += _index_problems(open_split(directory, split))
        except UserError as error:
            problems.append(str(error))
    for name, sha256 in expected.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{path} is missing.")
        elif sha256_file(path) != sha256:
            problems.append(f"{path} has changed since it was written: its sha256 is not the manifest's.")
    return problems


def summarise(file: TokenFile, eod_id: int, skipped_documents: int) -> SplitRecord:
    """Count and hash a finished pair for the manifest; reads it in chunks."""
    bin_path, idx_path = _pair(file.prefix)
    end_of_document, max_token_id = 0, -1
    for begin in range(0, file.n_tokens, _CHUNK):
        chunk = file.tokens[begin : begin + _CHUNK]
        end_of_document += int(np.count_nonzero(chunk == eod_id))
        max_token_id = max(max_token_id, int(chunk.max()))
    return SplitRecord(
        documents=file.n_documents,
        tokens=file.n_tokens,
        end_of_document=end_of_document,
        skipped_documents=skipped_documents,
        max_token_id=max_token_id,
        sha256_bin=sha256_file(bin_path),
        sha256_idx=sha256_file(idx_path),
    )


def _without_suffix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _pair(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _map(path: Path, dtype: np.dtype[Any], offset: int, length: int) -> NDArray[Any]:
    if not length:  # an empty range cannot be mapped
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(length,))


def _map_index(
    path: Path,
) -> tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Dtype of the tokens, sizes, pointers and document index of an .idx file."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if not header.startswith(MAGIC):
        raise UserError(f"{path} does not begin like a Megatron/GPT-NeoX .idx file: give the path of such a pair.")
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is truncated inside its header: copy or prepare it again.")
    _, version, code, n_sequences, n_entries = _HEADER.unpack(header)
    if version != INDEX_VERSION:
        raise UserError(f"{path} has .idx version {version} and only {INDEX_VERSION} is known: convert the file.")
    if code not in _DTYPES or not issubclass(_DTYPES[code], np.integer):
        raise UserError(f"{path} has dtype code {code}, which is no integer type: prepare the tokens again.")
    pointers_at = _HEADER.size + 4 * n_sequences
    doc_idx_at = pointers_at + 8 * n_sequences
    expected = doc_idx_at + 8 * n_entries
    if n_bytes != expected:
        raise UserError(
            f"{path} has {n_bytes} bytes but its header describes {expected}: it is truncated or damaged, "
            "copy or prepare it again."
        )
    return (
        np.dtype(_DTYPES[code]).newbyteorder("<"),
        _map(path, np.dtype("<i4"), _HEADER.size, n_sequences),
        _map(path, np.dtype("<i8"), pointers_at, n_sequences),
        _map(path, np.dtype("<i8"), doc_idx_at, n_entries),
    )


def _index_problems(file: TokenFile) -> list[str]:
    """Whether every pointer is where the sizes before it end; at most one sentence."""
    end = 0
    for begin in range(0, len(file.sizes), _CHUNK):
        ends = end + np.cumsum(file.sizes[begin : begin + _CHUNK], dtype=np.int64) * file.tokens.itemsize
        starts = np.concatenate(([end], ends[:-1]))
        if (starts != file.pointers[begin : begin + _CHUNK]).any():
            return [f"{file.prefix}.idx has sizes and pointers that disagree."]
        end = int(ends[-1])
    return []
