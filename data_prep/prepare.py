"""Text to packed tokens, in parallel, in bounded memory, restartable at any point.

    source --> batches of documents --> worker processes --> shards in source order --> .bin/.idx per split

The main process reads and writes, the workers encode. Everything a worker returns is put back into source
order, so the output does not depend on the number of workers. A shard counts once its record is written; a
restart drops whatever lacks one and continues behind the last.
"""

import contextlib
import fcntl
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.batches import group, read_parts
from data_prep.pool import available_cores, encode_batches
from data_prep.shards import SPLITS, TRAIN, VALIDATION, Shard, ShardRecord, complete_shards, drop_shards, merge
from data_prep.sources import FileUnit, HubOptions, Source, Unit, resolve
from data_prep.tokenizer import (
    TokenizerFile,
    load_tokenizer,
    splits_at_words,
    train_tokenizer,
    training_size,
)
from sinkpretrain.errors import UserError
from sinkpretrain.files import write_bytes
from sinkpretrain.progress import ProgressBar
from sinkpretrain.tokens import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
)

TRAINING_CHARACTERS = 50_000_000  # sample that a tokenizer is trained on
_LOCK = "lock"
_RECORD = "prepare.json"
_MARKS = "units"  # in the record, beside the settings


@dataclass
class PrepareConfig:
    """Turn text into packed tokens.

    Args:
        source: files, folders or globs (.jsonl, .json, .parquet, .txt, .md, .rst, .py, also .gz .xz .zst), or
            Hub data sets, read in the order given; ``hub:NAME`` is a data set even if a folder has that name.
        out: folder for train.bin/.idx, validation.bin/.idx, tokenizer.json and manifest.json.
        tokenizer: a tokenizer.json, a folder that holds one, or the name of a model on the Hub.
        train_tokenizer: train a byte-level BPE tokenizer on the source instead; ``bpe:4096`` has 4,096 ids.
        column: field of the JSON objects, or column of the table, that holds the text.
        split: split of a Hub data set.
        subset: configuration name of a Hub data set.
        revision: commit, tag or branch of a Hub data set; the newest commit if not given.
        streaming: read a Hub data set while it downloads instead of downloading it first.
        eod_token: token put after every document; if not given, ``<|endoftext|>`` or the tokenizer's eos.
        validation_source: text for validation, in any form that ``source`` takes (of a Hub data set its
            validation split); ``validation_fraction`` is then not used.
        validation_fraction: share of the documents set aside for validation, chosen by a hash of the content
            so that copies of one land on the same side. Where that chooses none, the smallest document that
            holds this share of the tokens is taken, with its copies.
        seed: of that choice.
        workers: processes that encode; 0 means one per available core.
        shard_tokens: tokens after which the work done so far is made safe against an interruption.
        limit_documents: stop after this many documents of ``source``; 0 means all.
        overwrite: replace a folder that was prepared with other settings.
    """

    source: list[str]
    out: Path
    tokenizer: str | None = None
    train_tokenizer: str | None = None
    column: str = "text"
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    streaming: bool = False
    eod_token: str | None = None
    validation_source: list[str] = field(default_factory=list)
    validation_fraction: float = 0.005
    seed: int = 0
    workers: int = 0
    shard_tokens: int = 1 << 24
    limit_documents: int = 0
    overwrite: bool = False


def prepare(config: PrepareConfig) -> Manifest:
    """Write the packed tokens that `config` describes; the same call continues an interrupted one.

    A folder that is already finished with the same settings is left as it is.

    Raises:
        UserError: bad settings, unreadable text, a full disk, or a folder prepared with other settings.
    """
    _check(config)
    out, shards = config.out, config.out / ".shards"
    hub = HubOptions(config.split, config.subset, config.revision, config.streaming)
    sources = [(TRAIN, resolve(name, config.column, hub)) for name in config.source]
    validation_hub = replace(hub, split=VALIDATION)
    sources += [(VALIDATION, resolve(name, config.column, validation_hub)) for name in config.validation_source]
    _require_held_out(sources)
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    eod_id = given.eod_id(config.eod_token) if given else None
    settings = _settings(config, sources, given, eod_id)

    if (out / MANIFEST_NAME).is_file():
        manifest = Manifest.load(out)
        difference = _difference(manifest.settings, settings)
        if not config.overwrite:
            if difference:
                raise _other_settings(out, difference)
            if shards.exists():  # the run that finished was killed while tidying up
                with _locked(shards):
                    shutil.rmtree(shards)
            print(f"{out} is already prepared with these settings.", file=sys.stderr)
            return manifest
    elif (out / "train.bin").exists() and not shards.exists() and not config.overwrite:
        raise UserError(f"{out} holds a train.bin of unknown origin: choose another --out or give --overwrite.")

    shards.mkdir(parents=True, exist_ok=True)
    with _locked(shards):
        try:
            _open_record(config, sources, shards, settings)
            tokenizer = given or _trained_tokenizer(config, sources, shards)
            manifest = _write(config, sources, tokenizer, shards, settings)
            shutil.rmtree(shards)
        except UserError:
            _remove_if_useless(shards)
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command continues where this one stopped.") from None
    return manifest


def _write(
    config: PrepareConfig,
    sources: list[tuple[str, Source]],
    tokenizer: TokenizerFile,
    shards: Path,
    settings: dict[str, Any],
) -> Manifest:
    """Encode what is missing, merge, and put the result in place."""
    eod_id = tokenizer.eod_id(config.eod_token)
    speed = _encode(config, sources, tokenizer, eod_id, shards)
    fallback = 0.0 if config.validation_source else config.validation_fraction
    merged, splits = merge(shards, tokenizer.size(), eod_id, fallback)
    manifest = Manifest(
        tokenizer_sha256=tokenizer.sha256,
        tokenizer_size=tokenizer.size(),
        eod_id=eod_id,
        source=[{"role": role, **source.description} for role, source in sources],
        splits=splits,
        settings=settings,
        tokens_per_second=speed,
    )
    _publish(manifest, merged, config.out, tokenizer)
    _say_forged_ends(manifest)
    return manifest


def _say_forged_ends(manifest: Manifest) -> None:
    """Warn where text holds the end-of-document token, which special tokens are kept from but others are not."""
    inside = sum(record.end_of_document - record.documents for record in manifest.splits.values())
    if inside:
        warnings.warn(
            f"the end-of-document token {manifest.eod_id} also occurs inside documents ({inside:,} times), where it "
            "reads as an end: name another with --eod-token, or make it special in the tokenizer.",
            stacklevel=3,
        )


def describe(manifest: Manifest) -> str:
    """Summary of a prepared folder, some lines of text."""
    lines = []
    for name, record in manifest.splits.items():
        skipped = f", {record.skipped_documents:,} empty or one-token documents skipped" * bool(
            record.skipped_documents
        )
        lines.append(
            f"{name:<11}{record.tokens:>16,} tokens in {record.documents:,} documents{skipped}   {name}.bin, {name}.idx"
        )
    size, eod = manifest.tokenizer_size, manifest.eod_id
    lines.append(f"tokenizer  {size:>16,} ids, end of document is {eod}   {TOKENIZER_NAME}")
    if manifest.tokens_per_second:
        lines.append(f"speed      {manifest.tokens_per_second:>16,.0f} tokens/s")
    return "\n".join(lines)


# Settings: what decides the output, and whether an earlier run had the same


def _check(config: PrepareConfig) -> None:
    if not config.source or "" in (*config.source, *config.validation_source):
        raise UserError("no source given: name files, a folder or a Hub data set with --source.")
    if bool(config.tokenizer) == bool(config.train_tokenizer):
        raise UserError("give either --tokenizer or --train-tokenizer (for example bpe:4096), and not both.")
    if config.train_tokenizer:
        training_size(config.train_tokenizer)
    if not 0 <= config.validation_fraction < 1:
        raise UserError(f"--validation-fraction {config.validation_fraction} is not in [0, 1): choose say 0.005.")
    for name, least in (("workers", 0), ("shard_tokens", 1), ("limit_documents", 0)):
        if getattr(config, name) < least:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(config, name)} is too small: choose {least} or more.")


def _require_held_out(sources: list[tuple[str, Source]]) -> None:
    """Refuse files that are to be trained on and validated on."""
    files = [(role, unit.path) for role, source in sources for unit in source.units if isinstance(unit, FileUnit)]
    held_out = {path.resolve() for role, path in files if role == VALIDATION}
    for role, path in files:
        if role == TRAIN and path.resolve() in held_out:
            raise UserError(f"{path} is in --source and in --validation-source: leave it out of one of them.")


def _settings(
    config: PrepareConfig,
    sources: list[tuple[str, Source]],
    tokenizer: TokenizerFile | None,
    eod_id: int | None,
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        field_name: [_identity(source) for r, source in sources if r == role]
        for field_name, role in (("source", TRAIN), ("validation_source", VALIDATION))
    }
    settings |= {
        "tokenizer": tokenizer.sha256 if tokenizer else None,
        "eod_token": eod_id if tokenizer else config.eod_token,
    }
    for name in ("train_tokenizer", "column", "streaming", "validation_fraction", "seed", "limit_documents"):
        settings[name] = getattr(config, name)
    return settings


def _identity(source: Source) -> dict[str, Any]:
    """What makes a source the same: of files their names, sizes and times, not where they lie."""
    ignored = ("name",) if source.description["kind"] == "files" else ()
    return {key: value for key, value in source.description.items() if key not in ignored}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Name of the first setting that differs, with both values."""
    for name in new:
        if old.get(name) != new[name]:
            before, after = (_shown(value) for value in (old.get(name), new[name]))
            return f"{name} ({before} then, {after} now{', changed' * (before == after)})"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, list):  # sources
        sizes = ("files", "bytes")
        return (
            " and ".join(", ".join(f"{v[k]:,} {k}" for k in sizes if k in v) or str(v.get("name")) for v in value)
            or "none"
        )
    return json.dumps(value)[:200]


def _other_settings(out: Path, difference: str) -> UserError:
    return UserError(
        f"{out} was prepared with another {difference}: choose another --out, or restore the setting; "
        "prepare --overwrite replaces it."
    )


def _open_record(
    config: PrepareConfig, sources: list[tuple[str, Source]], shards: Path, settings: dict[str, Any]
) -> None:
    """Note the settings in a new shards folder, or check that an interrupted run had the same.

    Source files may have changed since (one was repaired): what was made of those in front of them is kept. So it is
    for another list of sources, but only if `overwrite` allows to lose the rest.
    """
    path = shards / _RECORD
    marks = [[role, *mark] for role, source in sources for mark in source.marks]
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        difference = _difference(before, settings)
        if difference is None:
            return
        records, old_marks = complete_shards(shards), before.get(_MARKS, [])
        same = _common_length(old_marks, marks) if _differ_in_sources_alone(before, settings) else 0
        kept = sum(record.after.unit < same and not record.finished for record in records)
        kept = kept if kept and _same_tokenizer(config, sources, shards) else 0
        named_the_same = [mark[:2] for mark in old_marks] == [mark[:2] for mark in marks]
        if records and not config.overwrite and not (kept and named_the_same):
            raise _other_settings(shards.parent, difference)
        if kept:
            print("the sources have changed: what was made of those before the first change is kept", file=sys.stderr)
            drop_shards(shards, kept)
        else:
            for file in shards.iterdir():
                if file.is_dir():
                    shutil.rmtree(file)
                elif file.name != _LOCK:
                    file.unlink()
    write_bytes(path, json.dumps(settings | {_MARKS: marks}).encode())


def _differ_in_sources_alone(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old.get(name) == new[name] for name in new if name not in ("source", "validation_source"))


def _common_length(a: list[Any], b: list[Any]) -> int:
    """How many of their first elements are the same."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@contextlib.contextmanager
def _locked(shards: Path) -> Iterator[None]:
    """Keep a second run out of the same folder; the lock ends with the process, however that ends."""
    with (shards / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is preparing {shards.parent}: wait or choose another --out.") from error
        yield


def _trained_tokenizer(config: PrepareConfig, sources: list[tuple[str, Source]], shards: Path) -> TokenizerFile:
    path = shards / TOKENIZER_NAME
    if not path.is_file():
        write_bytes(path, _train_tokenizer(config, sources).content)
    return TokenizerFile(path.read_bytes())


def _same_tokenizer(config: PrepareConfig, sources: list[tuple[str, Source]], shards: Path) -> bool:
    """Whether the sources, which have changed, still train the tokenizer that the shards were encoded with."""
    return not config.train_tokenizer or _train_tokenizer(config, sources) == _trained_tokenizer(
        config, sources, shards
    )


def _train_tokenizer(config: PrepareConfig, sources: list[tuple[str, Source]]) -> TokenizerFile:
    assert config.train_tokenizer
    units = [unit for role, source in sources if role == TRAIN for unit in source.units]
    print(f"training a {config.train_tokenizer} tokenizer", file=sys.stderr)
    return train_tokenizer(config.train_tokenizer, _sample(units))


def _sample(units: list[Unit]) -> Iterator[str]:
    """The beginning of every unit, so that all kinds of text in a mixed source are seen."""
    budget = -(-TRAINING_CHARACTERS // len(units))
    for unit in units:
        left = budget
        for document in unit.documents():
            for block in document.blocks:
                yield block[:left]
                left -= len(block)
                if left <= 0:
                    break
            if left <= 0:
                break


def _remove_if_useless(shards: Path) -> None:
    """After a mistake of the user's, leave nothing half-written unless there is work worth continuing."""
    if not any(file.stat().st_size for file in shards.glob("*.bin")):
        shutil.rmtree(shards)
        with contextlib.suppress(OSError):  # only if nothing else is in it
            shards.parent.rmdir()


# Encoding into shards


def _encode(
    config: PrepareConfig,
    sources: list[tuple[str, Source]],
    tokenizer: TokenizerFile,
    eod_id: int,
    shards: Path,
) -> float | None:
    """Encode everything behind the last complete shard into further shards; tokens per second, if there was any."""
    started, tokens, speed = time.monotonic(), 0, None
    records = complete_shards(shards)
    record = records[-1] if records else ShardRecord()
    if record.finished:
        return None
    if records:
        print(f"continuing behind {record.train_documents:,} documents", file=sys.stderr)
    units = [(role, unit) for role, source in sources for unit in source.units]
    limits = {TRAIN: config.limit_documents - record.train_documents} if config.limit_documents else {}
    cut_long = splits_at_words(tokenizer.load())
    batches = group(read_parts(units, record.after, limits, cut_long))
    workers = config.workers or available_cores()
    fraction = 0.0 if config.validation_source else config.validation_fraction
    shard = Shard(shards, len(records), tokenizer.size(), fraction, record)
    with (
        contextlib.closing(encode_batches(batches, tokenizer, eod_id, config.seed, workers)) as results,
        contextlib.ExitStack() as undo,
        ProgressBar("reading", sum(unit.n_bytes for _, unit in units) // 1000, "kB") as bar,
    ):
        undo.callback(lambda: shard.abort())
        for batch, encoded in results:
            shard.add(batch, encoded)
            tokens += len(encoded.ids)
            speed = tokens / (time.monotonic() - started)
            done = f"{shard.record.train_documents:,} documents  {tokens:,} tokens  {speed:,.0f} tokens/s"
            bar.update(batch[-1].bytes_read // 1000, done)
            if batch[-1].is_last and shard.n_tokens >= config.shard_tokens:
                shard.commit()
                shard = shard.following()
        shard.record = replace(shard.record, finished=True)
        shard.commit()
        undo.pop_all()
    return speed


def _publish(manifest: Manifest, merged: Path, out: Path, tokenizer: TokenizerFile) -> None:
    """Put the files in place. The manifest vouches for them: the old one goes first, the new comes last."""
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for split in SPLITS:
        for suffix in (".idx", ".bin"):
            (out / (split + suffix)).unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            if split in manifest.splits:
                (merged / (split + suffix)).replace(out / (split + suffix))
    write_bytes(out / TOKENIZER_NAME, tokenizer.content)
    manifest.save(out)
