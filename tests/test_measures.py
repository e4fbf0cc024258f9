"""Sink measures on attention that is known."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, peaked

from sinkpretrain.config import SinkConfig
from sinkpretrain.measures import sink_measures
from sinkpretrain.model import GPTNeoX


def test_even_attention_gives_the_floor() -> None:
    net = GPTNeoX(TINY).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.weight[: 2 * TINY.d_model] = 0
    measures = sink_measures(net, torch.randint(0, 96, (2, 64)))
    assert measures["first_mass"] == pytest.approx([measures["uniform_floor"]] * 3, abs=1e-4)
    # Gu et al. give 0.074 for alpha_1 at T = 64, which includes the first query (weight 1).
    assert (measures["uniform_floor"] * 63 + 1) / 64 == pytest.approx(0.074, abs=1e-3)
    assert measures["sink_share"] == 0


def test_a_head_that_looks_at_the_first_token_is_a_sink() -> None:
    net = GPTNeoX(TINY).eval()
    with torch.no_grad():
        net.embed.weight[95] = 100 * torch.randn(TINY.d_model)
        for block in net.blocks:
            d, bias = TINY.d_model, block.attn.qkv.bias
            block.attn.qkv.weight[: 2 * d] = 0
            bias[:d] = 1.0
            # the key of token 95 alone is large: its normed embedding is a known direction
            direction = torch.nn.functional.layer_norm(net.embed.weight[95], (d,))
            block.attn.qkv.weight[d : 2 * d] = 4 * direction.expand(d, d) / d
    ids = torch.randint(0, 90, (2, 32))
    ids[:, 0] = 95
    measures = sink_measures(net, ids)
    assert measures["sink_share"] > 0.5
    assert measures["first_mass"][0] > 0.8


def test_column_mass() -> None:
    net = peaked(GPTNeoX(TINY, SinkConfig("zero_sink"))).eval()
    measures = sink_measures(net, torch.randint(0, 96, (2, 32)))
    assert all(0.001 < m < 0.999 for m in measures["column_mass"])
    assert sink_measures(peaked(GPTNeoX(TINY)).eval(), torch.randint(0, 96, (2, 32)))["column_mass"] == [0, 0, 0]


def test_prefix_mass_counts_all_sinks() -> None:
    net = peaked(GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 4}))).eval()
    measures = sink_measures(net, torch.cat((torch.tensor([net.prefix_ids]), torch.randint(0, 96, (1, 40))), dim=1))
    assert all(p > f for p, f in zip(measures["prefix_mass"], measures["first_mass"], strict=True))


def test_measuring_computes_the_model_that_it_measures() -> None:
    """The probe's own attention feeds the next layer, so its last hidden state must be the model's."""
    for sink in (SinkConfig("zero_sink"), SinkConfig("vanilla")):
        net = peaked(GPTNeoX(TINY, sink)).eval()
        ids = torch.randint(0, 96, (2, 32))
        seen = []
        net.ln_f.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        sink_measures(net, ids)
        net(ids)
        assert torch.allclose(seen[0], seen[1], atol=1e-4)
