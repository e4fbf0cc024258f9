"""Where text comes from: local files in several formats, plain or compressed, and Hugging Face data sets.

A source is a list of units (files or one data set), each a sequence of documents to be entered anywhere.
A document is an iterator of text blocks, so that a single file of any size passes through in bounded memory.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import zstandard

from data_prep.hub import Answer, ask, out_of_reach
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.tokens import MANIFEST_NAME, TOKENIZER_NAME

PLAIN_TEXT = (".txt", ".md", ".rst", ".py")
FORMATS = (".jsonl", ".json", ".parquet", *PLAIN_TEXT)
COMPRESSIONS = (".gz", ".xz", ".zst")
_BLOCK = 1 << 20  # characters or bytes read at once
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Document:
    """One document: its text in blocks, and how far into the unit's bytes the reader is (for progress)."""

    blocks: Iterator[str]
    bytes_read: int


class Unit(Protocol):
    """A file or a data set."""

    @property
    def n_bytes(self) -> int:
        """Size on disk, 0 where unknown."""
        ...

    def documents(self, skip: int = 0) -> Iterator[Document]:
        """The documents from number `skip` on; each must be read before the next is asked for.

        Raises:
            UserError: the content is unreadable, naming the file and, for JSON, the line.
        """
        ...


@dataclass(frozen=True)
class HubOptions:
    """Which part of a Hugging Face data set to read."""

    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False


@dataclass(frozen=True)
class Source:
    """A resolved source.

    Attributes:
        units: in reading order
        description: for the manifest; its "fingerprint" changes when the content does
        marks: of each unit its name, and what changes when a file of that name does
    """

    units: list[Unit]
    description: dict[str, Any]
    marks: list[list[Any]]


def resolve(source: str, column: str, hub: HubOptions) -> Source:
    """Find what a source names: a file, a folder, a glob, or a data set on the Hub.

    A name that exists locally is a file or folder; "hub:<name>" always goes through `datasets`.

    Raises:
        UserError: nothing is found, or a file has an unknown format.
    """
    if source.startswith(_HUB_PREFIX):
        return _hub_source(source.removeprefix(_HUB_PREFIX), column, hub)
    files = _find_files(source)
    if files:
        return _file_source(source, files, column)
    if _HUB_NAME.fullmatch(source) and not source.endswith(FORMATS + COMPRESSIONS):
        return _hub_source(source, column, hub)
    raise UserError(f"source {source} matches no file: give files, a folder, a glob or the name of a Hub data set.")


@dataclass(frozen=True)
class FileUnit:
    """Documents of one file: a line of .jsonl, an object of .json, a row of .parquet, or a text file."""

    path: Path
    column: str
    n_bytes: int

    def documents(self, skip: int = 0) -> Iterator[Document]:
        kind = _format_of(self.path)
        with _readable(self.path), self.path.open("rb") as raw:
            if kind == ".parquet":
                yield from self._parquet(raw, skip)
                return
            stream = _decompressed(self.path, raw)
            if kind == ".jsonl":
                texts = self._lines(stream, skip)
            elif kind == ".json":
                texts = self._objects(stream, skip)
            else:
                if not skip:
                    yield Document(_plain_text(self.path, stream), self.n_bytes)
                return
            for text in texts:
                yield Document(iter((text,)), raw.tell())

    def _lines(self, stream: IO[bytes], skip: int) -> Iterator[str]:
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            if skip:  # counted, not parsed
                skip -= 1
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise self._bad_json(number, error) from error
            yield self._text(value, f"line {number}")

    def _objects(self, stream: IO[bytes], skip: int) -> Iterator[str]:
        """Objects of a JSON array, or written one after another, without holding more than one of them."""
        for number, value in _json_values(io.TextIOWrapper(stream, encoding="utf-8-sig"), self._bad_json):
            if skip:
                skip -= 1
                continue
            yield self._text(value, f"line {number}")

    def _parquet(self, raw: IO[bytes], skip: int) -> Iterator[Document]:
        import pyarrow.parquet

        table = pyarrow.parquet.ParquetFile(raw)
        if self.column not in table.schema_arrow.names:
            raise _missing_column(str(self.path), self.column, table.schema_arrow.names)
        n_rows = max(table.metadata.num_rows, 1)
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[self.column]):
            values = batch.column(0).to_pylist() if row + len(batch) > skip else [None] * len(batch)
            for value in values:
                row += 1
                if row > skip:
                    text = _as_text(value, self.column, f"{self.path}, row {row}")
                    yield Document(iter((text,)), self.n_bytes * row // n_rows)

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, dict):
            raise UserError(f"{self.path}, {where}: expected an object with {self.column!r}, found {value!r:.40}.")
        if self.column not in value:
            raise _missing_column(f"{self.path}, {where}", self.column, list(value))
        return _as_text(value[self.column], self.column, f"{self.path}, {where}")

    def _bad_json(self, line: int, error: Exception) -> UserError:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return UserError(f"{self.path}, line {line}: not valid JSON ({reason}); repair or remove that line.")


@dataclass(frozen=True)
class HubUnit:
    """Documents of a Hugging Face data set."""

    name: str
    column: str
    options: HubOptions
    offline: bool = False  # the Hub is out of reach: what the cache has of it is read
    n_bytes: int = 0

    def documents(self, skip: int = 0) -> Iterator[Document]:
        import datasets  # seconds to import, needed for Hub data only

        options = self.options
        try:
            with _asking_the_hub(not self.offline):
                data = datasets.load_dataset(
                    self.name,
                    options.subset,
                    split=options.split,
                    revision=options.revision,
                    streaming=options.streaming,
                )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise UserError(
                f"data set {self.name} (subset {options.subset}, split {options.split}) cannot be loaded "
                f"({first_line(error)}): check the name, --subset, --split and the network."
            ) from error
        if data.column_names is not None:  # unknown before the first row of some streamed data sets
            if self.column not in data.column_names:
                raise _missing_column(f"data set {self.name}", self.column, data.column_names)
            data = data.select_columns([self.column])
        for batch in data.skip(skip).iter(batch_size=64):
            if self.column not in batch:
                raise _missing_column(f"data set {self.name}", self.column, list(batch))
            for value in batch[self.column]:
                yield Document(iter((_as_text(value, self.column, f"data set {self.name}"),)), 0)


def _file_source(source: str, files: list[tuple[str, Path]], column: str) -> Source:
    units: list[Unit] = []
    marks: list[list[Any]] = []
    for name, path in files:
        _format_of(path)
        status = path.stat()
        units.append(FileUnit(path, column, status.st_size))
        marks.append([name, status.st_size, status.st_mtime_ns])
    description = {
        "kind": "files",
        "name": source,
        "files": len(files),
        "bytes": sum(unit.n_bytes for unit in units),
        "fingerprint": hashlib.sha256("".join(map(json.dumps, marks)).encode()).hexdigest(),
    }
    return Source(units, description, marks)


def _hub_source(name: str, column: str, hub: HubOptions) -> Source:
    # The commit is pinned, so that a restart after an update of the data set continues with the same rows. Asked now,
    # and not by `load_dataset`, whose turn comes when the sources in front have been read.
    answer = Answer(None, None) if Path(name).exists() else ask("source", "data set", name, hub.revision)
    if answer.fault is not None and not _is_cached(name, hub):
        raise out_of_reach("source", "data set", name, answer.fault)
    hub = HubOptions(hub.split, hub.subset, answer.commit or hub.revision, hub.streaming)
    description = {
        "kind": "data set",
        "name": name,
        "subset": hub.subset,
        "split": hub.split,
        "fingerprint": hub.revision,
    }
    return Source([HubUnit(name, column, hub, offline=answer.fault is not None)], description, [[description]])


def _is_cached(name: str, hub: HubOptions) -> bool:
    """Whether a data set, or another subset of it, was loaded on this machine before."""
    import datasets

    try:
        with _asking_the_hub(False):
            datasets.load_dataset_builder(name, hub.subset, revision=hub.revision)
    except OSError:
        return False
    except ValueError:  # of another subset: load_dataset lists those that are there
        return True
    return True


@contextlib.contextmanager
def _asking_the_hub(allowed: bool) -> Iterator[None]:
    """Within, `datasets` does not ask the Hub, unless allowed (or, where the user said so, not even then)."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not allowed
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _find_files(source: str) -> list[tuple[str, Path]]:
    """Files that a source names, as (name that does not depend on where it lies, path), in a fixed order."""
    path = Path(source)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        return [(file.relative_to(path).as_posix(), file) for file in _files_below(path)]
    return [(Path(match).name, Path(match)) for match in sorted(glob.glob(source, recursive=True)) if _is_file(match)]


def _files_below(root: Path) -> list[Path]:
    """Files of known formats below a folder, each folder once however many links lead to it.

    Hidden files and folders are left out, and folders of packed tokens: their .json files are no text.

    Raises:
        UserError: there is none, or one that cannot be read (a link to nothing, a pipe).
    """
    found, others, seen = [], [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or {MANIFEST_NAME, TOKENIZER_NAME, "train.bin"} <= set(names):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files = [Path(folder) / name for name in names if not name.startswith(".")]
        found += [file for file in files if _known_format(file)]
        others += [file for file in files if not _known_format(file)]
    for file in found:
        if not file.is_file():
            what = "is a link to nothing" if file.is_symlink() and not file.exists() else "is no file that can be read"
            raise UserError(f"{file} {what}: restore it or move it out of the folder.")
    if not found:
        raise UserError(f"folder {root} holds no {', '.join(FORMATS)} file: check the path.")
    if others:
        which = f"{min(others).relative_to(root)}" + f" and {len(others) - 1:,} more" * (len(others) > 1)
        warnings.warn(f"files of other formats in {root} are not read: {which}.", stacklevel=2)
    return sorted(found)


def _is_file(path: str) -> bool:
    return Path(path).is_file()


def _known_format(path: Path) -> bool:
    inner = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return inner.suffix in FORMATS and not (inner.suffix == ".parquet" and inner != path)


def _format_of(path: Path) -> str:
    if not _known_format(path):
        raise UserError(
            f"{path} has an unknown format: supported are {', '.join(FORMATS)}, "
            f"and all but .parquet also with {', '.join(COMPRESSIONS)}."
        )
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedReader:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BLOCK)
    if path.suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw), _BLOCK)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw), _BLOCK)
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd and, unlike zstandard's own reader, notices a file that ends inside a frame."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._raw.read(1 << 16)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the compressed data ends too early")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = self._frame.decompress(data)
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n


def _plain_text(path: Path, stream: io.BufferedReader) -> Iterator[str]:
    """Blocks of a text file in UTF-8, or in UTF-16 if its mark is there (Windows); what is not that becomes U+FFFD.

    One odd file must not end a long run.
    """
    marked = stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    text = io.TextIOWrapper(stream, encoding="utf-16" if marked else "utf-8-sig", errors="replace", newline="")
    unread = 0
    while block := text.read(_BLOCK):
        unread += block.count("\ufffd")
        yield block
    if unread:
        code = "UTF-16" if marked else "UTF-8"
        message = f"{path} is not {code}: {unread:,} characters became U+FFFD; convert it (iconv) or leave it out."
        warnings.warn(message, stacklevel=2)


def _json_values(stream: IO[str], fault: Callable[[int, Exception], UserError]) -> Iterator[tuple[int, Any]]:
    """(line, value) of the elements of a JSON array, or of values written one after another."""
    decoder = json.JSONDecoder()
    buffer, line, wanted = "", 1, _BLOCK
    at_start, in_array, closed = True, False, False
    while True:
        more = stream.read(wanted)
        buffer += more
        while True:
            stripped = buffer.lstrip(" \t\r\n,]" if in_array else " \t\r\n")
            between = buffer[: len(buffer) - len(stripped)]
            line += between.count("\n")
            closed |= "]" in between
            buffer = stripped
            if at_start and buffer.startswith("["):
                at_start, in_array, buffer = False, True, buffer[1:]
                continue
            if not buffer:
                break
            at_start = False
            try:
                value, end = decoder.raw_decode(buffer)
            except (ValueError, RecursionError) as error:
                if more and isinstance(error, ValueError):
                    break  # perhaps only cut off: read on
                position = error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0
                raise fault(line + position, error) from error
            yield line, value
            line += buffer.count("\n", 0, end)
            buffer, wanted = buffer[end:], _BLOCK
        if not more:
            if in_array and not closed:
                raise fault(line, ValueError("the array is not closed"))
            return
        wanted = max(_BLOCK, len(buffer))  # doubling keeps the repeated attempts at one huge value linear


def _as_text(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""  # counted among the empty documents
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not text; choose with --column.")
    return value


def _missing_column(where: str, column: str, present: list[str]) -> UserError:
    return UserError(f"{where}: no column {column!r}, only {', '.join(map(repr, present))}; choose with --column.")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what decompressors and decoders (pyarrow's errors are ValueErrors) raise into one sentence."""
    faults = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
    try:
        yield
    except UserError:
        raise
    except faults as error:
        raise UserError(f"{path} is unreadable or damaged ({error}): copy it again or leave it out.") from error
