"""Any other decoder of transformers, run by transformers' own code with its attention taken over.

``Decoder`` knows a few families by their settings. A model of another kind is not understood here but measured: when it
is loaded, ``sinkpretrain.probe`` finds out from a few forwards by which angles each layer rotates its queries and keys,
how far it sees and what it adds to its softmax, and refuses a model that does anything which streaming would not
reproduce. ``Foreign`` then is a ``LanguageModel``: transformers calls the attention it is given, with queries and keys
that are not rotated.

Letters of the axes: B batch, T tokens, C width of the residual stream, H heads, E dimensions of a head of the model,
D dimensions of a head as attention gets it, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkpretrain import sinks
from sinkpretrain.attention import angle_tables, rotate, spread_heads, visible_keys
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.decoder import Rotary
from sinkpretrain.errors import UserError
from sinkpretrain.language import Attend
from sinkpretrain.model import Causal

INTERFACE, TRACED = "sinkpretrain", "sinkpretrain-traced"
"""The names under which transformers knows the attention that is taken over: without masks, and with their rules."""

Attention = Callable[..., Tensor]
"""(module, q, k, v, mask, options) -> output [B, T, H, E]: what transformers' models call, without weights."""

_attention: ContextVar[Attention] = ContextVar("attention")


def _interface(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    return _attention.get()(module, query, key, value, attention_mask, options), None


class Mask(Tensor):
    """In place of a mask, something that carries the rule which would have made it; what is done to it loses that."""

    rule: Any = None

    def __getitem__(self, index: Any) -> Any:
        part: Any = super().__getitem__(index)
        part.rule = self.rule
        return part


def _rule(batch_size: int, q_length: int, kv_length: int, *_: Any, mask_function: Any, **__: Any) -> Tensor:
    mask: Mask = torch.zeros(batch_size, 1, q_length, kv_length).as_subclass(Mask)
    mask.rule = mask_function
    return mask


def register() -> None:
    """Make both names known to transformers; it makes no masks for one that has no mask function."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in (INTERFACE, TRACED):
        ALL_ATTENTION_FUNCTIONS.register(name, _interface)
    ALL_MASK_ATTENTION_FUNCTIONS.register(TRACED, _rule)


@dataclass(frozen=True)
class Turn:
    """How a layer rotates: the angles, and whether neighbouring dimensions are the pairs instead of the two halves.

    first: of a head's dimensions that are rotated; those before it and behind them are not.
    """

    rotary: Rotary
    neighbours: bool = False
    first: int = 0

    @property
    def width(self) -> int:
        """R."""
        return 2 * len(self.rotary.frequencies)


@dataclass(frozen=True)
class ForeignSpec:
    """What was found out about a model.

    head_dim: D. It is E unless layers rotate in different ways: then each way has dimensions of its own.
    ways: to rotate.
    way_of: for each layer which of them is its own, or None if it does not rotate.
    scales: of each layer's logits.
    windows: see ``LanguageModel``.
    sink_logits: whether each head's softmax has a learned logit more, in some layers at least.
    caps: of each layer's scaled logits, which are cap * tanh(logit / cap); None where they are not capped.
    logit_factor, logit_cap: the output matrix's logits times the first, then capped at the second.
    learned_positions: see ``LanguageModel``.
    scaled: whether queries are multiplied by numbers that depend on their positions (Ministral 3).
    """

    family: str
    n_layer: int
    n_head: int
    head_dim: int
    context: int
    vocab_size: int
    ways: tuple[Turn, ...]
    way_of: tuple[int | None, ...]
    scales: tuple[float, ...]
    windows: tuple[int | None, ...]
    sink_logits: bool = False
    caps: tuple[float | None, ...] = ()
    logit_factor: float = 1.0
    logit_cap: float | None = None
    learned_positions: int | None = None
    scaled: bool = False

    @property
    def tokenizer_size(self) -> int:
        return self.vocab_size

    @property
    def turns(self) -> tuple[Turn | None, ...]:
        """For each layer how it rotates."""
        return tuple(None if way is None else self.ways[way] for way in self.way_of)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap) (Gemma 2, arXiv 2408.00118)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Capped(sinks.Mechanism):
    """A softmax over capped logits."""

    def __init__(self, model: ModelConfig, cap: float) -> None:
        super().__init__(model)
        self.cap = cap

    def weigh(self, logits_BHTS: Tensor, visible: Tensor) -> Tensor:
        return capped(logits_BHTS, self.cap).masked_fill(~visible, float("-inf")).softmax(-1)


def fit_experts(theirs: Any) -> None:
    """Torch's grouped product, by which transformers runs the experts of a layer, has no fp64: there, one by one."""
    if theirs.dtype == torch.float64:
        theirs.set_experts_implementation("eager")


class Unrotated:
    """A model's rotary embedding, which from now on gives tables that rotate by nothing, unless ``on``."""

    def __init__(self, tables: nn.Module) -> None:
        self.tables, self.on = tables, False
        tables.register_forward_hook(self._instead)

    def _instead(self, _: nn.Module, __: Any, found: Any) -> Any:
        if self.on:
            return found
        if isinstance(found, Tensor) and found.is_complex():
            return torch.ones_like(found)
        if isinstance(found, tuple) and len(found) == 2 and all(isinstance(table, Tensor) for table in found):
            return torch.ones_like(found[0]), torch.zeros_like(found[1])
        raise UserError("its rotary embedding does not give cosines and sines.")


class Foreign(nn.Module):
    """The language model: token ids [B, T] in, logits [B, T, V] out.

    Args:
        theirs: a model of transformers whose rotary embeddings are ``Unrotated`` and whose attention is ``INTERFACE``.
        blocks: its layers.
        spec: what was found out about it.
        logits: each layer's learned logits [H] of the softmax; None where it has none (and may have a cap).
    """

    def __init__(self, theirs: Any, blocks: nn.ModuleList, spec: ForeignSpec, logits: list[Tensor | None]) -> None:
        super().__init__()
        self.theirs, self.config = theirs, spec
        self.base, self.blocks = theirs.get_decoder(), blocks
        self.embed, self.head = theirs.get_input_embeddings(), theirs.get_output_embeddings()
        if spec.logit_factor != 1.0 or spec.logit_cap is not None:
            self.head.register_forward_hook(lambda _, __, out: capped(out * spec.logit_factor, spec.logit_cap))
        self.prefix_ids: tuple[int, ...] = ()
        self.sink_config = SinkConfig("sink_logit" if spec.sink_logits else "vanilla")
        self.adds_column = spec.sink_logits
        shape = ModelConfig(n_head=spec.n_head, d_model=spec.n_head * spec.head_dim)
        self.sinks = nn.ModuleList()
        for cap, logit in zip(spec.caps, logits, strict=True):
            sink: Any = sinks.build(SinkConfig(), shape) if cap is None else Capped(shape, cap)
            if logit is not None:
                sink = sinks.build(self.sink_config, shape)
                sink.s = logit  # the model's own parameter, which goes where it goes
            self.sinks.append(sink)
        self._kept: dict[tuple[str, torch.device], Tensor] = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Foreign:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        fit_experts(self.theirs)
        return self

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(ids_BT))
        return logits

    def hidden(self, ids_BT: Tensor, attend: Attend | None = None, positions_T: Tensor | None = None) -> Tensor:
        """See ``LanguageModel``."""
        B, T = ids_BT.shape
        if attend is None:
            attend = self.causal(T, ids_BT.device)
        if positions_T is None or not self.placed:
            positions_T = torch.arange(T, device=ids_BT.device)
        layers = iter(range(self.config.n_layer))

        def attention(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]) -> Tensor:
            return self.attended(next(layers), q, k, v, attend)

        return run(self.base, ids_BT, positions_T.expand(B, T), attention)

    def attended(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """A layer's attention [B, T, H, E]; queries and keys as transformers hands them over, not rotated."""
        D, E = self.config.head_dim, v.shape[-1]
        sink: Any = self.sinks[layer]
        q, k = self._placed(q, layer), self._placed(k, layer)
        q = q * (self.config.scales[layer] * D**0.5)  # ``Attend`` divides by sqrt(D)
        out = attend(layer, q, k, v if D == E else F.pad(v, (0, D - E)), sink)
        return out[..., :E].to(v.dtype).transpose(1, 2).contiguous()

    def turned(self, layer: int, x_BHTE: Tensor) -> Tensor:
        """Queries or keys of positions 0, 1, ... rotated as the layer does it, dimensions in the order of its own."""
        places = dimensions(self.config.turns, layer, x_BHTE.shape[-1])
        x_BHTD = at_places(x_BHTE, places, self.config.head_dim)
        return rotate(x_BHTD, *self.rope(torch.arange(x_BHTE.shape[2])))[..., places]

    def _placed(self, x_BHTE: Tensor, layer: int) -> Tensor:
        """A head's dimensions where ``rope`` rotates them as this layer does, [B, H, T, D]."""
        E, D, device = x_BHTE.shape[-1], self.config.head_dim, x_BHTE.device
        places = self._constant(f"layer {layer}", device, lambda: dimensions(self.config.turns, layer, E))
        # One way to rotate, halves paired: most models.
        if D == E and not any(way.neighbours or way.first for way in self.config.ways):
            return x_BHTE
        return at_places(x_BHTE, places, D)

    def causal(self, length: int, device: torch.device) -> Attend:
        """Causal attention over positions 0 .. length - 1, within each layer's window."""
        places = torch.arange(length, device=device)
        tables = torch.stack(self.rope(places))
        within = {
            window: Causal(
                tables,
                None if window is None or window >= length else visible_keys(places[:, None], places, window),
            )
            for window in set(self.windows)
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            k, v = spread_heads(k, q.shape[1]), spread_heads(v, q.shape[1])
            return within[self.windows[layer]](layer, q, k, v, sink)

        return attend

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LanguageModel``: the angles of every way to rotate, one behind the other."""
        rotary = [way.rotary for way in self.config.ways]
        device = positions_T.device
        angles = self._constant("angles", device, lambda: torch.tensor([f for r in rotary for f in r.frequencies]))
        factors = self._constant(
            "factors", device, lambda: torch.tensor([r.factor for r in rotary for _ in r.frequencies] * 2)
        )
        cos, sin = angle_tables(positions_T, angles)
        return cos * factors, sin * factors

    def _constant(self, name: str, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """What follows from the model, on a device: no buffer, which a change of the model's dtype would round."""
        if (name, device) not in self._kept:
            self._kept[name, device] = make().to(device)
        return self._kept[name, device]

    slopes: Tensor | None = None
    pinned: int = 0
    replayable: bool = False  # of what transformers' code does, nothing is known

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    @property
    def learned_positions(self) -> int | None:
        return self.config.learned_positions

    @property
    def placed(self) -> bool:
        return self.config.scaled or self.learned_positions is not None

    def n_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.theirs.parameters())


def head_dim(turns: Sequence[Turn | None], widths: Sequence[int]) -> int:
    """D: the rotated dimensions of every way to rotate, then as many others as a layer has at most.

    Args:
        turns, widths: of each layer, how it rotates and how many dimensions its queries have.
    """
    rotated = sum(way.width for way in set(turns) if way is not None)
    return rotated + max(E - (0 if way is None else way.width) for way, E in zip(turns, widths, strict=True))


def at_places(x_BHTE: Tensor, places_E: Tensor, size: int) -> Tensor:
    """A head's dimensions at these places among so many, [B, H, T, size]; zeros elsewhere."""
    return x_BHTE.new_zeros(*x_BHTE.shape[:-1], size).index_copy_(-1, places_E, x_BHTE)


def dimensions(turns: Sequence[Turn | None], layer: int, width: int) -> Tensor:
    """int64 [E]: the place among D of each of the dimensions of a layer's head.

    ``rotate`` pairs dimension r with r + R / 2 of all R rotated ones, so each way has a stretch of both halves.
    """
    ways, way = [w for w in dict.fromkeys(turns) if w is not None], turns[layer]
    half = sum(w.width for w in ways) // 2
    rest = torch.arange(2 * half, 2 * half + width)
    if way is None:
        return rest
    before = sum(w.width for w in ways[: ways.index(way)]) // 2
    first = torch.arange(before, before + way.width // 2)
    pairs = torch.stack((first, first + half), dim=1 if way.neighbours else 0).flatten()
    return torch.cat((rest[: way.first], pairs, rest[way.first : width - way.width]))


def run(base: nn.Module, ids_BT: Tensor, positions_BT: Tensor, attention: Attention) -> Tensor:
    """The last hidden state [B, T, C] of a model of transformers without its output matrix, under this attention."""
    with _using(attention):
        out: Tensor = base(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)[0]
    return out


@contextmanager
def _using(attention: Attention) -> Iterator[None]:
    token = _attention.set(attention)
    try:
        yield
    finally:
        _attention.reset(token)
