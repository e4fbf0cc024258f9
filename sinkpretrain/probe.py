"""What a model of transformers does in its attention, found out from a few short forwards.

With attention that returns zeros, what a layer hands to it does not depend on what the layers before attended to. So
queries and keys of the same tokens, with the model's rotation and without it, tell by which angles each layer rotates;
at other positions, whether anything but the rotation depends on them; without their first half, whether attention is
all through which tokens meet. How far a layer sees, its mask function says. In the end the model, with its attention
taken over, must give the hidden states of its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkpretrain.attention import angle_tables, rotate
from sinkpretrain.decoder import Rotary
from sinkpretrain.errors import UserError
from sinkpretrain.foreign import (
    INTERFACE,
    TRACED,
    Foreign,
    ForeignSpec,
    Turn,
    Unrotated,
    capped,
    dimensions,
    head_dim,
    register,
    run,
)
from sinkpretrain.weights import weight_files

TOKENS = 24
APART = 100
"""By how much the positions of a second forward differ from those of the first."""
BY_LENGTH = ("dynamic", "longrope")
"""Scalings of rotary positions that depend on the length of the text and have no exact streaming form."""


@dataclass(frozen=True)
class Call:
    """One layer's call of attention."""

    module: nn.Module
    q: Tensor
    k: Tensor
    width: int
    rule: Any
    options: dict[str, Any]


def load_foreign(folder: Path, dtype: torch.dtype | None = None) -> tuple[Foreign, tuple[Path, ...]]:
    """A model of any kind that transformers has, in evaluation mode on the CPU, and the files it was read from.

    Args:
        dtype: of the weights; None keeps the one they are stored in.

    Raises:
        UserError: no model of that kind can be loaded, or it does something that streaming would not reproduce.
    """
    files = weight_files(folder)
    theirs = _load(folder, dtype)
    try:
        with torch.inference_mode():
            return _taken_over(theirs), files
    except UserError as error:
        raise UserError(f"{folder} cannot be streamed exactly: {error}") from error
    except Exception as error:
        about = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(
            f"{folder} cannot be streamed: the attention of its {theirs.config.model_type!r} model could not be taken "
            f"over from transformers ({about})."
        ) from error


def _load(folder: Path, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what it would warn of is refused below
    logging.disable_progress_bar()
    try:
        theirs, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported like what is missing
        )
    except Exception as error:
        raise UserError(f"transformers cannot load {folder}: {(str(error).splitlines() or [''])[0]}") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    for what, names in found.items():
        wrong = sorted(str(name) for name in names if not str(name).endswith("inv_freq"))
        if wrong:
            raise UserError(
                f"the weights in {folder} do not fit its config.json ({what.replace('_', ' ')}: {wrong[0]})."
            )
    return theirs.eval().requires_grad_(False)


def _taken_over(theirs: Any) -> Foreign:
    config = theirs.config.get_text_config()
    base, n_layer = theirs.get_decoder(), config.num_hidden_layers
    if config.max_position_embeddings < TOKENS:
        raise UserError(f"its context of {config.max_position_embeddings} tokens is too short.")
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    here = torch.arange(TOKENS)[None]
    there = here + min(APART, config.max_position_embeddings - TOKENS)
    wanted, logits = _own_forward(theirs, ids, here)

    register()
    tables = _unrotate(base)
    theirs.set_attn_implementation(TRACED)
    calls, hidden = _trace(base, ids, here)
    if len(calls) != n_layer or len({call.module for call in calls}) != n_layer:
        raise UserError(
            f"its {n_layer} layers do not call transformers' attention interface once each, but {len(calls)} times."
        )
    half = TOKENS // 2
    alone, of_half = _trace(base, ids[:, half:], here[:, half:])
    beside = [(a.q, b.q[:, :, half:]) for a, b in zip(alone, calls, strict=True)]
    if any(distance(part, whole, n_layer) > 1 for part, whole in [*beside, (of_half, hidden[:, half:])]):
        raise UserError("tokens meet by other means than attention.")
    moved, _ = _trace(base, ids, there)
    learned = any(not torch.equal(a.q, b.q) for a, b in zip(calls, moved, strict=True))
    for table in tables:
        table.on = True
    rotated, _ = _trace(base, ids, there)
    for table in tables:
        table.on = False
    ways = _ways(tables)
    turns = [_turn(plain, turned, there[0], ways) for plain, turned in zip(moved, rotated, strict=True)]
    if learned and any(turns):
        raise UserError("its queries depend on their positions by other means than a rotation.")

    found = tuple(dict.fromkeys(turn for turn in turns if turn is not None))
    width, heads = calls[0].width, calls[0].q.shape[1]
    if any(call.q.shape[1:] != calls[0].q.shape[1:] or call.k.shape[-1] != call.width for call in calls):
        raise UserError("its layers differ in the number or size of their heads, or their keys and values do.")
    sinks = [call.options.get("s_aux") for call in calls]
    caps = tuple(call.options.get("softcap") for call in calls)
    factor, cap = _head(theirs.get_output_embeddings()(wanted), logits, config)
    spec = ForeignSpec(
        family=config.model_type,
        n_layer=n_layer,
        n_head=heads,
        head_dim=head_dim(turns, width),
        context=config.max_position_embeddings,
        vocab_size=theirs.get_input_embeddings().num_embeddings,
        ways=found,
        way_of=tuple(None if turn is None else found.index(turn) for turn in turns),
        scales=tuple(width**-0.5 if call.options.get("scaling") is None else call.options["scaling"] for call in calls),
        windows=tuple(_window(call.rule) for call in calls),
        sink_logits=all(s is not None for s in sinks),
        caps=caps,
        logit_factor=factor,
        logit_cap=cap,
        learned_positions=config.max_position_embeddings if learned else None,
    )
    if any(s is not None for s in sinks) and (not spec.sink_logits or any(caps)):
        raise UserError("not all of its layers have a learned logit in their softmax, or they cap the others.")
    theirs.set_attn_implementation(INTERFACE)
    model = Foreign(theirs, _blocks(base, calls), spec, [s for s in sinks if s is not None]).eval()
    if (apart := distance(model.hidden(ids), wanted, n_layer)) > 1:
        raise UserError(f"its hidden states are {apart:.1f} times as far from transformers' own as rounding allows.")
    return model


def distance(found: Tensor, wanted: Tensor, layers: int = 1) -> float:
    """How far two tensors are apart, in units of what rounding may do to them.

    The median over tokens, for where experts are chosen, rounding may choose others for a few of them. Of a token, the
    root mean square of the difference as a share of that of ``wanted``; rounding may be 1e-4 in fp32, and in 16 bits
    0.02 for what comes out of one layer and up to 0.1 for a deep model.

    Args:
        found, wanted: [..., tokens, size].
        layers: that rounding went through.
    """
    allowed = 1e-4 if wanted.dtype == torch.float32 else min(0.1, 0.02 * layers**0.5)
    found, wanted = found.double(), wanted.double()
    share = (found - wanted).square().mean(-1) / wanted.square().mean(-1).clamp_min(1e-30)
    return share.sqrt().median().item() / allowed


def _own_forward(theirs: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden state and the logits of transformers' own forward."""
    kept: list[Tensor] = []
    handle = theirs.get_decoder().register_forward_hook(lambda _, __, out: kept.append(out[0]))
    try:
        logits: Tensor = theirs(input_ids=ids, position_ids=positions, use_cache=False).logits
    finally:
        handle.remove()
    return kept[0], logits


def _trace(base: nn.Module, ids: Tensor, positions: Tensor) -> tuple[list[Call], Tensor]:
    """What each layer hands to its attention in a forward in which attention returns zeros, and what comes out."""
    calls: list[Call] = []

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
        calls.append(Call(module, q.clone(), k.clone(), v.shape[-1], getattr(mask, "rule", None), options))
        return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

    hidden = run(base, ids, positions, attention)
    return calls, hidden


def _unrotate(base: nn.Module) -> list[Unrotated]:
    """Rotary embeddings replaced by ones that can be switched."""
    found = [
        (parent, name, child)
        for parent in base.modules()
        for name, child in parent.named_children()
        if type(child).__name__.endswith("RotaryEmbedding")
    ]
    for parent, name, child in found:
        setattr(parent, name, Unrotated(child))
    return [getattr(parent, name) for parent, name, _ in found]


def _ways(tables: Sequence[Unrotated]) -> list[Rotary]:
    """The angles in the buffers of a model's rotary embeddings, as they are without regard to a text's length."""
    ways = []
    for table in tables:
        kinds = getattr(table.tables, "rope_type", "default")
        if length := set(BY_LENGTH) & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            raise UserError(
                f"its rotary positions are scaled by {length.pop()!r}, which depends on the length of the text."
            )
        for name, angles in table.tables.named_buffers():
            if name.endswith("inv_freq") and "original" not in name:
                factor = getattr(table.tables, name.replace("inv_freq", "attention_scaling"), 1.0)
                ways.append(Rotary(tuple(angles.float().tolist()), float(factor)))
    return list(dict.fromkeys(ways))


def _turn(plain: Call, turned: Call, positions: Tensor, ways: Sequence[Rotary]) -> Turn | None:
    """By what a layer's queries and keys were rotated; raises UserError if by nothing known."""
    if torch.equal(plain.q, turned.q) and torch.equal(plain.k, turned.k):
        return None
    found = {}
    for turn in (Turn(way, neighbours) for way in ways for neighbours in (False, True)):
        if turn.width > plain.q.shape[-1]:
            continue
        places = dimensions([turn], 0, plain.q.shape[-1])
        tables = angle_tables(positions, torch.tensor(turn.rotary.frequencies))
        cos, sin = (table * turn.rotary.factor for table in tables)
        found[turn] = max(
            distance(rotate(_at(places, a), cos, sin), _at(places, b))
            for a, b in ((plain.q, turned.q), (plain.k, turned.k))
        )
    best = min(found, key=lambda turn: found[turn], default=None)
    if best is None or found[best] > 1:
        raise UserError("it rotates queries and keys in a way that is not known here.")
    return best


def _at(places: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_copy_(-1, places, x)


def _window(rule: Any) -> int | None:
    """How many keys a query sees, itself included, or None for all before it; raises UserError if it is neither."""
    if rule is None:
        raise UserError("the rule of its attention mask is not known.")
    widths = []
    for query in (2**19 + 777, 2**20 + 3):  # far into a text, and apart
        key, none = torch.arange(query + 2), torch.zeros((), dtype=torch.int64)
        seen = torch.as_tensor(rule(none, none, torch.tensor(query), key)).expand(len(key))
        first = int(seen.int().argmax())
        if not torch.equal(seen, (key >= first) & (key <= query)):
            raise UserError("its attention is neither causal nor within a window.")
        widths.append(None if first == 0 else query - first + 1)
    if widths[0] != widths[1]:
        raise UserError("how far a token sees depends on its place in the text.")
    return widths[0]


def _head(found: Tensor, wanted: Tensor, config: Any) -> tuple[float, float | None]:
    """By what the output matrix's logits are multiplied, and at what they are capped then."""
    factor, cap = 1.0, getattr(config, "final_logit_softcapping", None)
    if cap is None:
        factor = float((found.double() * wanted.double()).sum() / found.double().square().sum())
        factor = 1.0 if abs(factor - 1) < 1e-3 else factor
    if distance(capped(found * factor, cap), wanted) > 1:
        raise UserError("its logits do not follow from its last hidden state and its output matrix.")
    return factor, cap


def _blocks(base: nn.Module, calls: Sequence[Call]) -> nn.ModuleList:
    """The list of layers that holds the modules which attend, one in each."""
    modules = [call.module for call in calls]
    for found in base.modules():
        if not isinstance(found, nn.ModuleList) or len(found) != len(modules):
            continue
        if all(any(m is module for m in layer.modules()) for layer, module in zip(found, modules, strict=True)):
            return found
    raise UserError("its layers cannot be told.")
