"""The extra column: exact gradients against an fp64 eager reference, and the identities between formulations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sinkpretrain.attention import (
    ColumnAttention,
    _eager_column,
    attention_weights,
    causal_attention,
    masked_attention,
    merge_column,
    merge_keys,
    rope_tables,
    rotate,
)
from sinkpretrain.sinks import Column

B, H, T, D = 2, 3, 37, 16


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, H, T, D, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.to(dtype).requires_grad_() for x in (3 * q, k, v)]


def eager(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None, value: Tensor | None = None) -> Tensor:
    """The definition: one more column of logits, softmax, one more value."""
    logits = (q @ k.mT) * D**-0.5
    logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    if s is None:
        return logits.softmax(-1) @ v
    p = torch.cat((s.expand(B, H, T).unsqueeze(-1).to(logits.dtype), logits), dim=-1).softmax(-1)
    out = p[..., 1:] @ v
    return out if value is None else out + p[..., :1] * value.unsqueeze(-2)


def gradients(out: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    weight = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(out.dtype)).sum(), wanted)


COLUMNS = {
    "constant": lambda q: (torch.zeros((), dtype=torch.float64), None),
    "per head": lambda q: (torch.randn(H, 1, dtype=torch.float64).requires_grad_(), None),
    "per query": lambda q: (torch.randn(B, H, T, dtype=torch.float64).requires_grad_(), None),
    "per head with a value": lambda q: (
        torch.randn(H, 1, dtype=torch.float64).requires_grad_(),
        torch.randn(H, D, dtype=torch.float64).requires_grad_(),
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_gradients_are_exact(kind: str) -> None:
    q, k, v = inputs()
    s, value = COLUMNS[kind](q)
    wanted = [x for x in (q, k, v, s, value) if x is not None and x.requires_grad]
    out = causal_attention(q, k, v, Column(s, value))
    want = eager(q, k, v, s, value)
    assert (out - want).abs().max() < 1e-12
    for got, exact in zip(gradients(out, *wanted), gradients(want, *wanted), strict=True):
        assert (got - exact).abs().max() < 1e-12


@pytest.mark.parametrize("kind", COLUMNS)
def test_the_eager_path_is_the_definition_too(kind: str) -> None:
    q, k, v = inputs()
    s, value = COLUMNS[kind](q)
    got, want = _eager_column(q, k, v, Column(s, value)), eager(q, k, v, s, value)
    assert (got - want).abs().max() < 1e-12
    for g, w in zip(gradients(got, q, k, v), gradients(want, q, k, v), strict=True):
        assert (g - w).abs().max() < 1e-12


def test_key_bias_gradient_reaches_the_query() -> None:
    """A column whose logit depends on the query (K bias): dq gets both parts."""
    q, k, v = inputs()
    bias = torch.randn(H, D, dtype=torch.float64).requires_grad_()

    def logit() -> Tensor:
        return torch.einsum("bhtd,hd->bht", q, bias) * D**-0.5

    got = gradients(causal_attention(q, k, v, Column(logit())), q, bias)
    want = gradients(eager(q, k, v, logit()), q, bias)
    assert all((g - w).abs().max() < 1e-12 for g, w in zip(got, want, strict=True))


def test_detached_logsumexp_would_fail() -> None:
    """Negative control: the naive product out * sigmoid(lse - s) without the gradient of lse is clearly wrong."""
    q, k, v = inputs()
    s = torch.zeros((), dtype=torch.float64)
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[1].detach()
    naive = causal_attention(q, k, v, None) * torch.sigmoid(lse - s).unsqueeze(-1)
    assert (naive - eager(q, k, v, s)).abs().max() < 1e-12  # the forward cannot tell
    got, want = gradients(naive, q)[0], gradients(eager(q, k, v, s), q)[0]
    assert ((got - want).norm() / want.norm()) > 0.02


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 5, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    s = torch.randn(2, 1, generator=generator, dtype=torch.float64).requires_grad_()
    value = torch.randn(2, 8, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(ColumnAttention.apply, (q, k, v, s, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_close(dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    q, k, v = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    s = torch.full((H, 1), 0.3).requires_grad_()
    got = gradients(causal_attention(q, k, v, Column(s)), q, k, v, s)
    s64 = s.detach().double().requires_grad_()
    want = gradients(eager(*exact, s64), *exact, s64)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).norm() / w.norm() < tolerance


def test_zero_column_equals_prepended_zero_key_and_value() -> None:
    q, k, v = inputs()
    got = causal_attention(q, k, v, Column(torch.zeros(())))
    first = torch.zeros(B, H, 1, D, dtype=torch.float64)
    want = causal_attention(*(torch.cat((first, x), dim=2) for x in (q, k, v)), None)[:, :, 1:]
    assert (got - want).abs().max() < 1e-12


def test_zero_column_equals_torch_add_zero_attn() -> None:
    module = nn.MultiheadAttention(H * D, H, add_zero_attn=True, batch_first=True, dtype=torch.float64)
    x = torch.randn(B, T, H * D, dtype=torch.float64)
    want, _ = module(x, x, x, attn_mask=torch.ones(T, T).triu(1).bool(), need_weights=False)
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in (q, k, v))
    got = module.out_proj(causal_attention(q, k, v, Column(torch.zeros(()))).transpose(1, 2).reshape(B, T, H * D))
    assert (got - want).abs().max() < 1e-12


def test_minus_infinity_is_vanilla_bitwise() -> None:
    q, k, v = inputs(torch.float32)
    got = causal_attention(q, k, v, Column(torch.tensor(float("-inf"))))
    want = causal_attention(q, k, v, None)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(gradients(got, q, k, v), gradients(want, q, k, v), strict=True))


def test_two_keys_closed_form() -> None:
    """Equal logits 0 on two keys of value 1 and the zero column: 2/3 of the value is left."""
    q = k = torch.zeros(1, 1, 2, 8)
    out = causal_attention(q, k, torch.ones(1, 1, 2, 8), Column(torch.zeros(())))
    assert torch.allclose(out[0, 0, :, 0], torch.tensor([1 / 2, 2 / 3]))


def test_weights_and_column_mass_sum_to_one() -> None:
    q, k, v = inputs(torch.float32)
    column = Column(torch.full((H, 1), 0.5))
    weights, mass = attention_weights(q, k, column, torch.ones(T, T).tril().bool())
    assert torch.allclose(weights.sum(-1) + mass, torch.ones(B, H, T), atol=1e-6)
    assert torch.allclose(weights @ v, causal_attention(q, k, v, column), atol=1e-5)


def test_merges_equal_one_softmax() -> None:
    """Band keys, then a few separate keys, then the column: as good as one softmax over all of them."""
    q, k, v = (x.detach() for x in inputs())
    bias = torch.zeros(T, T, dtype=torch.float64).masked_fill(~torch.ones(T, T).tril().bool(), float("-inf"))
    sinks_off = bias.clone()
    sinks_off[:, :4] = float("-inf")
    out, lse = masked_attention(q, k, v, sinks_off)
    logits = (q @ k[:, :, :4].mT) * D**-0.5 + bias[:, :4]
    out, lse = merge_keys(out, lse, logits, v[:, :, :4])
    column = Column(torch.tensor(0.7))
    got = merge_column(out, lse, column)
    assert (got - eager(q, k, v, torch.tensor(0.7, dtype=torch.float64))).abs().max() < 1e-7


def test_rotation_depends_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(i: int, j: int) -> float:
        at = [rope_tables(torch.tensor([p]), 16, 10000.0) for p in (i, j)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert score(900, 890) == pytest.approx(score(11, 1), abs=1e-4)
    assert abs(score(900, 890) - score(900, 880)) > 1e-3
