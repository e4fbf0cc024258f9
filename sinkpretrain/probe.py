"""What a model of transformers does in its attention, found out from a few short forwards.

With attention in which each token attends to itself alone, what a layer hands to it does not depend on where tokens
stand. So queries and keys of the same tokens, with the model's rotation and without it, tell by which angles each
layer rotates; at other positions, near and far beyond the context, whether anything but the rotation and a scale of
queries depends on them; token by token, whether attention is all through which tokens meet. How far a layer sees, its
mask function says.
Attention itself is compared with transformers' own on peaked logits in fp32, whatever the dtype of the weights, and
what becomes of the output matrix's logits on numbers put in their place. In the end each layer, with its attention
taken over, must give what it gives in the model's own forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sinkpretrain.attention import angle_tables, rotate, spread_heads, visible_keys
from sinkpretrain.decoder import Rotary
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.foreign import (
    INTERFACE,
    TRACED,
    Foreign,
    ForeignSpec,
    Turn,
    Unrotated,
    at_places,
    capped,
    dimensions,
    fit_experts,
    head_dim,
    register,
    run,
)
from sinkpretrain.progress import without_bars_of_transformers
from sinkpretrain.weights import read_config, weight_files

TOKENS = 24
FAR = 2**20
"""Positions of the last forward begin here, beyond every length at which a model is known to change what it does."""
SPREAD = 2**16
"""Up to here positions of the second forward are spread over the context."""
KNOWN = ("s_aux", "position_ids", "cache_position")
"""Tensors that attention may be given besides queries, keys and values: learned logits, and what does not matter."""
PEAKED = 8.0
"""Standard deviation of the logits on which attention is compared."""
BY_LENGTH = ("dynamic", "longrope")
"""Scalings of rotary positions that depend on the length of the text and have no exact streaming form."""


@dataclass(frozen=True)
class Call:
    """One layer's call of attention."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
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
        with torch.inference_mode(), _or_refuse("it does something in its attention that is not known here"):
            return _taken_over(theirs), files
    except UserError as error:
        raise UserError(f"{folder} cannot be streamed exactly: {error}") from error


@contextmanager
def _or_refuse(sentence: str) -> Iterator[None]:
    """What fails in the code of transformers is the property of the model that this sentence names."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        about = f"{type(error).__name__}: {first_line(error)}".removesuffix(".")
        raise UserError(f"{sentence} ({about}).") from error


def _load(folder: Path, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.utils import logging

    raw = read_config(folder)
    kind = raw["model_type"]
    sees = kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # images too, as the folders of Ministral 3
    sees &= kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        with without_bars_of_transformers():
            theirs, found = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
                folder,
                dtype=dtype or "auto",
                attn_implementation="eager",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported like what is missing
                trust_remote_code=False,  # or it would ask
            )
    except Exception as error:
        why = first_line(error)
        if raw.get("auto_map") and kind not in CONFIG_MAPPING_NAMES:
            why = f"it has no {kind!r} model, and code that lies in a folder (auto_map) is not run."
        elif why.startswith("Unrecognized configuration class"):
            why = f"a {kind!r} model is none that predicts the next token of a text."
        raise UserError(f"transformers cannot load {folder}: {why}") from error
    finally:
        logging.set_verbosity(level)
    for what, names in found.items():
        wrong = sorted(str(name) for name in names if not str(name).endswith("inv_freq"))
        if wrong:
            raise UserError(
                f"the weights in {folder} do not fit its config.json ({what.replace('_', ' ')}: {wrong[0]})."
            )
    fit_experts(theirs)
    return theirs.eval().requires_grad_(False)


def _taken_over(theirs: Any) -> Foreign:
    config = theirs.config.get_text_config()
    base, n_layer = theirs.get_decoder(), config.num_hidden_layers
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and context < TOKENS:
        raise UserError(f"its context of {context} tokens is too short.")
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    here = torch.arange(TOKENS)[None]
    if base is theirs or isinstance(base, nn.Linear):
        raise UserError("its decoder cannot be told from its output matrix.")
    with _or_refuse("transformers' own forward of it fails, so there is nothing to compare with"):
        wanted, entered = _own_forward(theirs, ids, here)
    if not (wanted.isfinite().all() and entered.isfinite().all()):
        raise UserError("its predictions are not finite; use float32, or check the weights.")
    with _or_refuse("its logits do not follow from its last hidden state and its output matrix alone"):
        factor, cap = _head(theirs, wanted, entered, ids)

    register()
    tables = _unrotate(base)
    theirs.set_attn_implementation(TRACED)
    with _or_refuse("its code asks more of its attention than an output for each token"):
        calls, hidden = _trace(base, ids, here)
    _check_calls(calls, n_layer)
    if not isinstance(context, int):
        raise UserError("its config.json names no length of its context (max_position_embeddings).")
    _check_alone(base, ids, here, calls, hidden)
    turns, learned, scaled = _positions(base, tables, ids, here, (calls, hidden), context)

    found = tuple(dict.fromkeys(turn for turn in turns if turn is not None))
    widths = [call.q.shape[-1] for call in calls]
    sinks = [call.options.get("s_aux") for call in calls]
    caps = tuple(call.options.get("softcap") for call in calls)
    spec = ForeignSpec(
        family=config.model_type,
        n_layer=n_layer,
        n_head=calls[0].q.shape[1],
        head_dim=max(head_dim(turns, widths), *(call.v.shape[-1] for call in calls)),
        context=context,
        vocab_size=theirs.get_input_embeddings().num_embeddings,
        ways=found,
        way_of=tuple(None if turn is None else found.index(turn) for turn in turns),
        scales=tuple(
            width**-0.5 if call.options.get("scaling") is None else call.options["scaling"]
            for width, call in zip(widths, calls, strict=True)
        ),
        windows=tuple(_window(call.rule) for call in calls),
        sink_logits=any(s is not None for s in sinks),
        caps=caps,
        logit_factor=factor,
        logit_cap=cap,
        learned_positions=context if learned else None,
        scaled=scaled,
    )
    if any(cap is not None and s is not None for cap, s in zip(caps, sinks, strict=True)):
        raise UserError("it caps its logits beside a learned one in its softmax.")
    model = Foreign(theirs, _blocks(base, calls), spec, sinks).eval()
    _check_attention(model, calls)
    theirs.set_attn_implementation("eager")
    with _rotating(tables):
        attended = _attended(base, calls, ids, here)
    theirs.set_attn_implementation(INTERFACE)
    apart = _apart(model, calls, ids, attended, wanted)
    if apart > 1:
        raise UserError(f"what it attends to is {apart:.1f} times as far from transformers' own as rounding allows.")
    return model


def _check_calls(calls: Sequence[Call], n_layer: int) -> None:
    """Raises UserError unless each layer attends once, with the same number of heads and nothing unknown."""
    if len(calls) != n_layer:
        raise UserError(
            f"its {n_layer} layers do not call transformers' attention interface once each, but {len(calls)} times "
            "(layers that are not attention, or do it by code of their own)."
        )
    if len({call.module for call in calls}) != n_layer:
        raise UserError("it runs some of its layers more than once.")
    for name in (name for call in calls for name, value in call.options.items() if isinstance(value, Tensor)):
        if name not in KNOWN:
            raise UserError(f"its attention is given {name!r}, which is not known here.")
    if any(call.q.shape[1] != calls[0].q.shape[1] for call in calls):
        raise UserError("its layers differ in the number of their heads.")


def _attended(base: nn.Module, calls: Sequence[Call], ids: Tensor, here: Tensor) -> list[Tensor]:
    """What comes out of each layer's attention in the model's own forward."""
    found: list[Tensor] = []

    def kept(out: Tensor) -> Tensor:
        found.append(out)
        return out

    with _hooked(calls, kept):
        base(input_ids=ids, position_ids=here, use_cache=False)
    return found


def _apart(model: Foreign, calls: Sequence[Call], ids: Tensor, attended: list[Tensor], wanted: Tensor) -> float:
    """How far any layer's attention is from transformers' own, and in the end the hidden states.

    Each layer goes on from transformers' own output, so that what rounding does to one is not made larger by those
    behind it, which in 16 bits can be any size.
    """
    left, found = iter(attended), []

    def compared(out: Tensor) -> Tensor:
        own = next(left)
        found.append(distance(out, own))
        return own

    with _hooked(calls, compared):
        found.append(distance(model.hidden(ids), wanted))
    return max(found)


@contextmanager
def _hooked(calls: Sequence[Call], instead: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """What comes out of the modules that attend is replaced."""

    def hook(_: nn.Module, __: Any, out: Any) -> Any:
        return (instead(out[0]), *out[1:]) if isinstance(out, tuple) else instead(out)

    handles = [call.module.register_forward_hook(hook) for call in calls]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_alone(base: nn.Module, ids: Tensor, here: Tensor, calls: list[Call], hidden: Tensor) -> None:
    """Raises UserError unless each token, read without the others, hands the same to attention as among them.

    A batch is half of them, for what depends on the batch would not show if it were all.
    """
    halves = slice(0, TOKENS // 2), slice(TOKENS // 2, None)
    (first, left), (second, right) = (_trace(base, ids[:, half].T, here[:, half].T) for half in halves)
    pairs = [(torch.cat((left, right)).transpose(0, 1), hidden)]
    for a, b, whole in zip(first, second, calls, strict=True):
        pairs += [
            (torch.cat((x, y)).transpose(0, 2), z)
            for x, y, z in ((a.q, b.q, whole.q), (a.k, b.k, whole.k), (a.v, b.v, whole.v))
        ]
    if any(distance(alone, whole) > 1 for alone, whole in pairs):
        raise UserError("tokens meet by other means than attention.")


def _positions(
    base: nn.Module,
    tables: Sequence[Unrotated],
    ids: Tensor,
    here: Tensor,
    at_here: tuple[list[Call], Tensor],
    context: int,
) -> tuple[list[Turn | None], bool, bool]:
    """How each layer rotates, whether positions are embedded, and whether they scale queries.

    Raises:
        UserError: that is not all.
    """
    ways = _ways(tables)
    there = torch.linspace(1, min(context, SPREAD) - 1, TOKENS).long()[None]
    moved = _trace(base, ids, there)
    learned = not _same(at_here, moved, but=("q",))
    turns: list[Turn | None] | None = None
    for positions, plain in ((there, moved), (here, at_here)):
        with _rotating(tables):
            rotated = _trace(base, ids, positions)
        if not _same(plain, rotated, but=("q", "k")):
            raise UserError("it rotates more than queries and keys.")
        found = [_turn(a, b, positions[0], ways) for a, b in zip(plain[0], rotated[0], strict=True)]
        if turns is not None and found != turns:
            raise UserError("how it rotates queries and keys depends on the length of the text.")
        turns = found
    assert turns is not None
    # An embedding of positions has none so far away.
    elsewhere = [] if learned else [moved, _trace(base, ids, here + FAR)]
    if (learned and any(turns)) or not all(
        _same(at_here, other, but=("q",)) and _scaled(at_here[0], other[0]) for other in elsewhere
    ):
        raise UserError(
            "what it does depends on positions by other means than a rotation, a scale of queries or an embedding."
        )
    if _ways(tables) != ways:
        raise UserError("how it rotates queries and keys depends on the length of the text.")
    return turns, learned, not all(_same(at_here, other) for other in elsewhere)


def _scaled(here: Sequence[Call], there: Sequence[Call]) -> bool:
    """Whether each head's query of a token is the same in two places up to a factor, which any rotation lets pass."""
    for a, b in ((x.q, y.q) for x, y in zip(here, there, strict=True)):
        size = a.double().square().sum(-1, keepdim=True).clamp_min(1e-30)
        factor = (a.double() * b.double()).sum(-1, keepdim=True) / size
        if distance(a * factor, b, worst=True) > 1:
            return False
    return True


def _same(a: tuple[list[Call], Tensor], b: tuple[list[Call], Tensor], but: Sequence[str] = ()) -> bool:
    """Whether two forwards are the same, bit by bit."""
    names = [name for name in ("q", "k", "v") if name not in but]
    return torch.equal(a[1], b[1]) and all(
        torch.equal(getattr(x, name), getattr(y, name)) for x, y in zip(a[0], b[0], strict=True) for name in names
    )


def _check_attention(model: Foreign, calls: Sequence[Call]) -> None:
    """Raises UserError unless each layer's attention is transformers' own, in fp32 and on peaked logits."""
    places, generator = torch.arange(TOKENS), torch.Generator().manual_seed(1)
    for layer, call in enumerate(calls):
        eager: Callable[..., Any] | None = getattr(
            sys.modules[type(call.module).__module__], "eager_attention_forward", None
        )
        if eager is None:
            continue
        q, k, v = (
            torch.randn(1, x.shape[1], TOKENS, x.shape[-1], generator=generator) for x in (call.q, call.k, call.v)
        )
        q = q * (PEAKED / (model.config.scales[layer] * q.shape[-1] ** 0.5))
        seen = visible_keys(places[:, None], places, model.windows[layer])
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        options = {
            name: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in call.options.items()
        }
        wanted = eager(call.module, *(model.turned(layer, x) for x in (q, k)), v, mask, **options)[0]
        if distance(model.attended(layer, q, k, v, model.causal(TOKENS, places.device)), wanted, worst=True) > 1:
            raise UserError("it does something in its attention that is not known here.")


def distance(found: Tensor, wanted: Tensor, *, worst: bool = False) -> float:
    """How far two tensors are apart, in units of what rounding may do to them.

    The median over tokens, for where experts are chosen, rounding may choose others for a few of them. Of a token, the
    root mean square of the difference as a share of that of ``wanted``; rounding may be 1e-4 in fp32, and 0.1 in 16
    bits, where attention that is peaked makes much of the rounding of its logits.

    Args:
        found, wanted: [..., tokens, size].
        worst: of the tokens instead of their median, where no experts are chosen.
    """
    allowed = 1e-4 if wanted.dtype == torch.float32 else 0.1
    found, wanted = found.double(), wanted.double()
    share = (found - wanted).square().mean(-1) / wanted.square().mean(-1).clamp_min(1e-30)
    share = share.sqrt()
    return (share.max() if worst else share.median()).item() / allowed


def _own_forward(theirs: Any, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden state and what comes out of the output matrix in transformers' own forward."""
    hidden: list[Tensor] = []
    logits: list[Tensor] = []
    handles = [
        theirs.get_decoder().register_forward_hook(lambda _, __, out: hidden.append(out[0])),
        theirs.get_output_embeddings().register_forward_hook(lambda _, __, out: logits.append(out)),
    ]
    try:
        theirs(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden[0], logits[0]


def _trace(base: nn.Module, ids: Tensor, positions: Tensor) -> tuple[list[Call], Tensor]:
    """What each layer hands to its attention in a forward in which tokens attend to themselves, and what comes out."""
    calls: list[Call] = []

    def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise UserError(
                f"a layer attends to {k.shape[2]} keys of {q.shape[2]} tokens (keys that stand for several tokens or "
                "for none), and not to one of each."
            )
        calls.append(Call(module, q.clone(), k.clone(), v.clone(), getattr(mask, "rule", None), options))
        return spread_heads(v, q.shape[1]).transpose(1, 2).contiguous()

    hidden = run(base, ids, positions, attention)
    return calls, hidden


def _unrotate(base: nn.Module) -> list[Unrotated]:
    """The rotary embeddings of a model, from now on switched off."""
    return [Unrotated(module) for module in base.modules() if type(module).__name__.endswith("RotaryEmbedding")]


@contextmanager
def _rotating(tables: Sequence[Unrotated]) -> Iterator[None]:
    """The rotary embeddings switched on."""
    for table in tables:
        table.on = True
    try:
        yield
    finally:
        for table in tables:
            table.on = False


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
    changed = (plain.q != turned.q).flatten(0, -2).any(0) | (plain.k != turned.k).flatten(0, -2).any(0)
    first = int(changed.int().argmax())
    backwards = [replace(way, frequencies=tuple(-f for f in way.frequencies)) for way in ways]  # as nanochat does
    for turn in (Turn(way, neighbours, first) for way in (*ways, *backwards) for neighbours in (False, True)):
        if first + turn.width > plain.q.shape[-1]:
            continue
        width = plain.q.shape[-1]
        places = dimensions([turn], 0, width)
        tables = angle_tables(positions, torch.tensor(turn.rotary.frequencies))
        cos, sin = (table * turn.rotary.factor for table in tables)
        found[turn] = max(
            distance(rotate(at_places(a, places, width), cos, sin), at_places(b, places, width), worst=True)
            for a, b in ((plain.q, turned.q), (plain.k, turned.k))
        )
    best = min(found, key=lambda turn: found[turn], default=None)
    if best is None or found[best] > 1:
        raise UserError("it rotates queries and keys in a way that is not known here.")
    return best


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


def _head(theirs: Any, hidden: Tensor, entered: Tensor, ids: Tensor) -> tuple[float, float | None]:
    """By what the output matrix's logits are multiplied, and at what they are capped then.

    Args:
        hidden: the last hidden state.
        entered: what came out of the output matrix, which may have been given a multiple of that.
    """
    head = theirs.get_output_embeddings()
    size = torch.logspace(-3, 3, head.weight.shape[0] // 2)
    given = torch.cat((size, -size, size[:1].expand(head.weight.shape[0] % 2)))
    handle = head.register_forward_hook(lambda _, __, out: given.expand(out.shape))
    try:
        made = theirs(input_ids=ids[:, :2], use_cache=False).logits[0, -1].float()
    finally:
        handle.remove()
    plain = head(hidden)
    before = float((plain.double() * entered.double()).sum() / plain.double().square().sum())
    before = 1.0 if abs(before - 1) < 1e-3 else before
    cap = None
    if made.shape == given.shape:
        after = float(made[0] / given[0])
        largest = len(size) - 1
        if abs(float(made[largest] / given[largest]) / after - 1) > 1e-3:
            cap = float(made[largest])
        if torch.allclose(capped(given * after, cap), made, rtol=1e-3) and distance(plain * before, entered) <= 1:
            factor = before * after
            return (1.0 if abs(factor - 1) < 1e-5 else factor), cap
    raise UserError("its logits do not follow from its last hidden state and its output matrix.")


def _blocks(base: nn.Module, calls: Sequence[Call]) -> nn.ModuleList:
    """The list of layers that holds the modules which attend, one in each."""
    modules = [call.module for call in calls]
    for found in base.modules():
        if not isinstance(found, nn.ModuleList) or len(found) != len(modules):
            continue
        if all(any(m is module for m in layer.modules()) for layer, module in zip(found, modules, strict=True)):
            return found
    raise UserError("its layers are not a list with one attention in each.")
