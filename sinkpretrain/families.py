"""Families of models on the Hugging Face Hub: what each one's settings mean, and where its weights are.

A family states only what differs: a ``Spec`` read from its configuration (transformers' own class fills in defaults
and old spellings), and the names of its weights. An option that ``Decoder`` has no exact counterpart for is refused by
name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkpretrain.decoder import ACTIVATIONS, Alibi, Decoder, Learned, Rotary, Spec
from sinkpretrain.errors import UserError
from sinkpretrain.weights import Weights, filled, read_config

Config = Any
"""A configuration object of transformers."""


@dataclass(frozen=True)
class Family:
    """How one family is written down.

    read: its configuration as a ``Spec``.
    outer: our name of a module outside of the layers -> theirs.
    layer: their name of a layer, with its number to be filled in.
    inner: our name of a module of a layer -> theirs, or several whose rows follow each other.
    base: what stands in front of every name but the head's; files made of the bare model lack it.
    head: their name of the output matrix.
    own: names of modules of a layer that depend on the model.
    rows: brings the rows of a fused q/k/v product into our order (all of q, of k, of v).
    transposed: their matrices are [in, out].
    derived: endings of tensors in files that follow from the configuration.
    """

    read: Callable[[Config], Spec]
    outer: Mapping[str, str]
    layer: str
    inner: Mapping[str, str | tuple[str, ...]]
    base: str
    head: str = "lm_head"
    own: Callable[[Spec], Mapping[str, str]] = field(default=lambda spec: {})
    rows: Callable[[Tensor, Spec], Tensor] = field(default=lambda rows, spec: rows)
    transposed: bool = False
    derived: tuple[str, ...] = (".rotary_emb.inv_freq",)


def load_decoder(folder: Path, dtype: torch.dtype | None = None) -> tuple[Decoder, tuple[Path, ...]]:
    """The model in a Hugging Face folder, in evaluation mode on the CPU, and the files it was read from.

    Args:
        folder: its config.json names one of ``FAMILIES``.
        dtype: of the weights; None keeps the one they are stored in.

    Raises:
        UserError: an option that would not be exact, or weights that do not fit the configuration.
    """
    raw = read_config(folder)
    family = FAMILIES[raw["model_type"]]
    try:
        spec = family.read(_configuration(raw))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except Exception as error:
        raise UserError(
            f"{folder / 'config.json'} cannot be understood: {str(error).splitlines()[-1].strip()}"
        ) from error
    weights = Weights(folder)
    with torch.device("meta"):
        model = Decoder(spec)
    state = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in collect(family, model, weights)}
    if spec.tied:
        state["head.weight"] = state["embed.weight"]
    filled(model, state, folder)
    if spec.tied:  # assigned one by one, they would be two parameters
        model.head.weight = model.embed.weight
    return model, weights.files


def collect(family: Family, model: Decoder, weights: Weights) -> list[tuple[str, Tensor]]:
    """Every weight of ``model``, taken from a folder; raises UserError if one is missing or one is left over."""
    # A file of the bare model has neither the base's name nor, in general, the head.
    base = family.base if f"{family.base}{family.outer['embed']}.weight" in weights else ""
    names = {**family.inner, **family.own(model.config)}
    found = []
    for name in model.state_dict():
        module, _, kind = name.rpartition(".")
        if module == "head":
            if not model.config.tied:
                found.append((name, weights.take(f"{family.head}.{kind}")))
            continue
        if module in family.outer:
            found.append((name, weights.take(f"{base}{family.outer[module]}.{kind}")))
            continue
        _, layer, inner = module.split(".", 2)
        theirs = names[inner]
        prefix = base + family.layer.format(layer)
        parts = [weights.take(f"{prefix}.{t}.{kind}") for t in ((theirs,) if isinstance(theirs, str) else theirs)]
        if family.transposed:
            parts = [part.mT if part.dim() == 2 else part for part in parts]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if inner == "attn.qkv":
            try:
                tensor = family.rows(tensor, model.config)
            except RuntimeError as error:
                raise UserError(
                    f"the weights in {weights.folder} do not fit their own configuration: {prefix}.{theirs}.{kind} has "
                    f"the shape {tuple(tensor.shape)}."
                ) from error
        found.append((name, tensor.contiguous()))
    left = {name for name in weights.left if not name.endswith(family.derived)}
    head = f"{family.head}.weight"
    if model.config.tied and head in left:
        # Versions of transformers differ in what they follow, such a matrix or the configuration.
        if not torch.equal(weights.take(head), dict(found)["embed.weight"]):
            raise UserError(
                f"the weights in {weights.folder} hold a {head!r} of its own, but their config.json ties it to the "
                'embedding; say "tie_word_embeddings": false there if the matrix is meant, or remove it.'
            )
        left.discard(head)
    if left:
        raise UserError(
            f"the weights in {weights.folder} hold {min(left)!r}, which a {model.config.family} model of its "
            "configuration does not have."
        )
    return found


def _configuration(raw: Mapping[str, Any]) -> Config:
    from transformers import AutoConfig

    options = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(raw["model_type"], **options)


def _require(config: Config, **needed: Any) -> None:
    """Refuse options whose value is another one than the only one that is exact here."""
    for name, value in needed.items():
        given = getattr(config, name, value)
        if given != value:
            raise UserError(f"the option {name}={given!r} is not supported; its numbers would not be exact.")


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise UserError(f"the activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}.")
    return name


EXACT_SCALINGS = ("linear", "llama3", "yarn")
"""Scalings of rotary positions that are the same for texts of every length; dynamic and longrope are not."""


def _rotary(config: Config, head_dim: int) -> Rotary:
    """Angles per position as transformers' own functions compute them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    options = config.rope_parameters
    kind = options.get("rope_type", "default")
    if options.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(f"partial_rotary_factor {options['partial_rotary_factor']} is not supported for this family.")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return Rotary(tuple((1.0 / options["rope_theta"] ** exponents).tolist()))
    if kind not in EXACT_SCALINGS:
        raise UserError(
            f"its rotary positions are scaled by {kind!r}, which depends on the length of the text and has no exact "
            f"streaming form; exact are default, {', '.join(EXACT_SCALINGS)}."
        )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Rotary(tuple(frequencies.float().tolist()), float(factor))


# --- Llama and what follows it ------------------------------------------------------------------------------------


def _llama_like(config: Config, family: str, **own: Any) -> Spec:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Spec(
        family=family,
        n_layer=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_head=config.num_attention_heads,
        n_kv_head=config.num_key_value_heads,
        head_dim=head_dim,
        d_ff=config.intermediate_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        positions=_rotary(config, head_dim),
        norm="rms",
        norm_eps=config.rms_norm_eps,
        residual="sequential",
        gated=True,
        activation=_activation(config.hidden_act),
        tied=config.tie_word_embeddings,
        **({"windows": (None,) * config.num_hidden_layers} | own),
    )


def _llama(config: Config) -> Spec:
    bias = config.attention_bias
    return _llama_like(config, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=config.mlp_bias)


def _mistral(config: Config) -> Spec:
    # Named per layer, they are what transformers calls a Ministral: the same weights, windows in some layers only.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return _llama_like(config, "mistral", windows=_windows(config, kinds))


def _windows(config: Config, kinds: Sequence[str]) -> tuple[int | None, ...]:
    """The window of each layer, by what the configuration calls it."""
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != config.num_hidden_layers:
        wrong = f"{min(unknown)!r} among them" if unknown else f"{len(kinds)} of them"
        raise UserError(
            f"layer_types with {wrong} are not supported; a model of {config.num_hidden_layers} layers has as many, "
            "each full_attention or sliding_attention."
        )
    if config.sliding_window is not None and config.sliding_window < 1:
        raise UserError(f"sliding_window {config.sliding_window} is no window; no token would see itself.")
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _qwen2(config: Config) -> Spec:
    return _llama_like(config, "qwen2", qkv_bias=True, windows=_windows(config, config.layer_types))


def _qwen3(config: Config) -> Spec:
    bias = config.attention_bias
    return _llama_like(
        config, "qwen3", qkv_bias=bias, out_bias=bias, qk_norm=True, windows=_windows(config, config.layer_types)
    )


def _llama_names(read: Callable[[Config], Spec]) -> Family:
    return Family(
        read=read,
        base="model.",
        outer={"embed": "embed_tokens", "norm_f": "norm"},
        layer="layers.{}",
        inner={
            "norm1": "input_layernorm",
            "norm2": "post_attention_layernorm",
            "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attn.q_norm": "self_attn.q_norm",
            "attn.k_norm": "self_attn.k_norm",
            "attn.out": "self_attn.o_proj",
            "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.down": "mlp.down_proj",
        },
    )


# --- Falcon -------------------------------------------------------------------------------------------------------


def _falcon(config: Config) -> Spec:
    H = config.num_attention_heads
    head_dim = config.hidden_size // H
    if config.hidden_size % H:
        raise UserError(f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {H}.")
    grouped = config.new_decoder_architecture
    norms = config.num_ln_in_parallel_attn or (2 if grouped else 1)
    if grouped:
        _require(config, parallel_attn=True)
    elif norms != 1:
        _require(config, num_ln_in_parallel_attn=1)
    return Spec(
        family="falcon",
        n_layer=config.num_hidden_layers,
        d_model=config.hidden_size,
        n_head=H,
        n_kv_head=config.num_kv_heads if grouped else 1 if config.multi_query else H,
        head_dim=head_dim,
        d_ff=config.ffn_hidden_size,
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        # Falcon scales its logits after adding the bias, so the bias is scaled too.
        positions=Alibi(tuple(s * head_dim**-0.5 for s in falcon_slopes(H)))
        if config.alibi
        else _rotary(config, head_dim),
        windows=(None,) * config.num_hidden_layers,
        norm="layer",
        norm_bias=True,
        norm_eps=config.layer_norm_epsilon,
        residual=("shared" if norms == 1 else "parallel") if config.parallel_attn else "sequential",
        activation=_activation(config.activation),
        qkv_bias=config.bias,
        out_bias=config.bias,
        mlp_bias=config.bias,
        tied=config.tie_word_embeddings,
    )


def falcon_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for the power of two n below; the other heads fall between (Press et al. 2022).

    Rounded to bf16, as in the code that these models were trained with. (It also rounds slope times position, by up to
    2^-9 of it; that depends on where a token stands in the text and is left out here.)
    """
    n = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / n) for i in range(heads - n)]
    return torch.tensor(slopes).bfloat16().tolist()


def _grouped_rows(rows: Tensor, spec: Spec) -> Tensor:
    """Each group's heads of q, then its k, then its v: [groups, heads of a group + 2, D, ...]."""
    groups = spec.n_kv_head
    grouped = rows.reshape(groups, spec.n_head // groups + 2, spec.head_dim, *rows.shape[1:])
    q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in (q, k, v)])


# --- MPT ----------------------------------------------------------------------------------------------------------


def _mpt(config: Config) -> Spec:
    attention = config.attn_config
    # transformers takes 8 whatever alibi_bias_max says, the authors' code what it says: only 8 is one and the same.
    _require(attention, alibi=True, alibi_bias_max=8, qk_ln=False, prefix_lm=False, attn_type="multihead_attention")
    _require(config, logit_scale=None)
    bias = not config.no_bias
    return Spec(
        family="mpt",
        n_layer=config.n_layers,
        d_model=config.d_model,
        n_head=config.n_heads,
        n_kv_head=config.n_heads,
        head_dim=config.d_model // config.n_heads,
        d_ff=config.expansion_ratio * config.d_model,
        vocab_size=config.vocab_size,
        context=config.max_seq_len,
        positions=Alibi(tuple(mpt_slopes(config.n_heads))),
        windows=(None,) * config.n_layers,
        norm="layer",
        norm_bias=bias,
        norm_eps=config.layer_norm_epsilon,
        residual="sequential",
        activation="gelu",
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        clip_qkv=attention.clip_qkv,
        scale=attention.softmax_scale,
        tied=config.tie_word_embeddings,
    )


def mpt_slopes(heads: int) -> list[float]:
    """2^(-8/n), 2^(-16/n), ... for the power of two n above, every second one first where n is not ``heads``."""
    n = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
    return slopes if n == heads else (slopes[1::2] + slopes[::2])[:heads]


# --- GPT-2 --------------------------------------------------------------------------------------------------------


def _gpt2(config: Config) -> Spec:
    _require(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return Spec(
        family="gpt2",
        n_layer=config.n_layer,
        d_model=config.n_embd,
        n_head=config.n_head,
        n_kv_head=config.n_head,
        head_dim=config.n_embd // config.n_head,
        d_ff=config.n_inner or 4 * config.n_embd,
        vocab_size=config.vocab_size,
        context=config.n_positions,
        positions=Learned(config.n_positions),
        windows=(None,) * config.n_layer,
        norm="layer",
        norm_bias=True,
        norm_eps=config.layer_norm_epsilon,
        residual="sequential",
        activation=_activation(config.activation_function),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=config.tie_word_embeddings,
    )


# --- all of them --------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "llama": _llama_names(_llama),
    "mistral": _llama_names(_mistral),
    "qwen2": _llama_names(_qwen2),
    "qwen3": _llama_names(_qwen3),
    "falcon": Family(
        read=_falcon,
        base="transformer.",
        outer={"embed": "word_embeddings", "norm_f": "ln_f"},
        layer="h.{}",
        inner={
            "norm1": "input_layernorm",
            "norm2": "post_attention_layernorm",
            "attn.qkv": "self_attention.query_key_value",
            "attn.out": "self_attention.dense",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        own=lambda spec: {"norm1": "ln_attn", "norm2": "ln_mlp"} if spec.residual == "parallel" else {},
        rows=_grouped_rows,
    ),
    "mpt": Family(
        read=_mpt,
        base="transformer.",
        outer={"embed": "wte", "norm_f": "norm_f"},
        layer="blocks.{}",
        inner={
            "norm1": "norm_1",
            "norm2": "norm_2",
            "attn.qkv": "attn.Wqkv",
            "attn.out": "attn.out_proj",
            "mlp.up": "ffn.up_proj",
            "mlp.down": "ffn.down_proj",
        },
    ),
    "gpt2": Family(
        read=_gpt2,
        base="transformer.",
        outer={"embed": "wte", "learned": "wpe", "norm_f": "ln_f"},
        layer="h.{}",
        inner={
            "norm1": "ln_1",
            "norm2": "ln_2",
            "attn.qkv": "attn.c_attn",
            "attn.out": "attn.c_proj",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        transposed=True,
        derived=(".attn.bias", ".attn.masked_bias"),
    ),
}
