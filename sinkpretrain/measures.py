"""What tells a sink: where attention goes, and what it does to values and to the residual stream.

Formulas and sources of every measure are in ``docs/measures.md``.
Letters of the axes: L layers, B sequences, H heads, T queries, S keys, C width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkpretrain.attention import spread_heads
from sinkpretrain.language import LanguageModel
from sinkpretrain.observe import LayerAttention, observe

THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""epsilon of Sink_k; Gu et al. (2024, arXiv 2410.10781, section 3) report 0.3."""
SINK_THRESHOLD = 0.3

LONG_SAMPLES = 8
"""Inputs whose last query is looked at."""


# --- of one layer -------------------------------------------------------------------------------------------------


def alpha(weights_BHTS: Tensor, position: int) -> Tensor:
    """alpha_k [B, H]: mean attention to key ``position`` of the queries that see it, itself included."""
    received: Tensor = weights_BHTS[:, :, position:, position].mean(-1)
    return received


def uniform_floor(first_query: int, length: int) -> float:
    """What even attention gives a key: the mean of 1/(i + 1) over the causal queries first_query .. length - 1."""
    return float((1.0 / torch.arange(first_query + 1, length + 1, dtype=torch.float64)).mean())


def entropy(weights_BHTS: Tensor, mass_BHT: Tensor) -> Tensor:
    """Entropy [B, H] of the attention, nats, mean over queries; the column is one more outcome.

    Rows that do not sum to 1 (no softmax) are normalised first.
    """
    p = torch.cat((weights_BHTS, mass_BHT.unsqueeze(-1)), dim=-1)
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-30)
    mean: Tensor = -torch.special.xlogy(p, p).sum(-1).mean(-1)
    return mean


def value_norm_ratio(v_BHSD: Tensor) -> Tensor:
    """|v_0| over the mean |v_j| of the other positions, [B, H]."""
    norms = v_BHSD.float().norm(dim=-1)
    ratio: Tensor = norms[..., 0] / norms[..., 1:].mean(-1)
    return ratio


def massive_ratio(h_BTC: Tensor) -> Tensor:
    """max |h| over median |h| of each sequence, [B]."""
    size = h_BTC.float().abs().flatten(1)
    ratio: Tensor = size.amax(-1) / size.median(-1).values
    return ratio


def norm_ratio(h_BTC: Tensor) -> Tensor:
    """|h_0| over the mean |h_t| of the other positions, [B]."""
    norms = h_BTC.float().norm(dim=-1)
    ratio: Tensor = norms[:, 0] / norms[:, 1:].mean(-1)
    return ratio


def kurtosis(h_BTC: Tensor) -> Tensor:
    """Fourth standardised moment over a token's channels, mean over tokens, [B]; 3 for a normal distribution."""
    h = h_BTC.float()
    centred = h - h.mean(-1, keepdim=True)
    second = centred.square().mean(-1)
    return (centred.pow(4).mean(-1) / second.square().clamp(min=1e-30)).mean(-1)


def sink_rate(alpha_LBH: Tensor, threshold: float) -> float:
    """Sink_k: the share of (layer, sequence, head) whose alpha_k is above ``threshold``."""
    return float((alpha_LBH > threshold).double().mean())


# --- of a model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """Everything measured on some sequences of one length.

    length, n_prefix: positions of a sequence, and how many of them are the mechanism's prefix.
    first: alpha of position 0, [L, B, H]; text: alpha of the first text token; column: mean mass on the extra column;
    prefix: mass of all prefix positions (at least one), from the queries behind them.
    first_later: attention to position 0 of the queries after it.
    entropy, value_norm: [L, B, H].
    massive, norm, kurtosis: of the residual stream, [L + 1, B]; entry 0 stands in front of the first block.
    """

    length: int
    n_prefix: int
    first: Tensor
    text: Tensor
    prefix: Tensor
    column: Tensor
    first_later: Tensor
    entropy: Tensor
    value_norm: Tensor
    massive: Tensor
    norm: Tensor
    kurtosis: Tensor


def measure(model: LanguageModel, ids_BT: Tensor, batch: int = 128) -> Measures:
    """All measures on sequences as in training, prefix included, at least two positions behind the prefix.

    Args:
        ids_BT: the sequences.
        batch: sequences per forward; changes memory, not the numbers.
    """
    parts = [_measure_batch(model, ids) for ids in torch.split(ids_BT, batch)]
    n = len(model.prefix_ids)
    names = parts[0].keys()
    return Measures(ids_BT.shape[1], n, **{name: torch.cat([p[name] for p in parts], dim=1) for name in names})


def _measure_batch(model: LanguageModel, ids_BT: Tensor) -> dict[str, Tensor]:
    T, n = ids_BT.shape[1], len(model.prefix_ids)
    assert n + 1 < T, (T, n)
    heads: list[dict[str, Tensor]] = []
    stream: list[dict[str, Tensor]] = []

    def attention(layer: LayerAttention) -> None:
        weights, mass = layer.weights()
        behind = max(1, n)
        heads.append(
            {
                "first": alpha(weights, 0),
                "text": alpha(weights, n),
                "prefix": weights[:, :, behind:, :behind].sum(-1).mean(-1),
                "column": mass.mean(-1),
                "first_later": weights[:, :, 1:, 0].mean(-1),
                "entropy": entropy(weights, mass),
                "value_norm": value_norm_ratio(spread_heads(layer.v, layer.n_head)),
            }
        )

    def residual(depth: int, h: Tensor) -> None:
        stream.append({"massive": massive_ratio(h), "norm": norm_ratio(h), "kurtosis": kurtosis(h)})

    observe(model, ids_BT, attention, residual)
    return {
        name: torch.stack([layer[name] for layer in layers]).float().cpu()
        for layers in (heads, stream)
        for name in layers[0]
    }


def rates(m: Measures) -> dict[str, dict[str, float]]:
    """Sink_k at each threshold: of position 0, of the first text token if there is a prefix, of the column if any; of
    all sink tokens together if there are several."""
    of = {"sink_rates": m.first}
    if m.n_prefix:
        of["text_rates"] = m.text
    if m.n_prefix > 1:
        of["prefix_rates"] = m.prefix
    if m.column.any():
        of["column_rates"] = m.column
    return {name: {f"{t:g}": round(sink_rate(a, t), 5) for t in THRESHOLDS} for name, a in of.items()}


def residual_stream(m: Measures) -> dict[str, list[float]]:
    """Massive-activation ratio, norm ratio of position 0 and kurtosis at each depth, means over sequences."""
    return {name: rounded(getattr(m, name).mean(1)) for name in ("massive", "norm", "kurtosis")}


def sink_measures(model: LanguageModel, ids_BT: Tensor, long_BT: Tensor | None = None) -> dict[str, Any]:
    """The measures as one line of a run's record: per layer, not per head.

    Args:
        ids_BT: the sequences.
        long_BT: inputs whose last query is looked at too, some thousand positions long.

    Returns:
        ``first_mass``: per layer, mean attention of the queries i >= 1 to position 0, with its ``uniform_floor``;
        ``prefix_mass``, ``column_mass``: to all prefix positions, and to the mechanism's column.
        ``sink_share``: Sink_1 at 0.3 of position 0; ``sink_rates``, ``text_rates``, ``column_rates``: the same at each
        threshold for position 0, for the first text token, and for the column.
        ``entropy``, ``value_norm`` per layer; ``massive``, ``norm``, ``kurtosis`` per depth of the residual stream.
        ``last_first``, ``last_prefix``, ``last_column``: per layer, attention of the last query of the long inputs to
        position 0, to all prefix positions (at least one), to the column; ``last_length`` is their length.
    """
    m = measure(model, ids_BT)
    last = {} if long_BT is None else last_queries(model, long_BT)
    return {
        **{
            name: rounded(values.mean((1, 2)))
            for name, values in (
                ("first_mass", m.first_later),
                ("prefix_mass", m.prefix),
                ("column_mass", m.column),
                ("entropy", m.entropy),
                ("value_norm", m.value_norm),
            )
        },
        "sink_share": round(sink_rate(m.first, SINK_THRESHOLD), 5),
        "uniform_floor": round(uniform_floor(1, m.length), 5),
        **rates(m),
        **residual_stream(m),
        **{f"last_{name}": rounded(values.mean(1)) for name, values in last.items()},
        **({} if long_BT is None else {"last_length": long_BT.shape[1]}),
    }


def head_measures(m: Measures) -> dict[str, Any]:
    """The measures of every head, [L][H], means over sequences, with rates and residual stream.

    ``floor`` is what even attention would give alpha.
    """
    return {
        "floor": {"first": round(uniform_floor(0, m.length), 5), "text": round(uniform_floor(m.n_prefix, m.length), 5)},
        **{
            name: [rounded(layer) for layer in getattr(m, name).mean(1)]
            for name in ("first", "text", "prefix", "column", "entropy", "value_norm")
        },
        **rates(m),
        **residual_stream(m),
    }


def last_mass(line: Mapping[str, Any]) -> float:
    """Of a line of ``sink_measures``: what the last query of a long input gives to its sinks, whether position 0, sink
    tokens or a column; mean over layers."""
    return float(sum(line["last_prefix"]) + sum(line["last_column"])) / len(line["last_prefix"])


# --- over positions -----------------------------------------------------------------------------------------------


def last_query(model: LanguageModel, ids_BT: Tensor) -> dict[str, Tensor]:
    """Attention of the last query of a long input: to position 0, to the prefix, to the column; each [L, H]."""
    n = max(1, len(model.prefix_ids))
    found: list[dict[str, Tensor]] = []

    def attention(layer: LayerAttention) -> None:
        weights, mass = layer.last().weights()
        found.append(
            {
                "first": weights[:, :, 0, 0].mean(0),
                "prefix": weights[:, :, 0, :n].sum(-1).mean(0),
                "column": mass[:, :, 0].mean(0),
            }
        )

    observe(model, ids_BT, attention)
    return {name: torch.stack([layer[name] for layer in found]).cpu() for name in found[0]}


def last_queries(model: LanguageModel, ids_BT: Tensor) -> dict[str, Tensor]:
    """``last_query``, mean over inputs, one at a time: they are long."""
    found = [last_query(model, one) for one in torch.split(ids_BT, 1)]
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def average_logits(model: LanguageModel, ids_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean over sequences of the scaled logits, fp32 [L, H, T, T], and of the column's [L, H, T] if there is one.

    As in figures 2 and 7 of StreamingLLM; where nothing is seen, above the diagonal, stands nan, and so it does in a
    layer without the column that others have.
    """
    logits, columns = [], []

    def attention(layer: LayerAttention) -> None:
        mean = layer.logits().mean(0)
        logits.append(mean.masked_fill(mean == float("-inf"), float("nan")).float().cpu())
        column = layer.column_logits()
        columns.append(torch.full(mean.shape[:2], float("nan")) if column is None else column.mean(0).cpu())

    observe(model, ids_BT, attention)
    return torch.stack(logits), torch.stack(columns) if model.adds_column else None


def rounded(values: Tensor) -> list[float]:
    """A vector as plain numbers with five decimals."""
    return [round(v, 5) for v in values.float().cpu().tolist()]
