"""The same GPT-NeoX weights under transformers' names, both ways.

Only names and the order of the q/k/v rows differ: transformers interleaves them per head ([H, 3, D] rows), here they
are [3, H, D]. Nothing is imported from transformers to map weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from sinkpretrain.config import ModelConfig, from_dict
from sinkpretrain.errors import UserError
from sinkpretrain.weights import Weights, read_config

_OUTER = {
    "embed.weight": "gpt_neox.embed_in.weight",
    "ln_f.weight": "gpt_neox.final_layer_norm.weight",
    "ln_f.bias": "gpt_neox.final_layer_norm.bias",
    "head.weight": "embed_out.weight",
}
_INNER = {
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "attn.qkv": "attention.query_key_value",
    "attn.out": "attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}


def _names(n_layer: int) -> dict[str, str]:
    """Our name -> transformers' name, for every weight of a model."""
    names = dict(_OUTER)
    for layer in range(n_layer):
        for ours, theirs in _INNER.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"gpt_neox.layers.{layer}.{theirs}.{kind}"
    return names


HEADS = ("embed_out.weight", "lm_head.weight")
"""The output matrix: its name in published files, and inside the class of newer versions of transformers 5."""


def to_hf(state: dict[str, Tensor], config: ModelConfig, head: str = HEADS[0]) -> dict[str, Tensor]:
    """Our state dict under transformers' names; raises KeyError on any weight that GPT-NeoX has no place for."""
    names = _names(config.n_layer) | {"head.weight": head}
    out = {}
    for ours, tensor in state.items():
        if ".attn.qkv." in ours:
            tensor = _reorder(tensor, (3, config.n_head))
        out[names[ours]] = tensor.contiguous()
    return out


def from_hf(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of ``to_hf``; weights missing or left over are a UserError that names them."""
    out = {}
    state = {HEADS[0] if k in HEADS else k: v for k, v in state.items()}
    left = {k for k in state if not k.endswith(_DERIVED)}
    for ours, theirs in _names(config.n_layer).items():
        if theirs not in state:
            raise UserError(f"the Hugging Face weights lack {theirs!r}; is this a GPT-NeoX model?")
        tensor = state[theirs]
        left.discard(theirs)
        out[ours] = _reorder(tensor, (config.n_head, 3)).contiguous() if ".attn.qkv." in ours else tensor
    if left:
        raise UserError(f"the Hugging Face weights hold {sorted(left)[0]!r}, which a GPT-NeoX model does not have.")
    return out


_DERIVED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
"""Buffers that old files carry and that follow from the configuration."""


def _reorder(tensor: Tensor, grouped: tuple[int, int]) -> Tensor:
    """Swap the two outer axes of rows laid out as [grouped[0], grouped[1], D]."""
    return tensor.reshape(*grouped, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def hf_config(config: ModelConfig, eos_token_id: int | None = 0) -> dict[str, Any]:
    """Keyword arguments of transformers' GPTNeoXConfig for our shape."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.d_ff or 4 * config.d_model,
        "hidden_act": "gelu",
        "max_position_embeddings": config.context,
        "layer_norm_eps": config.layer_norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_base,
            "partial_rotary_factor": config.rotary_pct,
        },
        # GPTNeoXConfig's own default is 2; Pythia's end-of-document token is 0.
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
    }


def model_config(folder: Path) -> ModelConfig:
    """Our configuration of a Hugging Face GPT-NeoX folder; raises UserError where it could not be exact."""
    raw = read_config(folder)
    # transformers 5 writes the rotary settings into rope_parameters, older versions beside the others.
    rope = raw.get("rope_parameters") or {}
    if (what := unlike_pythia(raw)) is not None:
        raise UserError(f"{folder} {what}, unlike what is trained here.")
    try:
        settings = {
            "n_layer": raw["num_hidden_layers"],
            "d_model": raw["hidden_size"],
            "n_head": raw["num_attention_heads"],
            "d_ff": raw["intermediate_size"],
            "vocab_size": raw["vocab_size"],
            "tokenizer_size": raw["vocab_size"],
            "context": raw["max_position_embeddings"],
            "rotary_pct": rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25)),
            "rope_base": rope.get("rope_theta", raw.get("rotary_emb_base", 10000)),
            "layer_norm_eps": raw["layer_norm_eps"],
            "parallel_residual": raw.get("use_parallel_residual", True),
        }
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} lacks {error}, which a gpt_neox model needs.") from error
    try:
        return from_dict(ModelConfig, settings)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} cannot be understood: {error}") from error


def unlike_pythia(raw: dict[str, Any]) -> str | None:
    """What a gpt_neox configuration asks for that ``GPTNeoX`` does not compute (GPT-NeoX-20B: gelu_fast), or None."""
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type", "default")) != "default":
        return f"scales its rotary positions ({scaling})"
    if raw.get("tie_word_embeddings") or raw.get("hidden_act", "gelu") != "gelu":
        return "ties its embeddings or uses another activation than gelu"
    return None


def load_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a Hugging Face folder in their own dtype; raises UserError."""
    weights = Weights(folder)
    return {name: weights.take(name) for name in sorted(weights.left)}
