"""One way to name a model everywhere: a run directory, a checkpoint, a Hugging Face folder or a name of its Hub."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkpretrain import hf, outside, sinks
from sinkpretrain.config import ModelConfig, RunConfig, SinkConfig, from_dict, load_yaml, to_dict
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.families import FAMILIES, load_decoder
from sinkpretrain.files import sha256_file, write_atomically
from sinkpretrain.language import LanguageModel
from sinkpretrain.model import GPTNeoX, without_weights
from sinkpretrain.probe import load_foreign
from sinkpretrain.weights import HUB_NAME, filled, hub_folder, read_config, weight_files

METADATA_KEY = "sinkpretrain"
SLOT_FILE = "seeded_slot.safetensors"
"""In an exported folder: the keys and values [layers, heads, D] of a mechanism that stock weights have no place for."""
ADAPTER = "adapter_config.json"
"""Of a folder whose weights are those of an adapter (PEFT), or that has one beside its own."""
CHECKPOINT_VERSION = 1
"""What a checkpoint or weights file holds; raised when older code could no longer read it rightly."""


class NewerVersionError(UserError):
    """A file was written by a later version of this project."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate, and where it came from.

    model: in evaluation mode, on the CPU.
    files: the weights that were read.
    tokenizer: its ``tokenizer.json``, if one lies beside it.
    tokenizer_sha256: hash of the tokenizer that the training data were prepared with, if known.
    step: optimizer steps behind the weights, if known.
    name: how its run calls it.
    seeds: of its run's initial weights and data order (``training``, ``data``), if known.
    """

    model: LanguageModel
    files: tuple[Path, ...]
    tokenizer: Path | None
    tokenizer_sha256: str | None
    step: int | None
    name: str
    seeds: dict[str, int] | None = None

    @property
    def trained(self) -> GPTNeoX:
        """The model, if it is of the kind that is trained here; raises UserError for other families."""
        if not isinstance(self.model, GPTNeoX):
            raise UserError(f"{self.name} is no GPT-NeoX model, as trained here; this command takes no other.")
        return self.model

    @property
    def label(self) -> str:
        """The mechanism, for tables."""
        return sinks.label(self.model.sink_config)

    def provenance(self) -> dict[str, Any]:
        """What a result must say about its model."""
        return {
            "path": str(self.files[0] if len(self.files) == 1 else self.files[0].parent),
            "name": self.name,
            "sha256": outside.of_both(sha256_file(*self.files), self.model.sink_config),
            "step": self.step,
            "seeds": self.seeds,
            "mechanism": self.label,
            "sink": to_dict(self.model.sink_config),
            "shape": to_dict(self.model.config),
            "parameters": self.model.n_parameters(),
        }


def describe(model: GPTNeoX, step: int, name: str) -> dict[str, Any]:
    """What a file says about the weights in it."""
    return {
        "version": CHECKPOINT_VERSION,
        "model": to_dict(model.config),
        "sink": to_dict(model.sink_config),
        outside.HASHES: outside.hashes(model.sink_config),
        "step": step,
        "name": name,
    }


def write_weights(state: dict[str, Tensor], about: dict[str, Any], path: Path) -> None:
    """Write tensors and what ``describe`` says about them as safetensors; atomic; raises UserError on a full disk."""
    from safetensors.torch import save_file

    write_atomically(path, lambda p: save_file(state, p, metadata={METADATA_KEY: json.dumps(about)}))


def load_model(path: str | Path, dtype: torch.dtype | None = torch.float32) -> LoadedModel:
    """Load whatever ``path`` names.

    Args:
        path: a run directory (its newest weights are taken), a ``.safetensors`` file or ``.ckpt`` checkpoint of this
            project, a Hugging Face folder, or the name of a model on the Hugging Face Hub.
        dtype: of the weights; None keeps the one they are stored in.

    Raises:
        UserError: nothing loadable is there; the sentence says what was looked for.
    """
    given = Path(path)
    if given.is_dir():
        if (given / "config.yaml").is_file():
            return _load_file(newest_weights(given), given, dtype)
        if (given / "config.json").is_file() or (given / ADAPTER).is_file():
            return _load_hf(given, dtype)
        raise UserError(
            f"{given} is neither a run directory (no config.yaml) nor a Hugging Face folder (no config.json)."
        )
    if given.is_file():
        return _load_file(given, given.parent.parent, dtype)
    if HUB_NAME.fullmatch(str(path)):
        return replace(_load_hf(hub_folder(str(path)), dtype), name=str(path).rpartition("/")[2])
    raise UserError(
        f"there is no model at {given}; give a run directory, a checkpoint, a Hugging Face folder or a name of its Hub."
    )


def newest_weights(run: Path) -> Path:
    """The weights with the highest step in a run directory; raises UserError if there are none yet."""
    files = numbered(run / "weights", ".safetensors") + numbered(run / "checkpoints", ".ckpt")
    if not files:
        raise UserError(f"the run {run} has no weights yet; train it first.")
    # At equal steps the plain weights are the cheaper ones to read.
    return max(files, key=lambda f: (step_of(f), f.suffix == ".safetensors"))


def step_of(file: Path) -> int:
    """The step in a file name such as ``step-0001000.ckpt``."""
    return int(file.stem.removeprefix("step-"))


def numbered(folder: Path, suffix: str) -> list[Path]:
    """The files ``step-<number><suffix>`` of a folder, by step; anything else that lies there is not ours."""
    name = re.compile(rf"step-\d+{re.escape(suffix)}")
    return sorted((f for f in folder.glob("step-*") if name.fullmatch(f.name)), key=step_of)


def _load_file(file: Path, run: Path, dtype: torch.dtype | None) -> LoadedModel:
    state, about = _read_checkpoint(file) if file.suffix == ".ckpt" else _read_safetensors(file)
    if not isinstance(about, dict) or not {"model", "sink"} <= about.keys():
        raise UserError(f"{file} does not say what model it holds; was it written by sinkpretrain?")
    config = from_dict(ModelConfig, about["model"])
    sink = from_dict(SinkConfig, about["sink"])
    model = _of_recipe(config, sink, _cast(state, dtype), file)
    outside.warn_if_edited(sink, about, run)
    tokenizer = run / "tokenizer.json"
    return LoadedModel(
        model=model,
        files=(file,),
        tokenizer=tokenizer if tokenizer.is_file() else None,
        tokenizer_sha256=sha256_file(tokenizer) if tokenizer.is_file() else None,
        step=about.get("step"),
        name=about.get("name") or run.name,
        seeds=_seeds(run / "config.yaml"),
    )


def _seeds(recipe: Path) -> dict[str, int] | None:
    """The seeds in a run's configuration, which may lie beside its weights or not."""
    if not recipe.is_file():
        return None
    config = load_yaml(RunConfig, recipe)
    return {"training": config.training.seed, "data": config.data.seed}


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the weights {file}: {error}") from error
    if METADATA_KEY not in metadata:
        raise UserError(f"{file} was not written by sinkpretrain; give the Hugging Face folder that it lies in.")
    about = json.loads(metadata[METADATA_KEY])
    check_version(about, file)
    return state, about


def _read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    checkpoint = read_checkpoint(file)
    prefix = "model."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return state, checkpoint.get(METADATA_KEY) or {}


def read_checkpoint(file: Path, map_location: Any = "cpu", mmap: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, which is data: nothing in it may run.

    Raises:
        NewerVersionError: a later version of this project wrote it.
        UserError: it is damaged, not a checkpoint, or would execute code.
    """
    try:
        if not zipfile.is_zipfile(file):
            raise UserError(f"cannot read the checkpoint {file}: it is cut short or not a checkpoint; use another.")
        checkpoint: Any = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} was not loaded: it holds objects that could run code, which no checkpoint of sinkpretrain does; "
            "use one from a source you trust, in its plain form."
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"cannot read the checkpoint {file}: it is damaged ({first_line(error)}).") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"cannot read the checkpoint {file}: it holds something else than a training run's state.")
    check_version(checkpoint.get(METADATA_KEY), file)
    return checkpoint


def check_version(about: Any, file: Path) -> None:
    """Refuse what a later version of this project wrote; raises NewerVersionError."""
    version = about.get("version", 1) if isinstance(about, dict) else 1
    if not isinstance(version, int) or version > CHECKPOINT_VERSION:
        raise NewerVersionError(
            f"{file} was written by a newer sinkpretrain (format {version!r}, this one reads up to "
            f"{CHECKPOINT_VERSION}); update sinkpretrain."
        )


def _load_hf(folder: Path, dtype: torch.dtype | None) -> LoadedModel:
    """A Hugging Face folder; one that ``sinkpretrain export`` wrote names the mechanism it was trained with."""
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}), which is not applied here; merge it into its model "
            "(merge_and_unload of peft) and give the folder of that."
        )
    raw = read_config(folder)
    model: LanguageModel
    about, kind = raw.get(METADATA_KEY) or {}, raw.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{folder / 'config.json'} does not say what kind of model it is of (model_type is {kind!r}).")
    if raw.get("quantization_config") and (kind == "gpt_neox" or kind in FAMILIES):
        raise UserError(
            f"{folder} holds quantized weights (quantization_config in its config.json), which are not read for "
            f"{kind}; give the model in 16 or 32 bits."
        )
    if kind == "gpt_neox" and (about or hf.unlike_pythia(raw) is None):
        model, files = _load_neox(folder, about, dtype)
    elif kind == METADATA_KEY:
        model, files = _load_own(folder, raw, dtype)
    elif kind in FAMILIES:
        model, files = load_decoder(folder, dtype)
    else:
        model, files = load_foreign(folder, dtype)
    outside.warn_if_edited(model.sink_config, about, folder)
    tokenizer = folder / "tokenizer.json"
    return LoadedModel(
        model=model,
        files=files,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        tokenizer_sha256=about.get("tokenizer_sha256"),
        step=about.get("step"),
        name=about.get("name") or folder.resolve().name,
        seeds=about.get("seeds"),
    )


def _load_neox(folder: Path, about: dict[str, Any], dtype: torch.dtype | None) -> tuple[GPTNeoX, tuple[Path, ...]]:
    config, sink = hf.model_config(folder), SinkConfig()
    if about:
        # The shape is what the folder says; only which of its rows text uses is not in a stock configuration.
        config = replace(config, tokenizer_size=from_dict(ModelConfig, about["model"]).tokenizer_size)
        sink = from_dict(SinkConfig, about["sink"])
    state, files = hf.from_hf(_cast(hf.load_weights(folder), dtype), config), weight_files(folder)
    if about.get("form") == "seeded":
        with _errors_of(folder):
            mechanism = sinks.build(sink, config)
        state |= _slot_parameters(folder / SLOT_FILE, mechanism, dtype)
        files = (*files, folder / SLOT_FILE)
    return _of_recipe(config, sink, state, folder), files


def _slot_parameters(file: Path, mechanism: sinks.Mechanism, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The parameters of every layer's mechanism, each named as what it is: the key or the value of its slot."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        slots = _cast(load_file(file), dtype)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {file}, which the mechanism of this model needs: {error}") from error
    return {
        f"blocks.{layer}.attn.sink.{name}": tensor
        for name, _ in mechanism.named_parameters()
        for layer, tensor in enumerate(slots[name])
    }


def _load_own(folder: Path, raw: dict[str, Any], dtype: torch.dtype | None) -> tuple[GPTNeoX, tuple[Path, ...]]:
    """A folder of ``sinkpretrain.hf_model``'s class, exported or saved by transformers."""
    if not isinstance(raw.get("model"), dict) or not isinstance(raw.get("sink"), dict):
        raise UserError(f"{folder / 'config.json'} does not say what model it holds; export it again.")
    config, sink = from_dict(ModelConfig, raw["model"]), from_dict(SinkConfig, raw["sink"])
    state = {k.removeprefix("model."): v for k, v in _cast(hf.load_weights(folder), dtype).items()}
    return _of_recipe(config, sink, state, folder), weight_files(folder)


def _of_recipe(config: ModelConfig, sink: SinkConfig, state: dict[str, Tensor], source: Path) -> GPTNeoX:
    """The model with these weights; raises UserError, also where its mechanism is none that is known here."""
    with _errors_of(source):
        model = without_weights(config, sink)
    return filled(model, state, source)


@contextlib.contextmanager
def _errors_of(source: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _cast(state: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return state if dtype is None else {k: v.to(dtype) for k, v in state.items()}
