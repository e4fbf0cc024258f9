"""``inspect``: the same numbers as the measures, sequences from where they should be, and when a sink emerges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, peaked
from family_factory import build, save
from matplotlib.image import imread
from run_factory import save_weights

from sinkpretrain import metrics
from sinkpretrain.cli import main
from sinkpretrain.compare import compare
from sinkpretrain.config import RunConfig, SinkConfig, save_yaml
from sinkpretrain.errors import UserError
from sinkpretrain.inspection import inspect_model, onset, sequences
from sinkpretrain.measures import last_query, measure, sink_rate, uniform_floor
from sinkpretrain.model import GPTNeoX

IDS = np.random.default_rng(0).integers(0, 96, 7000)


@pytest.fixture
def text(tmp_path: Path) -> str:
    np.save(tmp_path / "ids.npy", IDS)
    return str(tmp_path / "ids.npy")


def make_run(folder: Path, sink: str, steps: tuple[int, ...] = (0, 1, 2)) -> Path:
    """A run directory whose models attend more peakedly from step to step, and which logged two probes."""
    config = SinkConfig(sink)
    for step in steps:
        save_weights(
            peaked(GPTNeoX(TINY, config), 1.0 + 20 * step),
            folder / "weights" / f"step-{step:07d}.safetensors",
            step,
            sink,
        )
    save_yaml(RunConfig(model=TINY, sink=config, name=sink), folder / "config.yaml")
    lines: list[dict[str, Any]] = [{"kind": "train", "step": 1, "loss": 4.0}]
    for step in (0, 50):
        share = 0.5 if step else 0.0
        about = {"sink_share": share, "sink_rates": {"0.3": share}, "uniform_floor": 0.06}
        lines.append({"kind": "probe", "step": step, "first_mass": [0.1] * 3, "column_mass": [0.0] * 3, **about})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_file_holds_what_the_measures_say(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "sink_tokens")
    results = inspect_model(str(run), tokens=text, out=str(tmp_path / "out"), device="cpu", progress=False)
    assert json.loads((tmp_path / "out" / "inspect.json").read_text()) == results
    net = peaked(GPTNeoX(TINY, SinkConfig("sink_tokens")), 41.0).eval()
    ids = sequences(net, IDS, 100, 64)
    assert ids.shape == (100, 64)
    m = measure(net, ids)
    for name in ("first", "text", "prefix", "entropy", "value_norm"):
        assert np.array(results["measures"][name]) == pytest.approx(getattr(m, name).mean(1).numpy(), abs=1e-5)
    assert results["measures"]["sink_rates"]["0.2"] == pytest.approx(sink_rate(m.first, 0.2), abs=1e-5)
    assert results["measures"]["text_rates"]["0.1"] == pytest.approx(sink_rate(m.text, 0.1), abs=1e-5)
    assert results["measures"]["floor"]["first"] == pytest.approx(uniform_floor(0, 64), abs=1e-5)
    long = last_query(net, sequences(net, IDS, 8, 64))
    assert results["last_query"]["length"] == 64
    assert np.array(results["last_query"]["first"]) == pytest.approx(long["first"].numpy(), abs=1e-4)
    assert [len(row) for row in results["average_logits"][0]["rows"]] == list(range(1, 18))  # the sink and 16 tokens
    assert results["model"]["mechanism"] == "sink_tokens"
    assert {"device", "versions", "commit", "created", "command"} <= results.keys()
    assert results["model"]["seeds"] == {"training": RunConfig().training.seed, "data": RunConfig().data.seed}
    for name in ("attention_maps", "heads", "layers", "emergence"):
        assert imread(tmp_path / "out" / f"{name}.png")[..., :3].std() > 0.02


def test_sequences_are_spread_over_the_text_behind_the_prefix() -> None:
    net = GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 2}))
    ids = sequences(net, IDS, 10, 12)
    assert ids.shape == (10, 12)
    assert (ids[:, :2] == torch.tensor(net.prefix_ids)).all()
    assert ids[0, 2:].tolist() == IDS[:10].tolist()
    assert ids[-1, 2:].tolist() == IDS[-10:].tolist()
    with pytest.warns(UserWarning, match="room for 700 of 701 sequences of 10 tokens"):
        assert len(sequences(net, IDS, 701, 12)) == 700
    with pytest.raises(UserError, match="leave no text behind 2 sink tokens"):
        sequences(net, IDS, 1, 3)
    with pytest.raises(UserError, match="5 tokens, too few for a sequence of 10"):
        sequences(net, IDS[:5], 1, 12)


def test_emergence_is_measured_on_every_checkpoint(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "zero_sink")
    out = tmp_path / "out"
    results = inspect_model(str(run), text, out=str(out), checkpoints="all", samples=20, device="cpu", progress=False)
    found = results["emergence"]
    assert found["from"] == "checkpoints"
    assert [line["step"] for line in found["lines"]] == [0, 1, 2]
    masses = [np.mean(line["column_mass"]) for line in found["lines"]]
    assert masses[0] == pytest.approx(uniform_floor(1, 65), abs=0.005)  # even, the column like one key more
    assert np.mean(results["measures"]["column"]) == pytest.approx(masses[2], abs=1e-4)
    logged = inspect_model(str(run), text, out=str(out), samples=20, device="cpu", progress=False)["emergence"]
    assert logged["from"] == "metrics.jsonl"
    assert logged["onset"]["sink_rates"] == {"0.3": 50}
    assert all("tokens" not in line for line in [*found["lines"], *logged["lines"]])


def test_emergence_of_a_run_whose_steps_changed_in_size_is_against_tokens(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "vanilla")
    metrics.append(run, [{"kind": "train", "step": s, "tokens": t, "loss": 1.0} for s, t in ((1, 10), (2, 50))])
    for checkpoints in ("all", "newest"):
        sizes: Any = {"samples": 20, "device": "cpu", "progress": False, "checkpoints": checkpoints}
        lines = inspect_model(str(run), text, out=str(tmp_path / "out"), **sizes)["emergence"]["lines"]
        assert [line["tokens"] for line in lines] == [{0: 0, 1: 10}.get(line["step"], 50) for line in lines]


def test_onset_is_where_a_sink_stays() -> None:
    def lines(*shares: float) -> list[dict[str, Any]]:
        return [{"step": 10 * i, "sink_rates": {"0.3": share}} for i, share in enumerate(shares)]

    assert onset(lines(0.0, 0.5, 0.001, 0.02, 0.3)) == {"sink_rates": {"0.3": 30}}
    assert onset(lines(0.5, 0.5)) == {"sink_rates": {"0.3": 0}}
    assert onset(lines(0.0, 0.5, 0.0)) == {"sink_rates": {"0.3": None}}
    assert onset([{"step": 0, "sink_share": 0.0}]) == {}  # a run of before the thresholds were logged


def test_two_models_side_by_side_and_on_the_page(text: str, tmp_path: Path) -> None:
    for sink in ("vanilla", "zero_sink"):
        make_run(tmp_path / sink, sink)
    out = tmp_path / "results" / "v"
    flags = ["--tokens", text, "--out", str(out), "--layers", "0,2", "--heads", "1,mean", "--samples", "20"]
    assert main(["inspect", str(tmp_path / "vanilla"), "--beside", str(tmp_path / "zero_sink"), *flags]) == 0
    results = json.loads((out / "inspect.json").read_text())
    assert [(m["layer"], m["head"]) for m in results["average_logits"]] == [(0, 1), (0, None), (2, 1), (2, None)]
    assert results["beside"]["model"]["mechanism"] == "zero_sink"
    assert np.max(results["beside"]["measures"]["column"]) > 0
    height, width, _ = imread(out / "attention_maps.png").shape
    assert width > height > 600  # two rows of four
    compare([tmp_path / "results"], tmp_path / "page")
    page = (tmp_path / "page" / "comparison.md").read_text()
    rate = results["measures"]["sink_rates"]["0.1"]
    assert f"| vanilla | {100 * rate:.1f} % |" in page
    assert "![Average attention logits" in page
    assert {"layers.png", "attention_maps.png"} <= {p.name for p in (tmp_path / "page").iterdir()}


def test_models_of_other_makers_can_be_inspected(text: str, tmp_path: Path) -> None:
    folder = save(build("llama"), tmp_path / "llama")
    results = inspect_model(str(folder), text, out=str(tmp_path / "out"), samples=20, device="cpu", progress=False)
    assert np.array(results["measures"]["first"]).shape == (3, 4)
    assert results["last_query"]["length"] == 64
    assert "emergence" not in results


def test_a_context_of_a_hundred_thousand_is_not_looked_through_unasked(text: str, tmp_path: Path) -> None:
    """A mask of the whole context would take more memory than there is."""
    folder = save(build("llama", max_position_embeddings=131_072), tmp_path / "llama")
    run = {"out": str(tmp_path / "out"), "samples": 8, "device": "cpu", "progress": False}
    with pytest.warns(UserWarning, match="room for 1 of 8 sequences of 4096 tokens"):
        results = inspect_model(str(folder), text, **run)
    assert results["last_query"]["length"] == 4096
    folder = save(build("gpt2"), tmp_path / "gpt2")
    with pytest.raises(UserError, match="has 64 learned positions, too few for sequences of 100"):
        inspect_model(str(folder), text, long=100, **run)


def test_what_a_window_hides_is_null_in_the_file(text: str, tmp_path: Path) -> None:
    folder = save(build("mistral"), tmp_path / "mistral")  # sees nine keys
    results = inspect_model(str(folder), text, out=str(tmp_path / "out"), samples=20, device="cpu", progress=False)
    rows = results["average_logits"][0]["rows"]
    assert rows[15][:7] == [None] * 7
    assert None not in rows[15][7:]
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["average_logits"][0]["rows"] == rows


def test_a_folder_without_weights_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "mamba"}')
    assert main(["inspect", str(tmp_path / "other"), "--tokens", text, "--out", str(tmp_path / "out")]) == 2
    assert "holds no weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "3"], "--layers has '3', but vanilla has 0 .. 2"),
        (["--heads", "first"], "--heads has 'first', but vanilla has 0 .. 3"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--length", "1"], "sequences of 1 positions leave"),
        (["--checkpoints", "some"], "--checkpoints must be one of"),
        (["--beside", "nowhere"], "there is no model at nowhere"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    flags: list[str], message: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", "vanilla", (0,))
    assert main(["inspect", str(run), "--tokens", text, "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    net = GPTNeoX(TINY)
    with torch.no_grad():
        net.blocks[1].ln1.weight.fill_(torch.nan)
    save_weights(net, tmp_path / "nan.safetensors", 0)
    with pytest.raises(UserError, match=r"what is measured of .* is not finite"):
        inspect_model(str(tmp_path / "nan.safetensors"), text, out=str(tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


def test_checkpoints_need_a_run_and_the_second_model_the_same_layers(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "vanilla", (0,))
    file = str(run / "weights" / "step-0000000.safetensors")
    with pytest.raises(UserError, match="--checkpoints all needs a run directory with weights"):
        inspect_model(file, text, out=str(tmp_path / "out"), checkpoints="all")
    small = GPTNeoX(TINY.__class__(n_layer=1, d_model=64, n_head=4, vocab_size=128, tokenizer_size=96, context=64))
    save_weights(small, tmp_path / "small.safetensors", 0)
    with pytest.raises(UserError, match=r"has no layer 1, head 0, only layers 0 \.\. 0"):
        inspect_model(file, text, out=str(tmp_path / "out"), beside=str(tmp_path / "small.safetensors"))
