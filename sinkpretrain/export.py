"""A trained model as a Hugging Face folder.

Where transformers' own GPT-NeoX class can compute the model, the folder needs none of this code; otherwise it needs the
class of ``sinkpretrain.hf_model``. The tokenizer itself puts sink tokens in front of a text. Nothing is believed
unchecked: the folder is loaded back and compared with the model it came from before it appears under its name.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sinkpretrain import outside
from sinkpretrain.errors import UserError
from sinkpretrain.export_tokenizer import (
    VerificationError,
    prepending_tokenizer,
    special_tokens,
    verify_tokenizer,
    write_tokenizer,
)
from sinkpretrain.exporters import Form, choose_form, load_back, write_model
from sinkpretrain.files import disk_faults
from sinkpretrain.load import LoadedModel, load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.model_card import model_card

TOLERANCE = 1e-4
"""Largest difference of a logit, both sides computed in fp32. It holds for bf16 folders too, because the
model is rounded to bf16 before it is compared: both sides then hold the very same numbers."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    folder: the Hugging Face folder.
    form: ``stock``, ``seeded`` (stock, with a key and value that a cache must start with) or ``own``.
    tokenizer: whether it holds a tokenizer; without one it is weights only.
    difference: largest difference of a logit between the folder and the model, at most ``TOLERANCE``.
    """

    folder: Path
    form: Form
    tokenizer: bool
    difference: float


def export(
    model: str | Path,
    out: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    architecture: Literal["auto", "stock", "own"] = "auto",
    overwrite: bool = False,
    note: str = "",
) -> Exported:
    """Write ``model`` as a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

    Args:
        model: run directory, checkpoint or weights file.
        out: folder to make.
        dtype: of the stored weights.
        architecture: stock is transformers' own GPT-NeoX class, own that of this package; auto takes stock where it
            computes the same.
        overwrite: replace the folder if it is an earlier export.
        note: what the files do not know, such as which text the model was trained on; a paragraph of the model card.

    Raises:
        UserError: ``out`` exists, the architecture cannot compute the model, the tokenizer does not fit, or the disk
            is full; ``out`` is untouched.
        VerificationError: the folder, loaded back, differs from the model; ``out`` is untouched.
    """
    out = Path(out)
    _check_target(out, overwrite)
    loaded = load_model(model)
    form = choose_form(architecture, loaded.trained)
    _round(loaded.trained, getattr(torch, dtype))
    tokenizer = prepending_tokenizer(loaded) if loaded.tokenizer else None

    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        with disk_faults(out):
            temporary.mkdir(parents=True)
            special = special_tokens(tokenizer, loaded)
            write_model(temporary, loaded, form, getattr(torch, dtype), special)
            if tokenizer:
                write_tokenizer(temporary, loaded, tokenizer, special)
            outside.keep(loaded.trained.sink_config, temporary)
            (temporary / "README.md").write_text(model_card(loaded, form, tokenizer, dtype, note), encoding="utf-8")
            difference = _verify(temporary, loaded, form)
            if out.exists():
                out.rename(old)
            temporary.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
    return Exported(out, form, tokenizer is not None, difference)


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already; choose another folder or give --overwrite.")
    # Replacing means deleting: a mistyped path must not cost anyone a run directory or a home directory.
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UserError(f"{out} is not a Hugging Face folder and is not overwritten; choose another folder.")


@torch.no_grad()
def _round(model: GPTNeoX, dtype: torch.dtype) -> None:
    """Round the fp32 weights, and what else is in the state, in place to what ``dtype`` can hold."""
    for tensor in model.state_dict().values():
        tensor.copy_(tensor.to(dtype))


@torch.no_grad()
def _verify(folder: Path, loaded: LoadedModel, form: Form) -> float:
    """Load the folder with transformers and compare; returns the largest difference of a logit."""
    ours, theirs = loaded.trained, load_back(folder, form)
    length = min(ours.config.context, 128)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(ours.config.vocab_size, (2, length), generator=generator)]
    if loaded.tokenizer:
        samples.append(verify_tokenizer(folder, loaded, loaded.tokenizer)[:, :length])
    # max() passes over a NaN, so differences are compared one by one.
    differences: list[float] = [(ours(ids) - theirs(ids)).abs().max().item() for ids in samples if ids.numel()]
    for difference in differences:
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"the exported model's logits differ from the original's by {difference:.2g}, more than "
                f"{TOLERANCE}; nothing was written."
            )
    back = load_model(folder).trained
    same = all(torch.equal(v, back.state_dict()[k]) for k, v in ours.state_dict().items())
    if not same or (back.config, back.sink_config) != (ours.config, ours.sink_config):
        raise VerificationError("the exported folder loads as another model than the original; nothing was written.")
    return max(differences)
