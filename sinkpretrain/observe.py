"""Looking into a forward: every layer's attention inputs and the residual stream between the blocks.

Whatever is measured is measured on the model's own forward: an observer looks on and changes nothing.
Letters of the axes: B batch, H heads, T queries, S keys, C width of the residual stream, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sinkpretrain.attention import attention_weights, distance_bias, rotate, scaled_logits, visible_keys
from sinkpretrain.language import LanguageModel
from sinkpretrain.mechanism import Mechanism


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention is computed from, and the attention itself.

    q, k, v: [B, H, T, D], k and v with the same or fewer heads; q and k rotated to their positions.
    window, pinned: of ``visible_keys``, what the queries see of the keys; they are the last T of the S.
    slopes: of ALiBi, [H], or None.
    """

    index: int
    q: Tensor
    k: Tensor
    v: Tensor
    sink: Mechanism
    window: int | None
    pinned: int
    slopes: Tensor | None

    @property
    def visible(self) -> Tensor:
        """Which keys a query sees, bool [T, S]."""
        query, key = self._places()
        return visible_keys(query, key, self.window, self.pinned)

    @property
    def n_head(self) -> int:
        return self.q.shape[1]

    def last(self) -> LayerAttention:
        """The same with the last query alone."""
        return replace(self, q=self.q[:, :, -1:])

    def weights(self) -> tuple[Tensor, Tensor]:
        """The attention [B, H, T, S], and the mass on the mechanism's column [B, H, T]; quadratic in memory."""
        visible = self.visible if self.slopes is None else self._bias()
        column = self.sink.column(self.q, self.visible.sum(-1))
        return attention_weights(self.q, self.k, column, visible, self.sink.weigher)

    def logits(self) -> Tensor:
        """Scaled logits [B, H, T, S], -inf where a query does not see a key."""
        return scaled_logits(self.q, self.k) + self._bias()

    def column_logits(self) -> Tensor | None:
        """Logits of the mechanism's column, fp32 [B, H, T], if it has one."""
        column = self.sink.column(self.q, self.visible.sum(-1))
        return None if column is None else column.logit.float().expand(self.q.shape[:3])

    def _bias(self) -> Tensor:
        query, key = self._places()
        return distance_bias(query - key, self.slopes, self.visible)

    def _places(self) -> tuple[Tensor, Tensor]:
        keys = torch.arange(self.k.shape[2], device=self.q.device)
        return keys[-self.q.shape[2] :, None], keys


SeeAttention = Callable[[LayerAttention], None]
SeeResidual = Callable[[int, Tensor], None]
"""Told (depth, h [B, T, C]): the residual stream in front of the first block (depth 0) and behind each block."""


def observe(
    model: LanguageModel, ids_BT: Tensor, attention: SeeAttention | None = None, residual: SeeResidual | None = None
) -> None:
    """One causal forward over samples as in training (prefix included), watched."""
    T, device = ids_BT.shape[1], ids_BT.device
    places = torch.arange(T, device=device)
    cos, sin = model.rope(places)
    causal = model.causal(T, device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: Mechanism) -> Tensor:
        if attention is not None:
            # A run in bf16 autocast trains so; what is measured about it is computed in fp32.
            with torch.autocast(device.type, enabled=False):
                turned = rotate(q, cos, sin), rotate(k, cos, sin)
                attention(LayerAttention(layer, *turned, v, sink, model.windows[layer], model.pinned, model.slopes))
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
