"""``sinkpretrain bench decode`` on toy models: what is measured, written and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sinkpretrain import bench_decode
from sinkpretrain.bench_decode import SHAPES, Recomputing, build, flops_per_token, jobs, pairs, table
from sinkpretrain.bench_figures import decode_figure
from sinkpretrain.cli import main
from sinkpretrain.sampling import Sampler, Sampling


def test_figures_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    words = ["--models", "toy", "--caches", "8,40", "--seconds", "0", "--compile=false", "--out", str(out)]
    assert main(["bench", "decode", *words]) == 0
    report = json.loads(out.read_text())
    assert report["difference_to_the_evaluator"] < 1e-4
    assert {"device", "versions", "commit", "dtype"} <= report.keys()
    found = pairs(report)
    assert [(m, n) for m, n, _ in found] == [("toy", 8), ("toy", 40)]
    for _, length, by_strategy in found:
        assert by_strategy.keys() == {"streaming", "recompute"}
        # The ring's slots and those for a block, keys and values, two layers of 64 wide, 4 bytes.
        assert by_strategy["streaming"]["cache_bytes"] == (length + 128) * 2 * 2 * 64 * 4
    assert {f["drawing"] for f in report["figures"]} > {"greedy", "top-p 0.95"}
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "| toy | 40 |" in capsys.readouterr().out


def test_a_strategy_that_was_not_measured_leaves_the_figure_to_the_other(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_decode, "matmul_rate", lambda device: 1e12)  # seconds on a CPU
    words = ["--models", "toy", "--caches", "8", "--seconds", "0", "--recompute=false", "--drawings=false"]
    out = tmp_path / "decode.json"
    assert main(["bench", "decode", *words, "--compile=false", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    [legend] = decode_figure(report).legends
    assert [t.get_text() for t in legend.get_texts()] == [f"streaming, {report['device']}"]


@pytest.mark.parametrize("positions", [1, 24])
def test_flops_are_those_of_the_products_of_a_forward(positions: int) -> None:
    """Counted by torch, of which what attention does is taken away."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = build("toy", torch.device("cpu"), torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.head(model.hidden(torch.zeros(1, positions, dtype=torch.int64))[0, -1:])
    c = model.config
    attention = 4 * c.n_layer * c.n_head * c.head_dim * positions**2
    assert flops_per_token(model, positions) == counter.get_total_flops() - attention


def test_the_papers_numbers_stand_beside_ours() -> None:
    figure = {"model": "llama-2-13b", "length": 4096, "drawing": "temperature", "peak_memory_bytes": 2**30}
    report = {
        "device": "d", "dtype": "bfloat16", "versions": {"torch": "2"}, "commit": "c", "left_out": ["x"],
        "figures": [
            figure | {"strategy": "recompute", "milliseconds": 300.0},
            figure | {"strategy": "streaming", "milliseconds": 12.0},
        ],
    }  # fmt: skip
    assert "| 300 | 12 | 25.0x | 2355 / 106 | 22.2x |" in table(report)
    assert "left out: x" in table(report)


def test_every_point_is_inside_its_panel_and_numbers_are_plain() -> None:
    figures = [
        {"model": "llama-2-13b", "length": n, "strategy": s, "drawing": "temperature", "parameters": 13,
         "milliseconds": ms, "peak_memory_bytes": (25 + n / 1000) * 2**30}
        for n, slow, fast in ((256, 17.6, 12.1), (4096, 231.0, 14.5))
        for s, ms in (("recompute", slow), ("streaming", fast))
    ]  # fmt: skip
    figure = decode_figure({"device": "d", "figures": figures})
    FigureCanvasAgg(figure).draw()
    time, memory = figure.axes
    assert memory.get_ylim()[1] > 1.05 * 29.096
    assert memory.get_ylim()[0] == 0
    shown = [t.get_text() for t in (*time.get_yticklabels(), *time.get_yticklabels(minor=True)) if t.get_text()]
    assert {"20", "50", "100", "2,000"} <= set(shown)
    assert not any("10^" in text or "e+" in text for text in shown)


def test_recomputing_is_a_fresh_forward_over_the_last_tokens() -> None:
    model = build("toy", torch.device("cpu"), torch.float32)
    ids = torch.arange(10)
    sampler = Sampler(Sampling(temperature=0.0), torch.zeros(512, dtype=torch.bool), torch.Generator())
    tokens = iter(Recomputing(model, sampler, ids))
    text = ids.tolist()
    for _ in range(4):
        want = int(model.head(model.hidden(torch.tensor([text[-10:]]))[0, -1]).argmax())
        assert next(tokens) == want
        text.append(want)


def test_what_matters_comes_first() -> None:
    plan = [str(job) for job in jobs(["160m", "llama-2-13b"], [256, 1024, 4096], compiled=True, drawings=True)]
    assert plan[0] == "160m streaming 256 temperature"
    assert plan.index("llama-2-13b streaming 4096 temperature") < plan.index("llama-2-13b streaming 256 temperature")
    assert plan[-1] == "160m streaming, compiled 1024 temperature"


@pytest.mark.parametrize(("name", "parameters"), [("160m", 162_322_944), ("llama-2-7b", 6_738_415_616),
                                                  ("llama-2-13b", 13_015_864_320)])  # fmt: skip
def test_shapes_are_the_published_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert SHAPES[name]().n_parameters() == parameters


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("decode --models toi", "unknown model 'toi'; known: 160m"),
        ("decode --caches 4", "must be sizes above 4"),
        ("decode --caches x", "must be sizes above 4"),
        ("decod", "did you mean decode?"),
        ("", "what is to be measured?"),
    ],
)
def test_mistakes_are_one_sentence(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
