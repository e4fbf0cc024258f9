"""The Triton kernels against their plain definitions on a CPU, through Triton's interpreter, in fp32."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest
import torch
from conftest import peaked
from torch import Tensor

from sinkpretrain.attention import rope_tables, rotate
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.model import GPTNeoX
from sinkpretrain.trunk import FusedTrunk

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from sinkpretrain import fused, fused_block, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5


def check(fast: tuple[Tensor, ...], plain: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    """Outputs, and gradients of every input under random gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    d_outs = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in plain]
    got = [*fast, *torch.autograd.grad(fast, inputs, [d.to(f) for d, f in zip(d_outs, fast, strict=True)])]
    want = [*plain, *torch.autograd.grad(plain, inputs, d_outs)]
    for number, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        assert ((g.double() - w).norm() / w.norm()).item() < TOLERANCE, number


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(s, device=DEVICE).requires_grad_() for s in shapes]


def test_add_norms() -> None:
    rows, width = 70, 48  # two programs and a part of one
    x, a, m, vectors = inputs = leaves((rows, width), (rows, width), (rows, width), (5, width))
    total = x.double() + a.double() + m.double() + vectors[0].double()
    _, w1, b1, w2, b2 = vectors.double()
    plain = tuple(torch.nn.functional.layer_norm(total, (width,), w, b, 1e-5) for w, b in ((w1, b1), (w2, b2)))
    check(fused_block.AddNorms.apply(x, a, m, vectors, 1e-5), (total, *plain), inputs)


@pytest.mark.parametrize(("heads", "head_dim", "rotary"), [(3, 16, 4), (2, 40, 40)])
def test_linear_rotary(heads: int, head_dim: int, rotary: int) -> None:
    B, T, C = 3, 37, heads * head_dim
    x, w, b = inputs = leaves((B * T, C), (3 * C, C), (3 * C,))
    tables = torch.stack(rope_tables(torch.arange(T, device=DEVICE), rotary, 100.0))
    got = fused_block.linear_rotary(x, w, b, tables, heads)
    q, k, v = (
        part.view(B, T, heads, head_dim).transpose(1, 2)
        for part in torch.nn.functional.linear(x.double(), w.double(), b.double()).chunk(3, -1)
    )
    cos, sin = tables.double()
    check(got, (rotate(q, cos, sin), rotate(k, cos, sin), v), inputs)


def test_linear_gelu() -> None:
    x, w, b = inputs = leaves((70, 24), (600, 24), (600,))
    plain = torch.nn.functional.gelu(torch.nn.functional.linear(x.double(), w.double(), b.double()))
    check((fused.LinearGELU.apply(x, w, b),), (plain,), inputs)


@pytest.fixture
def everywhere(monkeypatch) -> None:
    """Fused operations on whatever device, in fp32."""
    monkeypatch.setattr(ops, "can_fuse", lambda x: True)
    monkeypatch.setattr(ops, "fused_dtype", lambda: torch.float32)


def test_fused_trunk_is_the_model(mechanism: SinkConfig, tiny: ModelConfig, everywhere: None) -> None:
    """Hidden states and the gradient of every parameter, with every mechanism."""
    net = peaked(GPTNeoX(dataclasses.replace(tiny, n_layer=2), mechanism, seed=2)).to(DEVICE)
    ids = torch.randint(0, 96, (2, 20), device=DEVICE)
    attend = net.causal(20, ids.device)
    parameters = {n: p for n, p in net.named_parameters() if n != "head.weight"}
    results = []
    for hidden in (net.hidden(ids, attend), FusedTrunk(net, compiled=False)(ids, attend)):
        direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        results.append([hidden, *torch.autograd.grad((hidden * direction).sum(), list(parameters.values()))])
    for name, want, got in zip(["hidden", *parameters], *results, strict=True):
        assert ((got - want).norm() / want.norm().clamp_min(1e-6)).item() < TOLERANCE, name


def test_cross_entropy_kernel() -> None:
    """Losses of rows, and logits replaced by their gradient, over several blocks of columns."""
    rows, vocabulary = 9, 40_000
    logits = 3 * torch.randn(rows, vocabulary, device=DEVICE)
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    labels[4] = -100
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(want.sum(), exact)
    losses = torch.empty(rows, device=DEVICE)
    fused.cross_entropy_rows(logits, labels, losses)
    assert (losses - want).abs().max() < 1e-4
    assert (logits - gradient).abs().max() < TOLERANCE
