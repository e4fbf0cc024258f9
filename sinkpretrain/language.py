"""What streaming, generating and measuring need of a model, whoever made it.

Letters of the axes: B batch, T queries, S keys, C width of the residual stream, H heads, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from sinkpretrain import sinks
from sinkpretrain.config import SinkConfig

Attend = Callable[[int, Tensor, Tensor, Tensor, sinks.Mechanism], Tensor]
"""(layer, q, k, v, mechanism) -> output. q and the output are [B, H, T, D]; k and v are [B, H or fewer, T, D], the
heads of each of their groups next to each other; q and k are not yet rotated. Logits are q . k / sqrt(D)."""


class Shape(Protocol):
    """The facts of a model's configuration that its users may ask for."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def context(self) -> int:
        """Positions the model was made for."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""

    @property
    def tokenizer_size(self) -> int:
        """Ids that text can contain; at most ``vocab_size``."""


class LanguageModel(Protocol):
    """A decoder-only transformer whose attention is a function given to its forward.

    ``GPTNeoX`` (what is trained here), ``Decoder`` and ``Foreign`` (models of other makers) satisfy it.

    embed, head: the vocabulary's matrices; logits are ``head(hidden)``.
    blocks: its layers, modules called with the residual stream [B, T, C] first, which return it.
    sink_config: the sink mechanism it was trained with.
    prefix_ids: ids that belong in front of every sequence; the caller puts them there.
    adds_column: whether the softmax of its sink mechanism has a column more than there are keys.
    slopes: ALiBi's fp32 slope of each head [H], or None: a key at distance d gets the bias -slope * d.
    windows: for each layer how many keys a query may see, itself included, or None for all before it.
    pinned: keys in the first so many places are seen through every window.
    learned_positions: how many positions its embedding of positions has, or None if it has no such embedding.
    placed: a forward depends on the positions it is told.
    replayable: a forward does the same to every token, so that it may be compiled, or captured in a CUDA graph.
    """

    embed: nn.Embedding
    head: nn.Linear
    blocks: nn.ModuleList
    sink_config: SinkConfig
    prefix_ids: tuple[int, ...]
    adds_column: bool

    @property
    def config(self) -> Shape: ...
    @property
    def slopes(self) -> Tensor | None: ...
    @property
    def windows(self) -> Sequence[int | None]: ...
    @property
    def pinned(self) -> int: ...
    @property
    def learned_positions(self) -> int | None: ...
    @property
    def placed(self) -> bool: ...
    @property
    def replayable(self) -> bool: ...

    def hidden(self, ids_BT: Tensor, attend: Attend | None = None, positions_T: Tensor | None = None) -> Tensor:
        """The normed last hidden state [B, T, C]; plain causal attention unless ``attend`` says otherwise.

        ``positions_T`` (int64 [T] or [B, T]; by default 0, 1, ...) matter where the model is ``placed``, to an
        embedding of positions or a scale of queries: all other positions are the business of ``attend``.
        """

    def causal(self, length: int, device: torch.device) -> Attend:
        """The attention of a plain forward over positions 0 .. length - 1."""

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [T, R], to rotate the first R dimensions of queries and keys with; R may be 0.

        Positions in fp64 have their angles taken in fp64.
        """

    def n_parameters(self) -> int: ...
    def to(self, *args: Any, **kwargs: Any) -> Self: ...
