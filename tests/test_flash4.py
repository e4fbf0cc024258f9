"""The optional attention backend: used where it is right, one line and nothing else where it is not.

A stand-in for the package, with its names and layouts and torch's own CPU kernels inside, shows the seam on a CPU; the
package itself is tested on a GPU.
"""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch
from torch import Tensor

from sinkpretrain import flash4
from sinkpretrain.attention import causal_attention
from sinkpretrain.sinks import Column

aten = torch.ops.aten
D = 64
CPU = torch.device("cpu")


def by_head(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors]


def fwd(q, k, v, *, causal, return_lse):
    assert causal
    assert return_lse
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*by_head(q, k, v), 0.0, True)
    return out.transpose(1, 2).contiguous(), lse.contiguous(), None, None, None


def bwd(q, k, v, out, dout, lse, *, causal, deterministic, dq, dk, dv):
    q, k, v, out, dout = by_head(q, k, v, out, dout)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, causal)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        given.copy_(grad.transpose(1, 2))
    return dq, dk, dv


@pytest.fixture
def package(monkeypatch) -> types.ModuleType:
    """An installed flash-attention 4 on a device that it suits."""
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    modules = [types.ModuleType(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    modules[1].interface = modules[2]
    modules[2]._flash_attn_fwd, modules[2]._flash_attn_bwd = fwd, bwd
    monkeypatch.setattr(flash4, "_generation", lambda device: flash4.GENERATION)
    monkeypatch.setattr(flash4, "_trusted", set())
    return modules[2]


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 70, D, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def prepared() -> bool:
    return flash4.prepare(CPU, torch.bfloat16, D)


def results(column: Column | None, compiled: bool = False) -> list[Tensor]:
    attention = causal_attention
    if compiled:
        torch._dynamo.reset()
        attention = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    wanted = inputs()
    out = attention(*wanted, column)
    if column is not None:
        wanted = [*wanted, column.logit, column.value]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out, *torch.autograd.grad(out, wanted, direction)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_column", [False, True])
def test_it_is_used_forward_and_backward(package, monkeypatch, with_column: bool, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    column = None
    if with_column:
        column = Column(*(torch.randn(s, generator=generator).requires_grad_() for s in ((3, 1), (3, D))))
    want = results(column)
    calls = []
    for name, function in (("_flash_attn_fwd", fwd), ("_flash_attn_bwd", bwd)):
        monkeypatch.setattr(package, name, lambda *a, n=name, f=function, **kw: calls.append(n) or f(*a, **kw))
    assert prepared()
    calls.clear()
    got = results(column, compiled)
    assert calls == ["_flash_attn_fwd", "_flash_attn_bwd"]
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert ((g.float() - w.float()).norm() / w.float().norm()).item() < 1e-2
    flash4.distrust()
    results(column, compiled)
    assert len(calls) == 2


def test_other_dtypes_and_masks_are_not_its_matter(package) -> None:
    assert prepared()
    q, k, _ = inputs()
    assert flash4.takes(q, k)
    assert not flash4.takes(q.float(), k.float())
    assert not flash4.takes(q[..., :32], k[..., :32])
    assert not flash4.takes(q[:, :, :1], k)
    package._flash_attn_fwd = None  # would fail if a masked attention reached it
    visible = torch.ones(70, 70, dtype=torch.bool).tril()
    causal_attention(*inputs(), Column(torch.zeros(())), visible)


def raising(*args, **kwargs):
    raise RuntimeError("no such\nkernel")


def without_column(q, k, v, out, dout, lse, **kwargs):
    """A backward that makes its own logsumexp: right without a column, wrong with one."""
    out, lse = fwd(q, k, v, causal=True, return_lse=True)[:2]
    return bwd(q, k, v, out, dout, lse, **kwargs)


@pytest.mark.parametrize(
    ("name", "replacement", "says"),
    [
        ("_flash_attn_fwd", raising, "RuntimeError: no such kernel"),
        ("_flash_attn_bwd", without_column, r"its results are off by \d+ %"),
        ("_flash_attn_bwd", lambda *args, **kwargs: None, "its results are off by|cannot convert"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_passed_over(package, name: str, replacement, says: str) -> None:
    want = results(None)
    setattr(package, name, replacement)
    with pytest.warns(UserWarning, match=f"installed and not used: ({says})") as caught:
        assert not prepared()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    for got, expected in zip(results(None), want, strict=True):
        assert torch.equal(got, expected)


def test_silent_where_it_is_absent_unwanted_or_not_measured(package, monkeypatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv(flash4.SWITCH, "0")
        assert not prepared()
        monkeypatch.delenv(flash4.SWITCH)
        assert not flash4.prepare(CPU, torch.float32, D)
        assert not flash4.prepare(CPU, torch.bfloat16, 256)
        monkeypatch.setattr(flash4, "_generation", lambda device: 8)
        assert not prepared()
        monkeypatch.setattr(flash4, "_generation", lambda device: 9)
        for module in ("flash_attn.cute.interface", "flash_attn.cute", "flash_attn"):
            monkeypatch.delitem(sys.modules, module)
        assert not prepared()


def test_a_missing_dependency_is_named(package, monkeypatch) -> None:
    def lacking():
        raise ModuleNotFoundError("No module named 'cutlass'", name="cutlass")

    monkeypatch.setattr(flash4, "_kernels", lacking)
    with pytest.warns(UserWarning, match="not used: it lacks cutlass"):
        assert not prepared()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("with_column", [False, True])
def test_the_package_itself_against_the_definition(with_column: bool, compiled: bool, monkeypatch) -> None:
    """Output and gradients in bf16 no further from fp64 than bf16's rounding."""
    pytest.importorskip("flash_attn.cute")
    monkeypatch.setattr(flash4, "_trusted", set())
    if not flash4.prepare(torch.device("cuda"), torch.bfloat16, D):
        pytest.skip("not for this device")
    torch.manual_seed(0)
    B, H, T = 2, 4, 333
    q, k, v, d_out = (torch.randn(B, H, T, D, device="cuda").bfloat16() for _ in range(4))
    inputs = [(3 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    column = None
    if with_column:
        column = Column(*(torch.randn(s, device="cuda").requires_grad_() for s in ((H, 1), (H, D))))
        inputs += [column.logit, column.value]
    torch._dynamo.reset()
    attention = torch.compile(causal_attention, fullgraph=True) if compiled else causal_attention
    out = attention(*inputs[:3], column)
    got = [out, *torch.autograd.grad(out, inputs, d_out)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    logits = (exact[0] @ exact[1].mT) * D**-0.5
    logits = logits.masked_fill(torch.ones(T, T, device="cuda").triu(1).bool(), float("-inf"))
    if with_column:
        p = torch.cat((logits, exact[3].expand(B, H, T).unsqueeze(-1)), -1).softmax(-1)
        reference = p[..., :-1] @ exact[2] + p[..., -1:] * exact[4].unsqueeze(-2)
    else:
        reference = logits.softmax(-1) @ exact[2]
    want = [reference, *torch.autograd.grad(reference, exact, d_out.double())]
    for g, w in zip(got, want, strict=True):
        assert ((g.double() - w).norm() / w.norm()).item() < 1.5e-2
