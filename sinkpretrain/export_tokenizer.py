"""The tokenizer of an exported folder: the training tokenizer, with the model's prefix put in front of every text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data_prep.tokenizer import load_tokenizer
from sinkpretrain.errors import UserError
from sinkpretrain.files import write_json
from sinkpretrain.load import LoadedModel

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


class Special(NamedTuple):
    """The end-of-document token and the one to pad with, where the tokenizer has such, and their ids."""

    end: str | None
    padding: str | None
    end_id: int | None
    padding_id: int | None


def special_tokens(tokenizer: Any, loaded: LoadedModel) -> Special:
    """Those of a tokenizer, by the name of its end of a document or as the model's training data had it."""
    end = _known(tokenizer, END_OF_DOCUMENT)
    end_id = tokenizer.token_to_id(end) if end else None
    trained = load_tokenizer(str(loaded.tokenizer)).eod if loaded.tokenizer else None
    if trained is not None:
        # A token that was found by merging is not named: transformers would look for it in the text.
        end = tokenizer.id_to_token(trained) if trained in tokenizer.get_added_tokens_decoder() else None
        end_id = trained
    padding = _known(tokenizer, PADDING) or end
    return Special(end, padding, end_id, tokenizer.token_to_id(padding) if padding else None)


def write_tokenizer(folder: Path, loaded: LoadedModel, tokenizer: Any, special: Special) -> None:
    """``tokenizer.json`` and the settings that transformers' tokenizer class wants beside it."""
    model = loaded.model
    tokenizer.save(str(folder / "tokenizer.json"))
    sinks = [tokenizer.id_to_token(i) for i in model.prefix_ids if i >= model.config.tokenizer_size]
    settings: dict[str, Any] = {
        # transformers rebuilds the post-processor of its GPTNeoXTokenizer and would drop the sinks.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": model.config.context,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": sinks,
        "bos_token": special.end,
        "eos_token": special.end,
        "pad_token": special.padding,
    }
    write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})


def prepending_tokenizer(loaded: LoadedModel) -> Any:
    """The training tokenizer with the model's prefix in its post-processor and its sinks as special tokens.

    Raises:
        UserError: its ids are not those the model was trained with.
    """
    from tokenizers import AddedToken, Tokenizer

    assert loaded.tokenizer is not None
    config, prefix = loaded.model.config, list(loaded.model.prefix_ids)
    tokenizer = load_tokenizer(str(loaded.tokenizer)).load(reads_special=True)
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


def verify_tokenizer(folder: Path, loaded: LoadedModel, training: Path) -> Tensor:
    """Check the reloaded tokenizer on ``TEXTS``; returns the ids [1, T] of the first, prefix included."""
    from transformers import AutoTokenizer

    original = load_tokenizer(str(training)).load(reads_special=True)
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
