"""GPTNeoX's hidden states in the order in which fused kernels can share passes over memory.

The same equation as ``GPTNeoX.hidden``, which is its definition and its test. A block's sum is taken where the next
block begins, together with that block's norms; the biases of the two output projections are added there too, in fp32.

Letters of the axes: N tokens (batch and time flattened), otherwise as in ``sinkpretrain.model``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkpretrain import ops
from sinkpretrain.model import Block, Causal, GPTNeoX


def maybe_compiled(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """Through torch.compile or not; a graph break, which would cost a third of the speed in silence, is an error."""
    return torch.compile(function, fullgraph=True) if compiled else function


class Open(NamedTuple):
    """What lies between two blocks, the sum not yet taken: [N, C] each, the last two without their biases."""

    stream: Tensor
    mixed: Tensor
    expanded: Tensor


class FusedTrunk:
    """Hidden states [B, T, C] of ids [B, T] by fused operations; by the plain path where they do not apply.

    Compiled in pieces: from one block's sum to the next one's is one graph, the same for all blocks, so that a deep
    model starts as fast as a shallow one.

    Args:
        model: any mechanism; blocks with a parallel residual, or the plain path is taken.
        compiled: run through torch.compile.
    """

    def __init__(self, model: GPTNeoX, compiled: bool) -> None:
        self._model = model
        self._plain = maybe_compiled(model.hidden, compiled)
        self._first, self._next, self._last = (maybe_compiled(f, compiled) for f in (_first, _next, _last))

    def __call__(self, ids_BT: Tensor, attend: Causal) -> Tensor:
        model = self._model
        if not (model.config.parallel_residual and ops.can_fuse(model.embed.weight)):
            hidden: Tensor = self._plain(ids_BT, attend)
            return hidden
        blocks = list(model.blocks)
        between = self._first(model.embed, blocks[0], ids_BT, attend)
        for done, following in itertools.pairwise(blocks):
            between = self._next(done, following, between, attend)
        normed: Tensor = self._last(blocks[-1], model.ln_f, between)
        return normed.view(*ids_BT.shape, -1)


def _first(embed: torch.nn.Embedding, block: Block, ids_BT: Tensor, attend: Causal) -> Open:
    x_NC = embed(ids_BT).flatten(0, 1)
    return Open(x_NC, *_branches(block, block.ln1(x_NC), block.ln2(x_NC), attend))


def _next(done: Block, following: Block, between: Open, attend: Causal) -> Open:
    stream, for_attention, for_mlp = ops.add_norms(between, _bias(done), (following.ln1, following.ln2))
    return Open(stream, *_branches(following, for_attention, for_mlp, attend))


def _last(block: Block, norm: torch.nn.LayerNorm, between: Open) -> Tensor:
    normed: Tensor = norm(between.stream + between.mixed + between.expanded + _bias(block))
    return normed


def _branches(block: Block, for_attention: Tensor, for_mlp: Tensor, attend: Causal) -> tuple[Tensor, Tensor]:
    """Attention and MLP [N, C] without the biases of their output projections, from their normed inputs [N, C]."""
    attention, mlp = block.attn, block.mlp
    sink, x_BTC = attention.sink, for_attention.view(-1, attend.tables.shape[1], for_attention.shape[-1])
    q, k, v = ops.linear_rotary(for_attention, attention.qkv, attend.tables, attention.n_head)
    o_BHTD = sink.output(x_BTC, attend.rotated(q, k, sink.values(x_BTC, v), sink).to(v.dtype))
    o_NC = o_BHTD.transpose(1, 2).reshape(for_attention.shape)
    expanded = ops.linear_gelu(for_mlp, mlp.up, fused=True)
    return F.linear(o_NC, attention.out.weight), F.linear(expanded, mlp.down.weight)


def _bias(block: Block) -> Tensor:
    return block.attn.out.bias + block.mlp.down.bias
