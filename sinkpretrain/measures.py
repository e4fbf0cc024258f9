"""How much attention goes to the sink: measured on the attention itself, recomputed eagerly for a few samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import attention_weights, rotate, weighted_values
from sinkpretrain.model import GPTNeoX

SINK_THRESHOLD = 0.3
"""epsilon of Sink_k (Gu et al. 2024, arXiv 2410.10781, section 3)."""


@torch.no_grad()
def sink_measures(model: GPTNeoX, ids_BT: Tensor) -> dict[str, Any]:
    """Attention that the first position and the mechanism's column receive, from all queries after the first.

    Args:
        ids_BT: samples as in training, prefix included.

    Returns:
        ``first_mass`` and ``column_mass``: per layer, mean attention of the queries i >= 1 to position 0 and to the
        column. ``prefix_mass``: the same for all prefix positions together (the sink tokens).
        ``sink_share``: Sink_1, the share of (layer, head, sample) in which position 0 receives more than 0.3 on
        average over its queries, itself included (Gu et al. 2024). ``uniform_floor``: what even attention would give
        ``first_mass``.
    """
    T = ids_BT.shape[1]
    n_prefix = max(1, len(model.prefix_ids))
    cos, sin = model.rope(torch.arange(T, device=ids_BT.device))
    visible = torch.ones(T, T, dtype=torch.bool, device=ids_BT.device).tril()
    first, prefix, column, alpha = [], [], [], []

    def probe(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        extra = sink.column(q)
        weights, mass = attention_weights(q, k, extra, visible)
        first.append(weights[:, :, 1:, 0].mean())
        prefix.append(weights[:, :, n_prefix:, :n_prefix].sum(-1).mean())
        column.append(mass[:, :, 1:].mean())
        alpha.append(weights[..., 0].mean(-1))  # [B, H]
        return weighted_values(weights, mass, v, extra)

    model.hidden(ids_BT, probe)
    floor = (1.0 / torch.arange(2, T + 1, dtype=torch.float64)).mean()
    return {
        "first_mass": _rounded(torch.stack(first)),
        "prefix_mass": _rounded(torch.stack(prefix)),
        "column_mass": _rounded(torch.stack(column)),
        "sink_share": round(float((torch.stack(alpha) > SINK_THRESHOLD).float().mean()), 5),
        "uniform_floor": round(float(floor), 5),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(v, 5) for v in values.float().cpu().tolist()]
