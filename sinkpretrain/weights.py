"""Weights of a Hugging Face folder, whatever files they lie in, one tensor at a time; names of the Hub as folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sinkpretrain.errors import UserError, first_line
from sinkpretrain.files import read_json

SINGLE = ("model.safetensors", "pytorch_model.bin")
"""In order of preference; each may be split, with an index beside it."""


class Weights:
    """Tensors by name, read when taken; those that nobody took are in ``left``.

    Raises:
        UserError: there are no weights, or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self._open: dict[str, Any] = {}
        for file in self.files:
            self._open |= _names(file)
        self.left = set(self._open)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def take(self, name: str) -> Tensor:
        """The tensor of this name in its own dtype; raises UserError if there is none."""
        if name not in self._open:
            raise UserError(f"the weights in {self.folder} lack {name!r}, which its config.json calls for.")
        self.left.discard(name)
        source = self._open[name]
        try:
            tensor: Tensor = source if isinstance(source, Tensor) else source.get_tensor(name)
        except Exception as error:
            raise UserError(f"cannot read {name!r} from the weights in {self.folder}: {error}") from error
        return tensor


M = TypeVar("M", bound=nn.Module)


def filled(model: M, state: dict[str, Tensor], source: Path) -> M:
    """The model with these weights, ready to evaluate; raises UserError where they are not its own."""
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # torch lists every tensor, a line each, below a heading
        first = str(error).splitlines()[:2][-1].strip()
        raise UserError(f"the weights in {source} do not fit their own configuration: {first}") from error
    return model.eval().requires_grad_(False)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights of a folder, an index followed where there is one; raises UserError."""
    for single in SINGLE:
        index = folder / f"{single}.index.json"
        if index.is_file():
            about = read_json(index)
            named = about.get("weight_map") if isinstance(about, dict) else None
            if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
                raise UserError(f"{index} does not say which file holds which weights (weight_map); download it again.")
            files = sorted({folder / name for name in named.values()})
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise UserError(f"{folder} lacks {missing[0]}, which {index.name} names; download it again.")
            return tuple(files)
        if (folder / single).is_file():
            return (folder / single,)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no weights (model.safetensors or pytorch_model.bin, in one piece or several).")
    return tuple(files)


def _names(file: Path) -> dict[str, Any]:
    """Each tensor's name in a file, with what it can be got from."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            opened: Any = safe_open(file, framework="pt")
            return dict.fromkeys(opened.keys(), opened)
        # weights_only: a file of weights is data, nothing in it may run.
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as error:
        raise UserError(f"cannot read the weights {file}: {error}") from error


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|gpt2[\w-]*")
"""owner/name; gpt2 is older than owners."""


def hub_folder(name: str) -> Path:
    """The local folder of a model of the Hugging Face Hub, downloaded if need be; raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=[*patterns]))

    try:
        folder = fetch("*.json", "*.model", "*.txt", "*.safetensors")
        # The older format only where there is no other, for it may be as large again.
        return folder if any(folder.glob("*.safetensors")) else fetch("*.json", "*.model", "*.txt", "pytorch_model*")
    except (LocalEntryNotFoundError, ConnectionError, HFValidationError) as error:
        raise UserError(
            f"there is no folder {name}, and the Hugging Face Hub cannot be asked for a model of that name "
            "(no network, or HF_HUB_OFFLINE is set); give a folder."
        ) from error
    except Exception as error:
        raise UserError(f"cannot get {name} from the Hugging Face Hub: {first_line(error)}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json; raises UserError."""
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise UserError(f"{folder / 'config.json'} does not hold the settings of a model.")
    return raw
