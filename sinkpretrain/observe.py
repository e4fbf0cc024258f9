"""Looking into a forward: every layer's attention inputs and the residual stream between the blocks.

Whatever is measured is measured on the model's own forward: an observer looks on and changes nothing.
Letters of the axes: B batch, H heads, T queries, S keys, C width of the residual stream, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import rotate
from sinkpretrain.model import GPTNeoX

SeeAttention = Callable[[int, Tensor, Tensor, Tensor, sinks.Mechanism], None]
"""Told (layer, q [B, H, T, D], k, v [B, H, S, D], mechanism) of every layer, q and k rotated to their positions."""
SeeResidual = Callable[[int, Tensor], None]
"""Told (depth, h [B, T, C]): the residual stream in front of the first block (depth 0) and behind each block."""


def observe(
    model: GPTNeoX, ids_BT: Tensor, attention: SeeAttention | None = None, residual: SeeResidual | None = None
) -> None:
    """One causal forward over samples as in training (prefix included), watched."""
    T = ids_BT.shape[1]
    cos, sin = model.rope(torch.arange(T, device=ids_BT.device))
    causal = model.causal(T, ids_BT.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        if attention is not None:
            # A run in bf16 autocast trains so; what is measured about it is computed in fp32.
            with torch.autocast(ids_BT.device.type, enabled=False):
                attention(layer, rotate(q, cos, sin), rotate(k, cos, sin), v, sink)
        return causal(layer, q, k, v, sink)

    handles = []
    if residual is not None:
        see = residual
        handles.append(model.blocks[0].register_forward_pre_hook(lambda _, args: see(0, args[0])))
        for depth, block in enumerate(model.blocks, start=1):
            handles.append(block.register_forward_hook(lambda _, __, out, depth=depth: see(depth, out)))
    try:
        with torch.no_grad():
            model.hidden(ids_BT, attend)
    finally:
        for handle in handles:
            handle.remove()
