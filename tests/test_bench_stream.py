"""``bench stream`` at a toy shape: what it writes, what it leaves out, what a broken kernel costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sinkpretrain import bench_stream, ops
from sinkpretrain.band import KERNELS
from sinkpretrain.banded import merge_few
from sinkpretrain.bench_decode import build
from sinkpretrain.cache import Cache
from sinkpretrain.errors import UserError


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(bench_stream, "matmul_rate", lambda device: 1e12)  # seconds on a CPU


TOY = {"models": "toy", "cache": "4+28", "tokens": 500, "blocks": "128,64", "loop": 5, "device": "cpu"}


def run(path: Path, **more):
    report = bench_stream.bench_stream(out=str(path), **(TOY | more))
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    return report, {figure["name"]: figure for figure in report["figures"]}


def test_figures(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_stream, "DENSE", 64)
    report, figures = run(tmp_path / "stream.json")
    assert list(figures) == [
        "folded against the definition",
        "toy streaming: folded, block 128",
        "toy dense forward, context 64",
        "toy streaming 4+60",
        "toy token loop",
        "toy streaming, one text at 4 settings",
        "toy streaming: folded, block 64",
    ]
    assert report["failed"] == report["left_out"] == []
    main, loop = figures["toy streaming: folded, block 128"], figures["toy token loop"]
    assert main["mean_nll"] == figures["toy streaming: folded, block 64"]["mean_nll"]
    ratio = main["tokens_per_second"] / loop["tokens_per_second"]
    assert loop["streaming_over_this"] == pytest.approx(ratio, rel=0.01, abs=0.1)


def test_a_kernel_that_fails_gives_way_to_the_next(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(KERNELS, "flash", lambda q, k, v, reach, slopes: (0 * q, q.sum(-1)))
    report, figures = run(tmp_path / "stream.json", kernels="flash,folded", blocks="128")
    assert report["failed"][0].startswith("flash against the definition: ValueError: differs by")
    assert "toy streaming: folded, block 128" in figures


def test_what_has_no_time_is_left_out(tmp_path: Path) -> None:
    report, _ = run(tmp_path / "stream.json", seconds=1e-9)
    assert report["figures"] == report["failed"] == []
    assert "toy token loop" in report["left_out"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kernels": "fast"}, "unknown kernel 'fast'; known: masked"),
        ({"models": "gpt"}, "unknown model 'gpt'"),
        ({"blocks": "1k"}, "--blocks '1k' must be numbers"),
        ({"blocks": "0"}, "--blocks '0' must be numbers"),
        ({"cache": "4"}, "'4' is not a cache"),
        ({"tokens": 20}, "--tokens must be above the cache .*: 39"),
        ({"loop": 0}, "--loop of at least 1"),
    ],
)
def test_refusals(change: dict, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        run(tmp_path / "stream.json", **change)


def test_flops_are_what_torch_counts() -> None:
    """Of a forward whose every query sees all keys of the cache and itself."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build("toy", torch.device("cpu"), torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.head(model.hidden(torch.zeros(1, 64, dtype=torch.int64)))
    counted = counter.get_total_flops()  # torch counts the masked half too
    assert 64 * bench_stream.flops_per_token(model, Cache(4, 59)) == counted


def test_few_keys_merge_as_many_do() -> None:
    from sinkpretrain.attention import merge_keys

    out, logits, values = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 3), torch.randn(2, 4, 3, 16)
    lse = torch.randn(2, 4, 9)
    lse[..., 0] = float("-inf")  # a query that has no band yet
    out[..., 0, :] = 0.0
    logits[..., 1:4, 2] = float("-inf")
    for got, want in zip(merge_few(out, lse, logits, values), merge_keys(out, lse, logits, values), strict=True):
        torch.testing.assert_close(got, want)


def test_a_compiler_that_fails_costs_speed_only(monkeypatch) -> None:
    def compile(function, dynamic):
        def broken(*args):
            raise RuntimeError("no compiler\nat all")

        return broken

    monkeypatch.setattr(torch, "compile", compile)
    double = ops.compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="is not compiled .no compiler.;"):
        assert double(4) == 8
    assert double(5) == 10
