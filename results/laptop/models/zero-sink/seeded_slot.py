"""A zero sink, key bias or key and value bias for a stock GPT-NeoX: one key and value in front of every sequence.

The column that such a mechanism adds to the softmax equals a key and value that no token made. A cache that starts with
them makes transformers' own ``GPTNeoXForCausalLM`` compute what the trained model computes:

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    logits = model(**forward_inputs(model, ids)).logits
    made = model.generate(**generate_inputs(model, ids), max_new_tokens=20)[:, 1:]

This file also lies in the exported folder and needs torch, transformers and safetensors, nothing of the project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

FILE = "seeded_slot.safetensors"
"""``key`` and ``value``, each [layers, heads, dimensions of a head], the key as it stands at position 0."""


def seeded_cache(model: Any, batch_size: int = 1, folder: str | Path = "") -> DynamicCache:
    """A cache that holds the slot of every layer; the text's first token then stands at position 1.

    The key is turned on by one position, so that every query is as far from it as in training.

    Args:
        model: a ``GPTNeoXForCausalLM`` loaded from an exported folder.
        folder: that folder, by default the one the model was loaded from.
    """
    path = Path(folder or model.config.name_or_path) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give the exported folder with folder=.")
    slots = load_file(path)
    rope = model.config.rope_parameters
    keys = _turned(slots["key"].float(), rope["rope_theta"], rope["partial_rotary_factor"])
    cache = DynamicCache(config=model.config)
    for layer, pair in enumerate(zip(keys, slots["value"].float(), strict=True)):
        key, value = (x.to(model.device, model.dtype)[None, :, None].repeat(batch_size, 1, 1, 1) for x in pair)
        cache.update(key, value, layer)
    return cache


def forward_inputs(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, folder: str | Path = ""
) -> dict[str, Any]:
    """Arguments of ``model(...)`` for ids [B, T], padded on either side as ``attention_mask`` says."""
    mask = _with_slot(input_ids, attention_mask)
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1)[:, 1:],
        "past_key_values": seeded_cache(model, len(input_ids), folder),
    }


def generate_inputs(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, folder: str | Path = ""
) -> dict[str, Any]:
    """Arguments of ``model.generate(...)`` for ids [B, T]; what it returns has one id more in front, to be cut off.

    ``generate`` takes the first ids to be those that the cache holds already: one that is never looked at stands there.
    """
    stand_in = torch.zeros_like(input_ids[:, :1])
    return {
        "input_ids": torch.cat((stand_in, input_ids), dim=1),
        "attention_mask": _with_slot(input_ids, attention_mask),
        "past_key_values": seeded_cache(model, len(input_ids), folder),
    }


def _with_slot(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return torch.cat((torch.ones_like(mask[:, :1]), mask), dim=1)


def _turned(key_LHD: Tensor, base: float, share: float) -> Tensor:
    """Keys rotated from position 0 to position 1, halves paired as GPT-NeoX does."""
    rotary = int(key_LHD.shape[-1] * share)
    angles = 1.0 / base ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
    cos, sin = angles.cos().repeat(2), angles.sin().repeat(2)
    x = key_LHD[..., :rotary]
    left, right = x.chunk(2, dim=-1)
    return torch.cat((x * cos + torch.cat((-right, left), dim=-1) * sin, key_LHD[..., rotary:]), dim=-1)
