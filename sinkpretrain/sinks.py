"""Sink mechanisms: how attention gets somewhere to put mass that it does not need.

Each is a subclass of ``Mechanism``, whose hooks ``sinkpretrain.mechanism`` explains. With a the scaled logits,
l_i = logsumexp_j a_ij and o_i the ordinary output, all those that add a column to the softmax (logit s_i, value v') are

    out_i = g_i * o_i + (1 - g_i) * v',     g_i = sigmoid(l_i - s_i)

A new mechanism of the package is one class here and one small file under ``configs/sinks``; nothing else names it. One
that is not to be in the package is named ``module:Class`` (``sinkpretrain.outside``).
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.errors import UserError, meant
from sinkpretrain.mechanism import REGISTRY as REGISTRY
from sinkpretrain.mechanism import Column as Column
from sinkpretrain.mechanism import Mechanism as Mechanism
from sinkpretrain.mechanism import Vocabulary as Vocabulary
from sinkpretrain.mechanism import options as options
from sinkpretrain.mechanism import register
from sinkpretrain.outside import errors_placed, outside_class


@register
class Vanilla(Mechanism):
    """Ordinary softmax attention: some heads learn to use the first text token as their sink.

    When streaming, the first few tokens must be kept (x = 4 in a cache x+y) once the model has grown such sinks.
    Source: Vaswani et al. 2017, arXiv 1706.03762; its sinks, Xiao et al. 2023, arXiv 2309.17453.
    """

    name = "vanilla"
    summary = "ordinary softmax attention"
    source = "Vaswani et al. 2017"
    kept = "the first tokens of the text: x = 4 in a cache x+y"


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
    kept = "its tokens: n of the x in a cache x+y"

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

    When streaming it is an ordinary initial token: one of the x in a cache x+y.
    Source: Gu et al. (arXiv 2410.10781), "fixed bos token".
    """

    name = "fixed_first_token"
    summary = "an existing token in front of every sample (BOS control)"
    source = "Gu et al. 2024, arXiv 2410.10781"
    kept = "its token: 1 of the x in a cache x+y"

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

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.heads = (model.n_head, model.head_dim)

    def slot(self) -> tuple[Tensor, Tensor] | None:
        return torch.zeros(self.heads), torch.zeros(self.heads)

    def column(self, q_BHTD: Tensor, seen: Tensor) -> Column | None:
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

    def column(self, q_BHTD: Tensor, seen: Tensor) -> Column | None:
        return Column(torch.full((), self.logit, dtype=torch.float32, device=q_BHTD.device))


@register
class SinkLogit(Mechanism):
    """One learned logit s_h per head (or one per layer), value 0; drawn from N(0, init_std), by default exactly 0, as
    the zero sink.

    Nothing is kept when streaming.
    Source: gpt-oss (OpenAI 2025, arXiv 2508.10925), learned bias in the softmax's denominator per head.
    """

    name = "sink_logit"
    summary = "a learned logit per head in the softmax's denominator"
    source = "OpenAI 2025 (gpt-oss), arXiv 2508.10925"

    def __init__(self, model: ModelConfig, per_head: bool = True, init_std: float = 0.0) -> None:
        super().__init__(model)
        if init_std < 0:
            raise UserError(f"sink.options.init_std must not be negative, but is {init_std}; 0 starts at zero.")
        self.s = nn.Parameter(torch.zeros(model.n_head if per_head else 1))
        self.init_std = init_std

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        if self.init_std:
            self.s.copy_(torch.empty(self.s.shape).normal_(0.0, self.init_std, generator=generator))

    def column(self, q_BHTD: Tensor, seen: Tensor) -> Column | None:
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

    def slot(self) -> tuple[Tensor, Tensor] | None:
        return self.key.float(), torch.zeros_like(self.key, dtype=torch.float32)

    def column(self, q_BHTD: Tensor, seen: Tensor) -> Column | None:
        # Not a matrix product: autocast would round that to 16 bits, which the kernels' own logits are not.
        products = q_BHTD.float() * self.key.float()[:, None]
        return Column(products.sum(-1) * q_BHTD.shape[-1] ** -0.5)


@register
class KeyValueBias(KeyBias):
    """A learned key k' and value v' per head: ``nn.MultiheadAttention(add_bias_kv=True)``.

    Equal to what a trained sink token contributes at position 0 of every layer, without the token. Nothing is kept when
    streaming.
    Source: Sun et al. 2024 (arXiv 2402.17762), explicit attention biases; Gu et al. 2024, "KV biases".
    """

    name = "key_value_bias"
    summary = "a learned key and value per head"
    source = "Sun et al. 2024, arXiv 2402.17762"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.value = nn.Parameter(torch.zeros(model.n_head, model.head_dim))

    def slot(self) -> tuple[Tensor, Tensor] | None:
        return self.key.float(), self.value.float()

    def column(self, q_BHTD: Tensor, seen: Tensor) -> Column | None:
        column = super().column(q_BHTD, seen)
        assert column is not None
        return Column(column.logit, self.value.float())


@register
class ValueBias(Mechanism):
    """A learned v' per head added to the output, out_i = o_i + v': the control for the key and value bias, in which
    attention gets a bias but nowhere to put mass. Starts at 0.

    Nothing is kept when streaming.
    Source: Gu et al. 2024 (arXiv 2410.10781), "V biases".
    """

    name = "value_bias"
    summary = "a learned bias on each head's output (control)"
    source = "Gu et al. 2024, arXiv 2410.10781"

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.value = nn.Parameter(torch.zeros(model.n_head, model.head_dim))

    def output(self, x_BTC: Tensor, o_BHTD: Tensor) -> Tensor:
        return o_BHTD + self.value.to(o_BHTD.dtype)[:, None]


@register
class StableMask(Mechanism):
    """Pseudo-logits in the places that the causal mask hides, which take mass and give nothing back.

    With m keys visible, hidden place j (counted from 0) holds the logit j * log(decay). The places from m on, without
    end, are a column of value 0 whose logit is known in closed form, so that flash kernels can take it:

        s_i = log sum_{j >= m} decay^j = m log(decay) - log(1 - decay)

    Early queries can leave much mass there and later ones ever less, which also tells them where they stand. The
    series without end is what the authors use for inference; in training at length T it differs from their finite one
    by the factor 1 - decay^(T - m). ``decay`` defaults to that of their command line; the model published beside it
    (github.com/MikaStars39/StableMask) has ALiBi's slopes instead, another for each head.
    Nothing is kept when streaming: m is the number of keys in the cache, and the query's own.
    Source: Yin et al. 2024, arXiv 2402.04779.
    """

    name = "stable_mask"
    summary = "decaying pseudo-logits where the causal mask hides keys"
    source = "Yin et al. 2024, arXiv 2402.04779"

    def __init__(self, model: ModelConfig, decay: float = 0.995) -> None:
        super().__init__(model)
        if not 0 < decay < 1:
            raise UserError(f"sink.options.decay must lie between 0 and 1, not at {decay}; 0.995 is usual.")
        self.slope, self.start = math.log(decay), -math.log1p(-decay)

    def column(self, q_BHTD: Tensor, seen: Tensor) -> Column | None:
        return Column(seen.float() * self.slope + self.start)


class Gate(nn.Module):
    """sigmoid(W x), one number per head [B, H, T, 1] or per dimension [B, H, T, D], from the normed input."""

    def __init__(self, model: ModelConfig, elementwise: bool) -> None:
        super().__init__()
        self.n_head = model.n_head
        self.linear = nn.Linear(model.d_model, model.d_model if elementwise else model.n_head, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, _ = x_BTC.shape
        return torch.sigmoid(self.linear(x_BTC)).view(B, T, self.n_head, -1).transpose(1, 2)


class Gated(Mechanism):
    """What the two gates have in common. The matrix starts as the model's others do: every gate near one half."""

    def __init__(self, model: ModelConfig, elementwise: bool = False) -> None:
        super().__init__(model)
        self.gate = Gate(model, elementwise)

    def init_weights(self, generator: torch.Generator, std: float) -> None:
        weight = self.gate.linear.weight
        weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))


@register
class OutputGate(Gated):
    """Attention's output times a gate read from the layer's normed input: out_i = sigmoid(W x_i) * o_i.

    One gate per head (110,592 parameters at 160M), or per dimension with ``elementwise`` (7.08M). A head that has
    nothing to say closes its gate instead of attending to a sink. Nothing is kept when streaming.
    Source: Qiu et al. 2025 (Qwen), arXiv 2505.06708, position G1.
    """

    name = "output_gate"
    summary = "a gate on each head's output, read from the normed input"
    source = "Qiu et al. 2025 (Qwen), arXiv 2505.06708"

    def output(self, x_BTC: Tensor, o_BHTD: Tensor) -> Tensor:
        gated: Tensor = o_BHTD * self.gate(x_BTC)
        return gated


@register
class ValueGate(Gated):
    """Values times a gate read from the same token's normed input, before they are mixed: v_j' = sigmoid(W x_j) * v_j.

    A token can make itself a harmless place for attention. Gated values are what a cache holds; nothing else is kept
    when streaming.
    Source: Qiu et al. 2025 (Qwen), arXiv 2505.06708, position G2.
    """

    name = "value_gate"
    summary = "a gate on each head's values, read from the normed input"
    source = "Qiu et al. 2025 (Qwen), arXiv 2505.06708"

    def values(self, x_BTC: Tensor, v_BHTD: Tensor) -> Tensor:
        gated: Tensor = v_BHTD * self.gate(x_BTC)
        return gated


@register
class SigmoidAttention(Mechanism):
    """No normalisation: weights sigmoid(a_ij + b), each key by itself, b = -log(context) (``log_n``) or 0.

    Nothing is kept when streaming; b stays that of the trained context. Takes the explicit path in training
    (``attention.weighed_attention`` states its cost).
    Source: Ramapuram et al. 2024, arXiv 2409.04431, with b = -log n; Gu et al. 2024, arXiv 2410.10781, with b = 0.
    """

    name = "sigmoid_attention"
    summary = "unnormalised sigmoid weights instead of a softmax"
    source = "Ramapuram et al. 2024, arXiv 2409.04431"

    def __init__(self, model: ModelConfig, log_n: bool = True) -> None:
        super().__init__(model)
        self.bias = -math.log(model.context) if log_n else 0.0

    def weigh(self, logits_BHTS: Tensor, visible: Tensor) -> Tensor:
        return torch.sigmoid(logits_BHTS + self.bias).masked_fill(~visible, 0.0)


@register
class Softpick(Mechanism):
    """relu(e^a_ij - 1) / (sum_j |e^a_ij - 1| + 1e-8): a rectified softmax whose weights may all be 0.

    Nothing is kept when streaming. Takes the explicit path in training (``attention.weighed_attention``). Weights jump
    where all scores of a query pass 0 at once, as the one score of a first token does, and gradients have no useful
    bound there: now and then a step's norm is a thousand times the others', which ``optimizer.clip`` turns into one
    lost step.
    Source: Zuhri et al. 2025, arXiv 2504.20966; numerator and denominator scaled by e^-max(a, 0) as there.
    """

    name = "softpick"
    summary = "rectified softmax: weights may all be zero"
    source = "Zuhri et al. 2025, arXiv 2504.20966"

    def weigh(self, logits_BHTS: Tensor, visible: Tensor) -> Tensor:
        # A hidden key must be 0 in the sum, not e^-inf - 1: its logit is set to 0.
        logits = logits_BHTS.masked_fill(~visible, 0.0)
        # From 0 on up, so that no row overflows; a common factor of both sides, so that it needs no gradient.
        top = logits.detach().amax(-1, keepdim=True).clamp_min(0.0)
        lifted = torch.exp(logits - top) - torch.exp(-top)
        return F.relu(lifted) / (lifted.abs().sum(-1, keepdim=True) + 1e-8)


@register
class ClippedSoftmax(Mechanism):
    """clip((zeta - gamma) * softmax(a)_ij + gamma, 0, 1) with gamma = -alpha / context: weights below about
    alpha / context become exactly 0, and with zeta above 1 large ones exactly 1.

    Nothing is kept when streaming; gamma stays that of the trained context. Takes the explicit path in training
    (``attention.weighed_attention``). ``alpha`` defaults to 4, where the paper finds values of 2 to 4 robust.
    Source: Bondarenko et al. 2023, arXiv 2306.12929, section 4.1.
    """

    name = "clipped_softmax"
    summary = "softmax stretched and clipped, so that weights can be exactly zero"
    source = "Bondarenko et al. 2023, arXiv 2306.12929"

    def __init__(self, model: ModelConfig, alpha: float = 4.0, zeta: float = 1.0) -> None:
        super().__init__(model)
        if not 0 <= alpha < model.context or zeta < 1:
            raise UserError(
                f"sink.options.alpha {alpha} and zeta {zeta} clip in the wrong direction; alpha must be at least 0 and "
                f"below the context ({model.context}), zeta at least 1."
            )
        if alpha == 0 and zeta == 1:
            raise UserError("sink.options.alpha 0 and zeta 1 clip nothing; use the mechanism vanilla for that.")
        self.gamma, self.zeta = -alpha / model.context, zeta

    def weigh(self, logits_BHTS: Tensor, visible: Tensor) -> Tensor:
        p = logits_BHTS.masked_fill(~visible, float("-inf")).softmax(-1)
        return ((self.zeta - self.gamma) * p + self.gamma).clamp(0.0, 1.0).masked_fill(~visible, 0.0)


def mechanism_class(config: SinkConfig) -> type[Mechanism]:
    """The class that a configuration names, its option names checked; raises UserError."""
    name = config.mechanism
    if name not in REGISTRY and not config.from_outside:
        kinds = "one of your own is named module:Class, the others:" if "." in name else "known:"
        raise UserError(f"unknown sink mechanism {name!r}; {meant(name, REGISTRY, kinds)}")
    cls = outside_class(name) if config.from_outside else REGISTRY[name]
    known = {option: type(default) for option, default in options(cls).items()}
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
        if known[key] is float and not math.isfinite(value):
            raise UserError(f"sink.options.{key} must be a finite number, not {value}.")
    return cls


def build(config: SinkConfig, model: ModelConfig) -> Mechanism:
    """One layer's mechanism; raises UserError for an unknown name or option."""
    cls = mechanism_class(config)
    with errors_placed(cls, "cannot be made") if config.from_outside else nullcontext():
        return cls(model, **config.options)


def label(config: SinkConfig) -> str:
    """A short name for tables, e.g. ``sink_tokens(n=2)``."""
    options = ", ".join(f"{k}={v}" for k, v in sorted(config.options.items()))
    return f"{config.mechanism}({options})" if options else config.mechanism
