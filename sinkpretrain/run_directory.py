"""The run directory: made once, held by one process at a time, and refused to another configuration or other data."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sinkpretrain import outside, slurm
from sinkpretrain.checkpoint import clear_leftovers, newest_checkpoint
from sinkpretrain.config import RunConfig, load_yaml, save_yaml
from sinkpretrain.data import Tokens, bin_file
from sinkpretrain.errors import UserError
from sinkpretrain.files import exclusive, read_json, sha256_file, write_atomically, write_json
from sinkpretrain.load import numbered, read_checkpoint
from sinkpretrain.model import without_weights
from sinkpretrain.provenance import provenance
from sinkpretrain.tokens import TokenFile

FREE_TO_CHANGE = ("out", "name", "log", "data.path", "data.validation_path")
FREE_IN_TRAINING = (
    *("steps", "micro_batch", "compile", "fused", "accelerator", "devices", "nodes", "strategy", "gather"),
    *("deterministic", "max_skipped", "stall_seconds", "stop_margin"),
)
"""Settings that a resumed run may change: where and how fast it runs, how long, and what is logged. Whether moved data
are the same data is decided by their hashes."""

NEVER_TO_CHANGE = ("model.", "sink.")
"""Settings that a checkpoint's weights were made for."""


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Dotted names of the settings in which two resumable configurations differ, with both values."""
    found = []
    for field in dataclasses.fields(old):
        name = f"{where}{field.name}"
        a, b = getattr(old, field.name), getattr(new, field.name)
        if name in FREE_TO_CHANGE or name in {f"training.{f}" for f in FREE_IN_TRAINING}:
            continue
        if dataclasses.is_dataclass(a):
            found += differences(a, b, f"{name}.")
        elif a != b:
            found.append(f"{name} ({a!r} there, {b!r} here)")
    return found


@contextlib.contextmanager
def claim(run: Path, config: RunConfig, tokens: Tokens, allow_changes: bool = False) -> Iterator[None]:
    """Make the run directory, or check that it belongs to this configuration and these data, and hold it.

    Raises:
        UserError: it belongs to another one (the fields are named), is in use, or cannot be written.
    """
    seen = _state(run)
    known = _belongs(run, config, tokens, allow_changes)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory {run}: {error.strerror}.") from error
    with exclusive(run / "lock", f"{run} is in use by another process"):
        if _state(run) != seen:  # another process had it while this one waited
            known = _belongs(run, config, tokens, allow_changes)
        source = tokens.tokenizer
        if source and (known is None or not (run / "tokenizer.json").is_file()):
            write_atomically(run / "tokenizer.json", partial(shutil.copyfile, source))
        clear_leftovers(run)
        outside.keep(config.sink, run)
        write_json(run / "run.json", known or _about(config, tokens))
        # Last: a directory with a config.yaml is a complete run directory.
        write_atomically(run / "config.yaml", lambda p: save_yaml(config, p))
        yield


def note_attempt(run: Path, device: str, step: int) -> None:
    """Record that an attempt begins at a step, on which device, with which versions, in which job."""
    about = read_json(run / "run.json")
    attempt = provenance(device) | {"job": slurm.job_id(), "step": step}
    write_json(run / "run.json", about | {"attempts": [*about.get("attempts", []), attempt]})


def _belongs(run: Path, config: RunConfig, tokens: Tokens, allow_changes: bool) -> dict[str, Any] | None:
    """What run.json says, if the run directory is this configuration's; None if nothing began there; else UserError."""
    config_file = run / "config.yaml"
    if not config_file.is_file():
        if numbered(run / "checkpoints", ".ckpt") or numbered(run / "weights", ".safetensors"):
            raise UserError(
                f"{run} is a run whose config.yaml, which says what it was trained with, is missing; restore it (the "
                "one that the same command writes into a new --out is the same but for its name), or choose another "
                "--out."
            )
        # A process that was killed before the first step.
        begun = {"run.json", "tokenizer.json", "lock", outside.FOLDER}
        if run.is_dir() and any(p.name not in begun and not p.name.endswith(".tmp") for p in run.iterdir()):
            raise UserError(f"{run} holds something else than a run; choose another --out.")
        return None
    if not (run / "weights").is_dir() and not (run / "checkpoints").is_dir():
        return None  # it failed before it began: nothing there is of worth
    fields = differences(load_yaml(RunConfig, config_file), config)
    fixed = [f for f in fields if f.startswith(NEVER_TO_CHANGE)]
    if fields and (fixed or not allow_changes):
        way_out = "" if fixed else ", or give --allow-changes to go on with the new values"
        raise UserError(
            f"{run} belongs to another configuration: {', '.join(fields)}; choose another --out, or restore the "
            f"setting{way_out}."
        )
    about, identity = _read_about(run, allow_changes), tokens.identity()
    changed = [k for k in {**about["data"], **identity} if about["data"].get(k) != identity.get(k)]
    if changed and not allow_changes:
        raise UserError(
            f"{run} was trained on other data ({', '.join(changed)} differ); choose another --out, restore "
            "data.path, or give --allow-changes to go on with the new data."
        )
    edited = outside.edited(config.sink, about, run)
    if edited and not allow_changes:
        raise UserError(
            f"the code of the sink mechanism has changed since {run} was trained: {', '.join(edited)}; restore it, "
            "choose another --out, or give --allow-changes to go on with the new code."
        )
    if edited:
        _require_same_parameters(run, config)
    for split, file in _described(tokens).items():
        if about.get("stamps", {}).get(split) != _stamp(file) and f"{split}_sha256" not in changed:
            _require_as_written(tokens, file)
    if fields or changed or edited:
        warnings.warn(f"{run} goes on with changes: {', '.join([*fields, *changed, *edited])}.", stacklevel=2)
    return about | _about(config, tokens, about["wandb_id"])


def _require_same_parameters(run: Path, config: RunConfig) -> None:
    """A run may go on with other code of its mechanism, not with a mechanism whose parameters it does not have."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return
    saved = {name: tensor.shape for name, tensor in read_checkpoint(checkpoint)["state_dict"].items()}
    model = without_weights(config.model, config.sink)
    wanted = {f"model.{name}": tensor.shape for name, tensor in model.state_dict().items()}
    other = [n for n in {**saved, **wanted} if ".sink." in n and saved.get(n) != wanted.get(n)]
    if other:
        raise UserError(
            f"the new code of the sink mechanism does not fit what {run} has saved: its tensors are others "
            f"({other[0].removeprefix('model.')}, for one); restore it, or choose another --out."
        )


def _state(run: Path) -> list[bytes | None]:
    """What the files hold that say whose a run directory is."""
    files = (run / "config.yaml", run / "run.json")
    return [file.read_bytes() if file.is_file() else None for file in files]


def _about(config: RunConfig, tokens: Tokens, wandb_id: str = "") -> dict[str, Any]:
    """What run.json says about the data and the mechanism's code, and the run's name at wandb: a new one unless it has
    one."""
    stamps = {split: _stamp(file) for split, file in _described(tokens).items()}
    about: dict[str, Any] = {"data": tokens.identity(), "wandb_id": wandb_id or uuid.uuid4().hex[:12], "stamps": stamps}
    if tokens.manifest:  # which token ends a document its tokenizer.json alone need not say
        about["tokenizer_sha256"] = tokens.manifest.tokenizer_sha256
        about["end_of_document"] = tokens.manifest.eod_id
    return about | {outside.HASHES: outside.hashes(config.sink)}


def _read_about(run: Path, allow_changes: bool) -> dict[str, Any]:
    """What run.json says; raises UserError if it is damaged or gone, nothing instead where changes are allowed."""
    path = run / "run.json"
    with contextlib.suppress(UserError):
        about = read_json(path)
        if isinstance(about, dict) and isinstance(about.get("data"), dict) and isinstance(about.get("wandb_id"), str):
            return about
    if allow_changes:
        return {"data": {}, "wandb_id": ""}
    raise UserError(
        f"{path}, which says what data the run was trained on, is damaged or gone; restore it, or give --allow-changes "
        "to go on without knowing whether they are the same."
    )


def _described(tokens: Tokens) -> dict[str, TokenFile]:
    """What the run trains on and validates with, as far as a manifest has hashes of it."""
    files = {"train": tokens.train, "validation": tokens.validation}
    return {split: file for split, file in files.items() if file is not None and tokens.described(file) is not None}


def _stamp(file: TokenFile) -> list[int]:
    """What changes with the ``.bin`` or another in its place: nobody can set the last of its times, as ``cp -p`` does
    the other. Nothing if it cannot be asked."""
    with contextlib.suppress(OSError):
        status = bin_file(file).stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return []


def _require_as_written(tokens: Tokens, file: TokenFile) -> None:
    """The file was written or copied since the last attempt: read it once and compare with the manifest's hash."""
    path, record = bin_file(file), tokens.described(file)
    if record is not None and sha256_file(path) != record.sha256_bin:
        raise UserError(f"{path} has changed since it was prepared; restore it, or prepare the data again.")
