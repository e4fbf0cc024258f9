"""Any model whose mechanism only prepends tokens, as a stock Hugging Face GPT-NeoX folder.

The folder needs none of this code to be used: transformers' own class computes the logits and the tokenizer
itself puts the sink tokens in front of a text. Nothing is believed unchecked: the folder is loaded back and
compared with the model it came from before it appears under its name.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sinkpretrain import __version__, hf, sinks
from sinkpretrain.config import ModelConfig, SinkConfig, to_dict
from sinkpretrain.errors import UserError
from sinkpretrain.files import disk_faults, write_json
from sinkpretrain.load import METADATA_KEY, LoadedModel, load_model
from sinkpretrain.model import GPTNeoX

TOLERANCE = 1e-4
"""Largest difference of a logit, both sides computed in fp32. It holds for bf16 folders too, because the
model is rounded to bf16 before it is compared: both sides then hold the very same numbers."""

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
PADDING = ("<|padding|>", "<pad>", "[PAD]")

TEXTS = (
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "  def f(x):\n\t    return x ** 2   # naïve, 12,345.67 €\n\n\n日本語 \U0001f600 e\u0301",
    "",
)
"""What the reloaded tokenizer must encode exactly as the training tokenizer does; the first is also run
through the model. Runs of spaces, tabs, other scripts and a decomposed accent are where they come apart."""


class VerificationError(RuntimeError):
    """The folder did not compute what the model computes; nothing was left on disk."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    folder: the Hugging Face folder.
    tokenizer: whether it holds a tokenizer; without one it is weights only.
    difference: largest difference of a logit between the folder and the model, at most ``TOLERANCE``.
    """

    folder: Path
    tokenizer: bool
    difference: float


def export(
    model: str | Path,
    out: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
) -> Exported:
    """Write ``model`` as a folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

    Args:
        model: whatever ``sinkpretrain.load.load_model`` takes.
        out: the folder to make.
        dtype: of the stored weights.
        overwrite: replace ``out`` if it is an earlier export.

    Raises:
        UserError: ``out`` exists, the mechanism is no plain GPT-NeoX, the tokenizer does not fit, or the disk
            is full; ``out`` is untouched.
        VerificationError: the folder, loaded back, differs from the model; ``out`` is untouched.
    """
    out = Path(out)
    _check_target(out, overwrite)
    loaded = load_model(model)
    _check_mechanism(loaded.trained)
    _round(loaded.trained, getattr(torch, dtype))
    tokenizer = _prepending_tokenizer(loaded) if loaded.tokenizer else None

    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        with disk_faults(out):
            temporary.mkdir(parents=True)
            _write(temporary, loaded, tokenizer, dtype)
            difference = _verify(temporary, loaded)
            if out.exists():
                out.rename(old)
            temporary.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
    return Exported(out, tokenizer is not None, difference)


# --- what can be exported -----------------------------------------------------------------------------------


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} exists already; choose another folder or give overwrite.")
    # Replacing means deleting: a mistyped path must not cost anyone a run directory or a home directory.
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UserError(f"{out} is not a Hugging Face folder and is not overwritten; choose another folder.")


def _check_mechanism(model: GPTNeoX) -> None:
    """Only what a mechanism prepends survives in the stock class, so it must do nothing else."""
    if _only_prepends(model.sink_config, model.config) and not model.config.window:
        return
    able = [name for name in sinks.REGISTRY if _only_prepends(SinkConfig(name), model.config)]
    raise UserError(
        f"the mechanism {model.sink_config.mechanism} changes attention itself, which the stock "
        f"GPTNeoXForCausalLM cannot express; models that can be exported: {', '.join(able)}."
    )


def _only_prepends(sink: SinkConfig, config: ModelConfig) -> bool:
    mechanism = sinks.mechanism_class(sink)
    return not any(mechanism.uses(hook) for hook in ("values", "column", "weigh", "output"))


@torch.no_grad()
def _round(model: GPTNeoX, dtype: torch.dtype) -> None:
    """Round the fp32 weights, in place, to what ``dtype`` can hold."""
    for p in model.parameters():
        p.copy_(p.to(dtype))


# --- the tokenizer ------------------------------------------------------------------------------------------


def _prepending_tokenizer(loaded: LoadedModel) -> Any:
    """The training tokenizer with the model's prefix in its post-processor and its sinks as special tokens.

    Raises:
        UserError: its ids are not those the model was trained with.
    """
    from tokenizers import AddedToken, Tokenizer

    assert loaded.tokenizer is not None
    config, prefix = loaded.model.config, list(loaded.model.prefix_ids)
    tokenizer = _read_tokenizer(loaded.tokenizer)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > config.vocab_size:
        raise UserError(
            f"the tokenizer {loaded.tokenizer} has ids up to {size - 1} but the model's vocabulary ends at "
            f"{config.vocab_size - 1}; put the tokenizer of its training data there."
        )
    if not prefix or tokenizer.encode("").ids == prefix:  # nothing to do, or an exported folder exported again
        return tokenizer
    added = [f"<|sink_{n}|>" for n, i in enumerate(prefix) if i >= config.tokenizer_size]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in added])
    tokens = [tokenizer.id_to_token(i) for i in prefix]
    # New tokens take the next free id: the model's, if the tokenizer fills 0 .. tokenizer_size - 1.
    if None in tokens or (added and tokens != added):
        raise UserError(
            f"the tokenizer {loaded.tokenizer} has ids up to {size - 1} and cannot put the model's sinks at "
            f"{prefix}; put the tokenizer of its training data there."
        )
    raw = json.loads(tokenizer.to_str())
    # Training packs bare text: what the tokenizer would add of its own (a BOS, say) the model has never seen.
    bare = tokenizer.num_special_tokens_to_add(False) == 0
    kept = [raw["post_processor"]] if raw["post_processor"] and bare else []
    raw["post_processor"] = {"type": "Sequence", "processors": [*kept, _template(tokens, prefix)]}
    return Tokenizer.from_str(json.dumps(raw))


def _read_tokenizer(path: Path) -> Any:
    """A tokenizer.json, without the truncation or padding that some files carry."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _template(tokens: list[str], ids: list[int]) -> dict[str, Any]:
    """A TemplateProcessing that prepends tokens to a text or a pair of texts.

    Spelt out because its short form reads a token such as ``$`` or ``a:1`` as part of its own syntax.
    """
    front = [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    a, b = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*front, a],
        "pair": [*front, a, b],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in zip(tokens, ids, strict=True)},
    }


def _known(tokenizer: Any, names: tuple[str, ...]) -> str | None:
    """The first of these tokens that the tokenizer has."""
    return next((name for name in names if tokenizer and tokenizer.token_to_id(name) is not None), None)


# --- the folder ---------------------------------------------------------------------------------------------


def _write(folder: Path, loaded: LoadedModel, tokenizer: Any, dtype: str) -> None:
    from safetensors.torch import save_file
    from transformers import GenerationConfig, GPTNeoXConfig

    model = loaded.trained
    eod = _known(tokenizer, END_OF_DOCUMENT)
    pad = _known(tokenizer, PADDING) or eod
    eod_id, pad_id = (tokenizer.token_to_id(t) if t else None for t in (eod, pad))

    state = hf.to_hf(model.state_dict(), model.config)
    state = {k: v.to(getattr(torch, dtype)).contiguous() for k, v in state.items()}
    weights = folder / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})

    config = GPTNeoXConfig(**hf.hf_config(model.config, eod_id), pad_token_id=pad_id).to_diff_dict()
    config |= {
        "architectures": ["GPTNeoXForCausalLM"],
        "dtype": dtype,
        # transformers 4 does not know rope_parameters and would silently take its defaults.
        "rotary_pct": model.config.rotary_pct,
        "rotary_emb_base": model.config.rope_base,
        METADATA_KEY: {
            "model": to_dict(model.config),
            "sink": to_dict(model.sink_config),
            "step": loaded.step,
            "name": loaded.name,
            "tokenizer_sha256": loaded.tokenizer_sha256,
        },
    }
    write_json(folder / "config.json", config)
    # safetensors makes files that only their owner can read.
    shutil.copymode(folder / "config.json", weights)

    # No text holds an id of the spare rows, sinks included, so none must be generated.
    spare = list(range(model.config.tokenizer_size, model.config.vocab_size)) or None
    GenerationConfig(
        bos_token_id=eod_id, eos_token_id=eod_id, pad_token_id=pad_id, suppress_tokens=spare
    ).save_pretrained(folder)

    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
        special = [tokenizer.id_to_token(i) for i in model.prefix_ids if i >= model.config.tokenizer_size]
        settings: dict[str, Any] = {
            # transformers rebuilds the post-processor of its GPTNeoXTokenizer and would drop the sinks.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": model.config.context,
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": special,
            "bos_token": eod,
            "eos_token": eod,
            "pad_token": pad,
        }
        write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})
    (folder / "README.md").write_text(_card(loaded, tokenizer, dtype), encoding="utf-8")


def _card(loaded: LoadedModel, tokenizer: Any, dtype: str) -> str:
    """The model card: only what is known from the files."""
    model, about = loaded.trained, loaded.provenance()
    config, prefix = model.config, list(model.prefix_ids)
    kind = sinks.mechanism_class(model.sink_config)
    if not prefix:
        front = "Nothing is put in front of a text."
    elif tokenizer:
        names = ", ".join(f"`{tokenizer.id_to_token(i)}`" for i in prefix)
        front = (
            f"Every training sample started with the ids {prefix} ({names}). The tokenizer puts them in "
            "front of each text, or pair of texts, once; `add_special_tokens=False` leaves them out. Put "
            "them at the start of a document only, not of each piece of it."
        )
    else:
        front = f"Every training sample started with the ids {prefix}; put them in front of each text."
    load = (
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0], skip_special_tokens=True))\n"
    )
    x = len(prefix) or 4
    streamed = "--text FILE" if tokenizer else "--tokens FILE.npy"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {loaded.name}

A GPT-NeoX language model, exported by sinkpretrain {__version__} as transformers' `GPTNeoXForCausalLM`.

| | |
|---|---|
| sink mechanism | `{loaded.label}`: {kind.summary} ({kind.source}) |
| layers, width, heads, MLP | {config.n_layer}, {config.d_model}, {config.n_head}, {config.d_ff} |
| context | {config.context} tokens, what is prepended included |
| vocabulary | {config.vocab_size} rows, of which text uses the first {config.tokenizer_size} |
| parameters | {about["parameters"]:,}, of which {model.n_parameters(embeddings=False):,} outside embeddings |
| optimizer steps | {"unknown" if loaded.step is None else loaded.step} |
| stored as | {dtype} |
| sha256 of the source weights | `{about["sha256"]}` |

## What comes first

{front}

## Loading it

```python
from transformers import AutoModelForCausalLM{", AutoTokenizer" if tokenizer else ""}

model = AutoModelForCausalLM.from_pretrained("FOLDER")
{load if tokenizer else ""}```
{"" if tokenizer else NO_TOKENIZER}
## Streaming it

    sinkpretrain stream FOLDER {streamed} --cache {x}+{config.context // 2 - x} --out RESULTS

measures its perplexity over text longer than its context, with {x} initial and {config.context // 2 - x}
recent tokens in the cache. {"That command puts the prefix in front itself." if prefix else ""}
"""


NO_TOKENIZER = "\nThis folder holds weights only: no tokenizer lay beside the model that was exported.\n"


# --- the proof ----------------------------------------------------------------------------------------------


@torch.no_grad()
def _verify(folder: Path, loaded: LoadedModel) -> float:
    """Load the folder with transformers and compare; returns the largest difference of a logit."""
    from transformers import AutoModelForCausalLM

    ours = loaded.trained
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    length = min(ours.config.context, 128)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(ours.config.vocab_size, (2, length), generator=generator)]
    if loaded.tokenizer:
        samples.append(_verify_tokenizer(folder, loaded, loaded.tokenizer)[:, :length])
    # max() passes over a NaN, so differences are compared one by one.
    differences: list[float] = [(ours(ids) - theirs(input_ids=ids).logits).abs().max().item() for ids in samples]
    for difference in differences:
        if not difference <= TOLERANCE:
            raise VerificationError(
                f"the exported model's logits differ from the original's by {difference:.2g}, more than "
                f"{TOLERANCE}; nothing was written."
            )
    back = load_model(folder).trained
    if (back.config, back.sink_config) != (ours.config, ours.sink_config):
        raise VerificationError("the exported folder loads as another model than the original; nothing was written.")
    return max(differences)


def _verify_tokenizer(folder: Path, loaded: LoadedModel, training: Path) -> Tensor:
    """Check the reloaded tokenizer on ``TEXTS``; returns the ids [1, T] of the first, prefix included."""
    from transformers import AutoTokenizer

    original = _read_tokenizer(training)
    reloaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    prefix = list(loaded.model.prefix_ids)
    for text in TEXTS:
        bare = original.encode(text, add_special_tokens=False).ids
        whole = [*prefix, *bare] if prefix else original.encode(text).ids
        for special, want in ((True, whole), (False, bare)):
            got = reloaded(text, add_special_tokens=special)["input_ids"]
            if got != want:
                raise VerificationError(
                    f"the exported tokenizer encodes {text!r} as {got}, not {want}; nothing was written."
                )
    return torch.tensor([reloaded(TEXTS[0])["input_ids"]])
