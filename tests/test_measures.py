"""Sink measures against hand-computed values, against loops over single numbers, and on attention that is known."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, peaked
from family_factory import build, save

from sinkpretrain.attention import rotate
from sinkpretrain.config import SinkConfig
from sinkpretrain.load import load_model
from sinkpretrain.measures import (
    THRESHOLDS,
    alpha,
    average_logits,
    entropy,
    head_measures,
    kurtosis,
    last_mass,
    last_query,
    massive_ratio,
    measure,
    norm_ratio,
    sink_measures,
    sink_rate,
    uniform_floor,
    value_norm_ratio,
)
from sinkpretrain.model import GPTNeoX
from sinkpretrain.observe import LayerAttention, observe


def sample(net: GPTNeoX, batch: int = 2, length: int = 32) -> torch.Tensor:
    """Sequences as in training: the prefix in front, ``length`` positions in all."""
    prefix = torch.tensor(net.prefix_ids, dtype=torch.int64).expand(batch, -1)
    text = torch.randint(0, 96, (batch, length - prefix.shape[1]), generator=torch.Generator().manual_seed(1))
    return torch.cat((prefix, text), dim=1)


# --- by hand ------------------------------------------------------------------------------------------------------

ROWS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]])[None, None]  # [1, 1, 3, 3]


def test_alpha_by_hand() -> None:
    assert alpha(ROWS, 0).item() == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert alpha(ROWS, 1).item() == pytest.approx((0.5 + 0.25) / 2)
    assert alpha(ROWS, 2).item() == pytest.approx(0.5)


def test_floor_by_hand() -> None:
    assert uniform_floor(0, 3) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert uniform_floor(1, 3) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert uniform_floor(0, 64) == pytest.approx(0.074, abs=2e-4)  # as Gu et al. count: the first query included


def test_entropy_by_hand() -> None:
    none = torch.zeros(1, 1, 3)
    expected = (0 + math.log(2) + (0.5 * math.log(4) + 0.5 * math.log(2))) / 3
    assert entropy(ROWS, none).item() == pytest.approx(expected, abs=1e-6)
    # Half of every row on the column: one more bit of choice, the rest halved.
    half = torch.full((1, 1, 3), 0.5)
    assert entropy(ROWS / 2, half).item() == pytest.approx(math.log(2) + expected / 2, abs=1e-6)
    # Scores that are no distribution (sigmoid attention) count by their shares.
    assert entropy(ROWS * 3, none).item() == pytest.approx(expected, abs=1e-6)


def test_residual_ratios_by_hand() -> None:
    h = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, -3.0]]])
    assert norm_ratio(h).item() == pytest.approx(5 / 2)
    # |h| sorted: 0 0 1 3 3 4; torch's median is the lower of the middle two.
    assert massive_ratio(h).item() == pytest.approx(4.0)
    assert value_norm_ratio(h[:, None]).item() == pytest.approx(5 / 2)


def test_kurtosis_by_hand() -> None:
    # Two values far from two others: one. One outlier among four zeros: (4^4 + 4) / 5 over ((4^2 + 4) / 5)^2.
    assert kurtosis(torch.tensor([[[1.0, 1.0, -1.0, -1.0]]])).item() == pytest.approx(1.0)
    assert kurtosis(torch.tensor([[[5.0, 0, 0, 0, 0]]])).item() == pytest.approx(260 / 5 / 16)
    assert kurtosis(torch.randn(1, 4, 20000)).item() == pytest.approx(3.0, abs=0.1)


def test_sink_rate_by_hand() -> None:
    values = torch.tensor([0.05, 0.15, 0.35, 0.9]).reshape(2, 1, 2)
    assert [sink_rate(values, t) for t in (0.1, 0.3, 0.5)] == [0.75, 0.5, 0.25]


# --- brute force --------------------------------------------------------------------------------------------------


def test_every_measure_against_loops_over_single_numbers(mechanism: SinkConfig) -> None:
    """The model's own q, k and v, taken from its layers; then nothing but numpy and one number at a time."""
    net = peaked(GPTNeoX(TINY, mechanism)).eval()
    ids = sample(net, 2, 12)
    n, T = len(net.prefix_ids), 12
    seen = []
    observe(net, ids, lambda a: seen.append((a.q, a.k, a.v, a.sink)))
    m = measure(net, ids, batch=1)
    assert m.n_prefix == n
    for layer, (q, k, v, sink) in enumerate(seen):
        column = sink.column(q, torch.arange(1, T + 1))
        logit = column.logit.expand(q.shape[:3]).detach().double().numpy() if column else None
        q, k, v = (x.detach().double().numpy() for x in (q, k, v))
        for b in range(2):
            for h in range(TINY.n_head):
                rows, columns = [], []
                for i in range(T):
                    scores = [math.exp(q[b, h, i] @ k[b, h, j] / math.sqrt(TINY.head_dim)) for j in range(i + 1)]
                    extra = math.exp(logit[b, h, i]) if logit is not None else 0.0
                    total = sum(scores) + extra
                    if sink.weigher is None:
                        rows.append([s / total for s in scores])
                    else:
                        row = torch.tensor(scores).log()[None, None, None]
                        rows.append(sink.weigher(row, torch.ones(1, i + 1).bool()).flatten().tolist())
                    columns.append(extra / total)

                def close(values: torch.Tensor, expected: float, b=b, h=h, layer=layer) -> None:  # type: ignore[no-untyped-def]
                    assert values[layer, b, h].item() == pytest.approx(expected, abs=2e-5)

                close(m.first, sum(r[0] for r in rows) / T)
                close(m.first_later, sum(r[0] for r in rows[1:]) / (T - 1))
                close(m.text, sum(r[n] for r in rows[n:]) / (T - n))
                behind = max(1, n)
                close(m.prefix, sum(sum(r[:behind]) for r in rows[behind:]) / (T - behind))
                close(m.column, sum(columns) / T)
                outcomes = [[*r, c] for r, c in zip(rows, columns, strict=True)]
                shares = [p / sum(r) for r in outcomes for p in r if p > 0]
                close(m.entropy, sum(-p * math.log(p) for p in shares) / T)
                norms = [math.sqrt(v[b, h, j] @ v[b, h, j]) for j in range(T)]
                close(m.value_norm, norms[0] / (sum(norms[1:]) / (T - 1)))


def test_residual_measures_are_of_the_residual_stream() -> None:
    """Against the stream computed block by block, and with a depth in front of the first block."""
    net = peaked(GPTNeoX(TINY)).eval()
    ids = sample(net)
    x = net.embed(ids)
    stream = [x]
    for block in net.blocks:
        x = block(x, net.causal(32, ids.device))
        stream.append(x)
    m = measure(net, ids)
    assert m.norm.shape == (4, 2)
    for depth, h in enumerate(stream):
        a = h.detach().double().numpy()
        for b in range(2):
            assert m.massive[depth, b].item() == pytest.approx(
                np.abs(a[b]).max() / np.sort(np.abs(a[b]).ravel())[a[b].size // 2 - 1], rel=1e-4
            )
            norms = np.sqrt((a[b] ** 2).sum(-1))
            assert m.norm[depth, b].item() == pytest.approx(norms[0] / norms[1:].mean(), rel=1e-4)
            z = (a[b] - a[b].mean(-1, keepdims=True)) / a[b].std(-1, keepdims=True)
            assert m.kurtosis[depth, b].item() == pytest.approx((z**4).mean(), rel=1e-3)


def test_a_planted_massive_activation_is_seen() -> None:
    net = GPTNeoX(TINY).eval()
    before = measure(net, sample(net))
    with torch.no_grad():
        net.blocks[1].mlp.down.bias[5] = 500.0
    after = measure(net, sample(net))
    assert torch.equal(after.massive[:2], before.massive[:2])
    assert (after.massive[2:] > 100 * before.massive[2:]).all()
    assert (after.kurtosis[2:] > 50).all()
    assert after.kurtosis[1].max() < 4


# --- invariants ---------------------------------------------------------------------------------------------------


def test_rows_and_column_sum_to_one(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(TINY, mechanism)).eval()
    ids = sample(net)
    layers = []

    def see(layer: LayerAttention) -> None:
        weights, mass = layer.weights()
        layers.append(layer.index)
        if layer.sink.weigher is None:
            assert torch.allclose(weights.sum(-1) + mass, torch.ones_like(mass), atol=1e-5)
        assert (mass > 0).all() == net.adds_column

    observe(net, ids, see)
    assert layers == [0, 1, 2]


def test_observing_changes_nothing_and_leaves_nothing_behind(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(TINY, mechanism)).eval()
    ids = sample(net)
    hidden = []
    handle = net.ln_f.register_forward_hook(lambda _m, _i, out: hidden.append(out))
    net(ids)
    measure(net, ids)
    handle.remove()
    assert torch.equal(hidden[0], hidden[1])
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in net.blocks)


def test_even_attention_gives_the_floor() -> None:
    net = GPTNeoX(TINY).eval()
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.weight[: 2 * TINY.d_model] = 0
    ids = torch.randint(0, 96, (2, 64))
    measures = sink_measures(net, ids)
    assert measures["first_mass"] == pytest.approx([measures["uniform_floor"]] * 3, abs=1e-5)
    assert measures["sink_share"] == 0
    assert measures["entropy"] == pytest.approx([sum(map(math.log, range(1, 65))) / 64] * 3, abs=1e-4)
    longer = sink_measures(net, ids, torch.randint(0, 96, (3, 200)))
    assert longer["last_first"] == longer["last_prefix"] == pytest.approx([1 / 200] * 3, abs=1e-5)
    assert last_mass(longer) == pytest.approx(1 / 200, abs=1e-5)
    assert (longer["last_column"], longer["last_length"]) == ([0.0] * 3, 200)
    heads = head_measures(measure(net, ids))
    assert heads["first"] == [pytest.approx([heads["floor"]["first"]] * 4, abs=1e-5)] * 3


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
    assert measures["norm"][0] > 50
    assert last_query(net, ids)["first"][0].mean() > 0.8


def test_thresholds_fall_and_hold_the_published_one(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(TINY, mechanism)).eval()
    measures = sink_measures(net, sample(net))
    rates = list(measures["sink_rates"].values())
    assert len(rates) == len(THRESHOLDS)
    assert rates == sorted(rates, reverse=True)
    assert measures["sink_rates"]["0.3"] == measures["sink_share"]
    assert ("text_rates" in measures) == bool(net.prefix_ids)
    assert ("prefix_rates" in measures) == (len(net.prefix_ids) > 1)
    assert ("column_rates" in measures) == net.adds_column


def test_prefix_mass_counts_all_sinks() -> None:
    net = peaked(GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 4}))).eval()
    measures = sink_measures(net, sample(net, 1, 44))
    assert all(p > f for p, f in zip(measures["prefix_mass"], measures["first_mass"], strict=True))


# --- over positions -----------------------------------------------------------------------------------------------


def test_last_query_is_the_last_row(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(TINY, mechanism)).eval()
    ids = sample(net)
    n = max(1, len(net.prefix_ids))
    rows, masses = [], []

    def see(layer: LayerAttention) -> None:
        weights, mass = layer.weights()
        rows.append(weights[:, :, -1].mean(0))
        masses.append(mass[:, :, -1].mean(0))

    observe(net, ids, see)
    last = last_query(net, ids)
    assert torch.allclose(last["first"], torch.stack(rows)[..., 0], atol=1e-6)
    assert torch.allclose(last["prefix"], torch.stack(rows)[..., :n].sum(-1), atol=1e-6)
    assert torch.allclose(last["column"], torch.stack(masses), atol=1e-6)


def test_average_logits_are_scaled_rotated_products() -> None:
    net = peaked(GPTNeoX(TINY, SinkConfig("key_bias"))).eval()
    ids = sample(net, 3, 16)
    logits, columns = average_logits(net, ids)
    assert logits.shape == (3, 4, 16, 16)
    x = net.blocks[0].ln1(net.embed(ids))
    q, k, _ = net.blocks[0].attn.qkv(x).chunk(3, dim=-1)
    cos, sin = net.rope(torch.arange(16))
    for h in range(4):
        at = slice(16 * h, 16 * (h + 1))
        mean = (
            sum(
                rotate(q[b, None, None, :, at], cos, sin)[0, 0] @ rotate(k[b, None, None, :, at], cos, sin)[0, 0].T
                for b in range(3)
            )
            / 3
            / 4
        )
        lower = torch.ones(16, 16, dtype=torch.bool).tril()
        assert torch.allclose(logits[0, h][lower], mean[lower], atol=1e-5)
        assert torch.isnan(logits[0, h][~lower]).all()
        key = net.blocks[0].attn.sink.key[h]
        assert columns is not None
        expected = sum(rotate(q[b, None, None, :, at], cos, sin)[0, 0] @ key for b in range(3)) / 3 / 4
        assert torch.allclose(columns[0, h], expected, atol=1e-5)
    assert average_logits(GPTNeoX(TINY).eval(), ids)[1] is None


# --- other makers' models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "falcon-40b", "mpt-clip-heads", "gpt2"])
def test_other_families_attend_as_transformers_says(family: str, tmp_path: Path) -> None:
    """Grouped keys, windows, ALiBi and learned positions: attention and residual stream beside transformers' own."""
    theirs = build(family, attn_implementation="eager")
    net = load_model(save(theirs, tmp_path)).model
    ids = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(2))
    attention, stream = [], []
    observe(net, ids, lambda layer: attention.append(layer.weights()[0]), lambda _, h: stream.append(h))
    with torch.no_grad():
        expected = theirs(input_ids=ids, output_attentions=True, output_hidden_states=True)
    assert len(attention) == len(expected.attentions) == 3
    for ours, other in zip(attention, expected.attentions, strict=True):
        assert torch.allclose(ours, other, atol=1e-5)
    assert max(float(a.amax(-1).mean()) for a in attention) > 0.3  # peaked: even attention has 0.16
    for ours, other in zip(stream[:-1], expected.hidden_states[:-1], strict=True):  # theirs norms the last
        assert torch.allclose(ours, other, atol=1e-3, rtol=1e-4)
    m = measure(net, ids)
    assert torch.allclose(m.first, torch.stack(expected.attentions)[..., 0].mean(-1), atol=1e-5)
    assert torch.allclose(
        last_query(net, ids)["first"], torch.stack(expected.attentions)[..., -1, 0].mean(1), atol=1e-5
    )
    rows = torch.softmax(average_logits(net, ids[:1])[0].nan_to_num(float("-inf")), dim=-1)
    assert torch.allclose(rows, torch.stack(expected.attentions)[:, 0], atol=1e-5)


def test_a_window_that_a_model_was_trained_with_is_seen() -> None:
    config = dataclasses.replace(TINY, window=8)
    net = peaked(GPTNeoX(config)).eval()
    m = measure(net, sample(net))
    beyond = GPTNeoX(TINY, seed=None)
    beyond.load_state_dict(net.state_dict())
    assert (m.first < measure(beyond.eval(), sample(net)).first).float().mean() > 0.9
    assert last_query(net, sample(net))["first"].abs().max() == 0
