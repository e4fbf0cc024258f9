"""Training on the fast paths follows the plain path: the real trainer, many steps, the pieces in their plain form."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factory import make_data
from torch import Tensor, nn

from sinkpretrain import bench_curves as module
from sinkpretrain import ops
from sinkpretrain.attention import rotate
from sinkpretrain.bench_curves import WINDOW, bench_curves, compare_paths, difference
from sinkpretrain.config import DataConfig, LogConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from sinkpretrain.errors import UserError

STEPS = 300
TOLERANCE = 1e-3
"""In fp32 on one CPU; what is left is the order of sums, amplified over the steps."""


def run_config(data: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(n_layer=2, d_model=32, n_head=2, context=32),
        data=DataConfig(path=str(data), batch_size=4),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup=0.1),
        training=TrainingConfig(steps=STEPS, precision="32-true", accelerator="cpu", devices=1),
        log=LogConfig(
            every=50, validate_every=0, probe_every=0, checkpoint_every=0, weights_every=0, progress=False
        ),
    )  # fmt: skip


def plain_rotary(x: Tensor, linear: nn.Linear, tables: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = tables
    q, k, v = (p.view(-1, cos.shape[0], heads, p.shape[-1] // heads).transpose(1, 2) for p in linear(x).chunk(3, -1))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def plain_norms(parts: tuple[Tensor, Tensor, Tensor], bias: Tensor, norms: tuple[nn.LayerNorm, nn.LayerNorm]):
    total = sum(parts) + bias
    return total, *(norm(total) for norm in norms)


@pytest.fixture
def pieces(monkeypatch) -> list[int]:
    """The trunk in pieces on a CPU, each operation by its definition; compiled as far as a graph, without machine code.
    The list counts the forwards that went
    through them."""
    taken = [0]

    def can_fuse(x: Tensor) -> bool:
        taken[0] += torch.is_grad_enabled()
        return torch.is_grad_enabled()

    monkeypatch.setattr(ops, "can_fuse", can_fuse)
    monkeypatch.setattr(ops, "add_norms", plain_norms)
    monkeypatch.setattr(ops, "linear_rotary", plain_rotary)
    monkeypatch.setattr(ops, "linear_gelu", lambda x, linear, fused: nn.functional.gelu(linear(x)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    return taken


def test_many_steps_follow_the_plain_path(tmp_path: Path, pieces: list[int]) -> None:
    report = compare_paths(run_config(make_data(tmp_path / "data")), TOLERANCE)
    assert report["agree"], report["largest_difference"]
    assert pieces[0] == 4 * STEPS  # one run in two passes, two in one
    plain = report["curves"]["plain"]
    assert len(plain) == STEPS
    assert np.mean(plain[-WINDOW:]) < np.mean(plain[:WINDOW]) - 1  # it did learn


def test_a_wrong_gradient_is_noticed(tmp_path: Path, pieces: list[int], monkeypatch) -> None:
    """Negative control: where the MLPs' part of the stream's gradient is lost, the first loss is right all the same."""

    def norms_without(parts, bias, norms):
        total = sum(parts) + bias
        return total, norms[0](total), norms[1](total.detach())

    monkeypatch.setattr(ops, "add_norms", norms_without)
    base = run_config(make_data(tmp_path / "data"))
    report = compare_paths(dataclasses.replace(base, training=dataclasses.replace(base.training, steps=60)), TOLERANCE)
    assert not report["agree"]
    fast, plain = (report["curves"][name] for name in ("fast", "plain"))
    assert fast[0] == pytest.approx(plain[0], rel=1e-5)


def test_the_command_says_what_it_found(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    data = make_data(tmp_path / "data")
    report = bench_curves(
        str(data), str(tmp_path / "c.json"), model="demo", steps=WINDOW, micro_batch=2, context=32, tolerance=1e-4
    )
    assert report["agree"]
    assert "fast, in two passes: mean losses over 20 steps differ by 0.0" in capsys.readouterr().out
    assert (tmp_path / "c.json").is_file()
    for wrong in ({"micro_batch": 3}, {"steps": 5}):
        with pytest.raises(UserError):
            bench_curves(str(data), **wrong)


def test_difference_is_of_means() -> None:
    plain = np.linspace(4, 2, 100)
    noise = 0.3 * (-1) ** np.arange(100)
    assert difference(plain + noise, plain) < 1e-2 * module.WINDOW / 20
    assert difference(1.02 * plain, plain) == pytest.approx(0.02)
    assert difference(plain[:-1], plain) == np.inf
    assert difference(np.where(plain < 3, None, plain), plain) == np.inf
