"""The fused trunk's dtypes on a CPU: its kernels' plain definitions, rounded where the kernels round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import MECHANISMS, peaked
from rounding import excess_of_rounding
from torch import Tensor, nn

from sinkpretrain import ops
from sinkpretrain.attention import rotate
from sinkpretrain.config import ModelConfig
from sinkpretrain.model import GPTNeoX
from sinkpretrain.trunk import FusedTrunk

NARROW = torch.bfloat16
SIZE = ModelConfig(n_layer=2, d_model=96, n_head=3, vocab_size=256, tokenizer_size=200, context=64)


def add_norms(
    parts: tuple[Tensor, Tensor, Tensor], bias: Tensor, norms: tuple[nn.LayerNorm, nn.LayerNorm]
) -> tuple[Tensor, ...]:
    total = parts[0] + parts[1].float() + parts[2].float() + bias
    return total, *(F.layer_norm(total, n.normalized_shape, n.weight, n.bias, n.eps).to(NARROW) for n in norms)


def linear_rotary(x: Tensor, linear: nn.Linear, tables: Tensor, heads: int) -> tuple[Tensor, ...]:
    joined = F.linear(x.to(NARROW), linear.weight.to(NARROW), linear.bias.to(NARROW))
    parts = joined.view(-1, tables.shape[1], 3, heads, x.shape[-1] // heads).unbind(2)
    q, k, v = (part.transpose(1, 2) for part in parts)
    return rotate(q.float(), *tables).to(NARROW), rotate(k.float(), *tables).to(NARROW), v


def linear_gelu(x: Tensor, linear: nn.Linear, fused: bool) -> Tensor:
    return F.gelu(F.linear(x.to(NARROW), linear.weight.to(NARROW), linear.bias.to(NARROW)))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., Tensor]]:
    """The fused trunk of a model with these definitions in place of the kernels, which do not see autocast either."""

    def as_a_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

        return call

    plain = {f.__name__: f for f in (add_norms, linear_rotary, linear_gelu)}

    def make(net: GPTNeoX, **others: Callable[..., Any]) -> Callable[..., Tensor]:
        def hidden(*args: Any) -> Tensor:
            with monkeypatch.context() as m:
                m.setattr(ops, "can_fuse", lambda x: True)
                for name, function in (plain | others).items():
                    m.setattr(ops, name, as_a_kernel(function))
                return FusedTrunk(net, compiled=False)(*args)

        return hidden

    return make


@pytest.mark.parametrize("sink", ["vanilla", "sink_logit_normal", "key_value_bias", "output_gate", "value_gate"])
def test_the_fused_trunk_rounds_no_more_than_autocast(sink: str, fast: Any) -> None:
    net = peaked(GPTNeoX(SIZE, MECHANISMS[sink], seed=2), factor=3.0)
    ratios = excess_of_rounding(net, fast(net), samples=16, batch=2, length=64)
    assert {name: r for name, r in ratios.items() if r > 1.15} == {}


def test_norms_taken_in_16_bits_would_be_noticed(fast: Any) -> None:
    """As they were if autocast let them be: of the sum and the weights in 16 bits."""

    def narrow(parts: Any, bias: Tensor, norms: Any) -> tuple[Tensor, ...]:
        total, *_ = add_norms(parts, bias, norms)
        vectors = [(n.weight.to(NARROW), n.bias.to(NARROW), n.eps) for n in norms]
        return total, *(F.layer_norm(total.to(NARROW), total.shape[-1:], *v) for v in vectors)

    net = peaked(GPTNeoX(SIZE, MECHANISMS["vanilla"], seed=2), factor=3.0)
    ratios = excess_of_rounding(net, fast(net, add_norms=narrow), samples=8, batch=2, length=64)
    assert min(ratios[f"ln{i}.{name}"] for i in (1, 2) for name in ("weight", "bias")) > 1.15
