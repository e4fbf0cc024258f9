"""Sink mechanisms: how attention gets somewhere to put mass that it does not need.

A mechanism does two things: it may put tokens in front of every training sample (``prefix_ids``), and it may add one
column to the softmax of every head (``column``). With a the scaled logits, l_i = logsumexp_j a_ij and o_i the ordinary
output, a column with logit s_i and value v' gives

    out_i = g_i * o_i + (1 - g_i) * v',     g_i = sigmoid(l_i - s_i)

The attention code (``sinkpretrain.attention``) applies that formula in training, streaming and decoding alike.
A new mechanism is one subclass here and one small file under ``configs/sinks``; nothing else names it.
"""

from __future__ import annotations

import difflib
import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.errors import UserError


class Column(NamedTuple):
    """One extra softmax column.

    logit: s_i, fp32, broadcastable to [B, H, T].
    value: v', [H, D], or None for zeros.
    """

    logit: Tensor
    value: Tensor | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The ids a prefix can be made of: text uses 0 .. text_size - 1, the rows up to padded_size are spare."""

    text_size: int
    padded_size: int


class Mechanism(nn.Module):
    """Base class and vanilla behaviour: no prefix, no column. One instance sits in every attention layer.

    Subclasses take their options as keyword arguments after the model's configuration.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()

    @property
    def adds_column(self) -> bool:
        """Whether this mechanism's softmax has a column more than there are keys."""
        return type(self).column is not Mechanism.column

    def prefix_ids(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        """Ids in front of every training sample, and once in front of a stream."""
        return ()

    def column(self, q_BHTD: Tensor) -> Column | None:
        """The extra column for these (rotated) queries, or None."""
        return None


REGISTRY: dict[str, type[Mechanism]] = {}


def register(cls: type[Mechanism]) -> type[Mechanism]:
    assert cls.name not in REGISTRY, cls.name
    REGISTRY[cls.name] = cls
    return cls


@register
class Vanilla(Mechanism):
    """Ordinary softmax attention: some heads learn to use the first text token as their sink."""

    name = "vanilla"
    summary = "ordinary softmax attention"
    source = "Vaswani et al. 2017"


@register
class SinkTokens(Mechanism):
    """``n`` learnable tokens in front of every sample: rows of the embedding that never occur in text.

    They take the first spare rows of the padded vocabulary (50277 on for Pythia), are initialised like every other
    row and trained like every other token; only the last one has a target, the sample's first text token.
    When streaming they are ordinary initial tokens: n of the x in a cache x+y.
    Source: StreamingLLM (arXiv 2309.17453), section 3.3.
    """

    name = "sink_tokens"
    summary = "n learnable tokens in front of every sample"
    source = "Xiao et al. 2023, arXiv 2309.17453"

    def __init__(self, model: ModelConfig, n: int = 1) -> None:
        super().__init__(model)
        if n < 1:
            raise UserError(f"sink.options.n must be at least 1, not {n}; use the mechanism vanilla for none.")
        self.n = n

    def prefix_ids(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        spare = vocabulary.padded_size - vocabulary.text_size
        if self.n > spare:
            raise UserError(
                f"{self.n} sink tokens do not fit the {spare} spare rows of the vocabulary "
                f"({vocabulary.text_size} of {vocabulary.padded_size} are taken); lower sink.options.n or raise "
                "model.vocab_size."
            )
        return tuple(range(vocabulary.text_size, vocabulary.text_size + self.n))


@register
class FixedFirstToken(Mechanism):
    """Every sample starts with one existing id, as with a BOS token: the control for "is it learnable that matters?".

    Source: Gu et al. (arXiv 2410.10781), "fixed bos token".
    """

    name = "fixed_first_token"
    summary = "an existing token in front of every sample (BOS control)"
    source = "Gu et al. 2024, arXiv 2410.10781"

    def __init__(self, model: ModelConfig, id: int = 0) -> None:
        super().__init__(model)
        self.id = id

    def prefix_ids(self, vocabulary: Vocabulary) -> tuple[int, ...]:
        if not 0 <= self.id < vocabulary.text_size:
            raise UserError(
                f"sink.options.id {self.id} is not an id of the tokenizer, which has 0 .. {vocabulary.text_size - 1}."
            )
        return (self.id,)


@register
class ZeroSink(Mechanism):
    """Softmax-off-by-one: exp(a_ij) / (1 + sum_j exp(a_ij)), a column with logit 0 and value 0.

    Equal to an all-zero key and value in front of the sequence. Nothing is kept when streaming: the column is part
    of the attention function and does not count into x+y.
    Source: Miller 2023, "Attention is off by one"; the "zero sink" of StreamingLLM section 3.3.
    """

    name = "zero_sink"
    summary = "softmax-off-by-one: a constant zero column"
    source = "Miller 2023; Xiao et al. 2023, arXiv 2309.17453"

    def column(self, q_BHTD: Tensor) -> Column | None:
        return Column(torch.zeros((), dtype=torch.float32, device=q_BHTD.device))


@register
class OffByC(Mechanism):
    """exp(a_ij) / (c + sum_j exp(a_ij)): a column with logit log c and value 0; c = 1 is the zero sink.

    Nothing is kept when streaming.
    Source: Miller 2023, "Attention is off by one", for c = 1.
    """

    name = "off_by_c"
    summary = "softmax with a constant c in the denominator"
    source = "Miller 2023, generalised"

    def __init__(self, model: ModelConfig, c: float = 1.0) -> None:
        super().__init__(model)
        if c <= 0:
            raise UserError(f"sink.options.c must be positive, not {c}; use the mechanism vanilla for none.")
        self.logit = math.log(c)

    def column(self, q_BHTD: Tensor) -> Column | None:
        return Column(torch.full((), self.logit, dtype=torch.float32, device=q_BHTD.device))


@register
class SinkLogit(Mechanism):
    """One learned logit s_h per head (or one per layer), value 0; starts at 0, as the zero sink.

    Nothing is kept when streaming.
    Source: gpt-oss (OpenAI 2025, arXiv 2508.10925), learned bias in the softmax's denominator per head.
    """

    name = "sink_logit"
    summary = "a learned logit per head in the softmax's denominator"
    source = "OpenAI 2025 (gpt-oss), arXiv 2508.10925"

    def __init__(self, model: ModelConfig, per_head: bool = True) -> None:
        super().__init__(model)
        self.s = nn.Parameter(torch.zeros(model.n_head if per_head else 1))

    def column(self, q_BHTD: Tensor) -> Column | None:
        return Column(self.s.float()[:, None])  # [H or 1, 1]


@register
class KeyBias(Mechanism):
    """A learned key k' per head with value 0: the column's logit is q_i . k' / sqrt(d).

    The query is the rotated one, as if k' stood at position 0; when streaming it is rotated to its slot in the cache,
    so the column is part of the attention function and nothing is kept. Starts at 0, as the zero sink.
    Source: Gu et al. 2024 (arXiv 2410.10781), "K biases".
    """

    name = "key_bias"
    summary = "a learned key per head, value 0"
    source = "Gu et al. 2024, arXiv 2410.10781"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.key = nn.Parameter(torch.zeros(model.n_head, model.head_dim))

    def column(self, q_BHTD: Tensor) -> Column | None:
        scale = q_BHTD.shape[-1] ** -0.5
        return Column(torch.einsum("bhtd,hd->bht", q_BHTD.float(), self.key.float()) * scale)


@register
class KeyValueBias(KeyBias):
    """A learned key k' and value v' per head: ``nn.MultiheadAttention(add_bias_kv=True)``.

    Equal to what a trained sink token contributes at position 0 of every layer, without the token.
    Source: Sun et al. 2024 (arXiv 2402.17762), explicit attention biases; Gu et al. 2024, "KV biases".
    """

    name = "key_value_bias"
    summary = "a learned key and value per head"
    source = "Sun et al. 2024, arXiv 2402.17762"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.value = nn.Parameter(torch.zeros(model.n_head, model.head_dim))

    def column(self, q_BHTD: Tensor) -> Column | None:
        column = super().column(q_BHTD)
        assert column is not None
        return Column(column.logit, self.value.float())


def mechanism_class(config: SinkConfig) -> type[Mechanism]:
    """The class that a configuration names, its option names checked; raises UserError."""
    if config.mechanism not in REGISTRY:
        near = difflib.get_close_matches(config.mechanism, REGISTRY, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(REGISTRY)}."
        raise UserError(f"unknown sink mechanism {config.mechanism!r}; {hint}")
    cls = REGISTRY[config.mechanism]
    known = option_types(cls)
    for key, value in config.options.items():
        if key not in known:
            raise UserError(
                f"unknown option {key!r} of the mechanism {cls.name}; "
                + (f"it has {', '.join(known)}." if known else "it has none.")
            )
        # A bool is an int to Python, but n: true in a recipe is a mistake.
        fits = isinstance(value, known[key]) or (known[key] is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and known[key] is not bool):
            raise UserError(f"sink.options.{key} must be of type {known[key].__name__}, not {value!r}.")
    return cls


def option_types(cls: type[Mechanism]) -> dict[str, type[Any]]:
    """Names and types of a mechanism's options, read from the defaults of its constructor."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]
    return {p.name: type(p.default) for p in parameters}


def build(config: SinkConfig, model: ModelConfig) -> Mechanism:
    """One layer's mechanism; raises UserError for an unknown name or option."""
    return mechanism_class(config)(model, **config.options)


def label(config: SinkConfig) -> str:
    """A short name for tables, e.g. ``sink_tokens(n=2)``."""
    options = ", ".join(f"{k}={v}" for k, v in sorted(config.options.items()))
    return f"{config.mechanism}({options})" if options else config.mechanism
