"""The mechanisms in a model: exact gradients for every one of them, and the identities between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MECHANISMS, TINY, peaked
from torch import Tensor, nn

from sinkpretrain import attention, sinks
from sinkpretrain.attention import rotate
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.data import to_batch
from sinkpretrain.errors import UserError
from sinkpretrain.model import GPTNeoX

SOURCES = Path(sinks.__file__).parent.parent / "configs" / "sinks"


def test_every_mechanism_is_tested_and_has_a_recipe() -> None:
    assert {c.mechanism for c in MECHANISMS.values()} == set(sinks.REGISTRY)
    named = {
        line.split()[-1] for f in SOURCES.glob("*.yaml") for line in f.read_text().splitlines() if "mechanism" in line
    }
    assert named == set(sinks.REGISTRY)


def loss_and_gradients(net: GPTNeoX, rows: Tensor, eager: bool) -> list[Tensor]:
    ids, labels = to_batch(rows.numpy(), net.prefix_ids)
    net.zero_grad()
    attend = None
    if eager:
        cos, sin = net.rope(torch.arange(ids.shape[1]))
        visible = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            q, k = rotate(q, cos.double(), sin.double()), rotate(k, cos.double(), sin.double())
            column = sink.column(q)
            logits = (q @ k.mT) * q.shape[-1] ** -0.5
            logits = logits.masked_fill(~visible, float("-inf"))
            if column is None:
                return logits.softmax(-1) @ v
            extra = column.logit.double().expand(logits.shape[:3]).unsqueeze(-1)
            p = torch.cat((extra, logits), dim=-1).softmax(-1)
            out = p[..., 1:] @ v
            return out if column.value is None else out + p[..., :1] * column.value.double().unsqueeze(-2)

    logits = net.head(net.hidden(ids, attend))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


def test_gradients_equal_an_eager_softmax(mechanism: SinkConfig) -> None:
    """Training's attention against a softmax with the column written out, both in fp64 (the column's logit is fp32)."""
    net = peaked(GPTNeoX(TINY, mechanism, seed=4)).double()
    rows = torch.randint(0, 96, (2, TINY.context + 1))
    fast, want = loss_and_gradients(net, rows, eager=False), loss_and_gradients(net, rows, eager=True)
    for a, b in zip(fast, want, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max().clamp_min(1e-3)


def column_of(name: str, **options: object) -> sinks.Mechanism:
    return sinks.build(SinkConfig(name, dict(options)), TINY)


def test_the_column_mechanisms_meet_at_zero() -> None:
    q = torch.randn(2, TINY.n_head, 5, TINY.head_dim)
    zero = column_of("zero_sink").column(q).logit
    for other in (column_of("off_by_c"), column_of("sink_logit"), column_of("key_bias"), column_of("key_value_bias")):
        assert torch.equal(other.column(q).logit.expand(2, TINY.n_head, 5), zero.expand(2, TINY.n_head, 5))


def test_key_value_bias_is_torchs_add_bias_kv() -> None:
    d, heads = TINY.d_model, TINY.n_head
    module = nn.MultiheadAttention(d, heads, add_bias_kv=True, batch_first=True)
    x, T = torch.randn(2, 9, d), 9
    want, _ = module(x, x, x, attn_mask=torch.ones(T, T).triu(1).bool(), need_weights=False)
    mechanism = column_of("key_value_bias")
    with torch.no_grad():
        mechanism.key.copy_(module.bias_k.view(heads, -1))
        mechanism.value.copy_(module.bias_v.view(heads, -1))
    parts = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.view(2, T, heads, -1).transpose(1, 2) for t in parts)
    got = attention.causal_attention(q, k, v, mechanism.column(q)).transpose(1, 2).reshape(2, T, d)
    assert torch.allclose(module.out_proj(got), want, atol=1e-5)


def test_a_sink_token_is_the_key_value_bias_read_off_at_position_zero() -> None:
    """Keys and values of a trained sink token, moved into the bias, with the text one position further on."""
    net = peaked(GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 1}), seed=4))
    bias = GPTNeoX(TINY, SinkConfig("key_value_bias"))
    text = torch.randint(0, 96, (1, 20))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    plain = net.causal(21, text.device)

    def reading(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        seen[layer] = (k[0, :, 0], v[0, :, 0])
        return plain(layer, q, k, v, sink)

    want = net.hidden(torch.cat((torch.tensor([net.prefix_ids]), text), dim=1), reading)[:, 1:]
    bias.load_state_dict(net.state_dict(), strict=False)
    with torch.no_grad():
        for layer, (key, value) in seen.items():
            bias.blocks[layer].attn.sink.key.copy_(key)
            bias.blocks[layer].attn.sink.value.copy_(value)
    cos, sin = bias.rope(torch.arange(1, 21))

    def shifted(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return attention.causal_attention(q, k, v, sink.column(q))

    assert torch.allclose(bias.hidden(text, shifted), want, atol=1e-4)


@pytest.mark.parametrize(("name", "parameters"), [("sink_logit", 144), ("key_bias", 9_216), ("key_value_bias", 18_432)])
def test_parameters_added_to_160m(name: str, parameters: int) -> None:
    model = ModelConfig(tokenizer_size=50277).resolved()
    assert 12 * sum(p.numel() for p in sinks.build(SinkConfig(name), model).parameters()) == parameters


def test_impossible_constant_is_refused() -> None:
    with pytest.raises(UserError, match="must be positive"):
        column_of("off_by_c", c=0.0)
    assert column_of("off_by_c", c=2).column(torch.zeros(1, 4, 1, 16)).logit.item() == pytest.approx(0.6931, abs=1e-4)
