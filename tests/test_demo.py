"""The demo as a newcomer meets it: trained models at its end, or one sentence on where to find them."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from run_factory import CONFIG, make_run

from sinkpretrain import demo as module
from sinkpretrain.config import sink_recipe
from sinkpretrain.demo import MODELS, TRAINED, TRAINED_TOKENS, demo, finding, reproduce
from sinkpretrain.errors import UserError
from sinkpretrain.export import export
from sinkpretrain.files import read_json
from sinkpretrain.load import load_model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """Exports like those that come with the repository, but small and never trained."""
    root = tmp_path_factory.mktemp("models")
    config = dataclasses.replace(CONFIG, context=512)
    for seed, name in enumerate(TRAINED):  # of one seed, some would be the same file: sink tokens are rows like others
        run = make_run(root / "runs" / name, sink_recipe(name), tokenizer_file, config, seed)
        export(run / "weights/step-0000012.safetensors", root / "models" / name, dtype="bfloat16")
    return root / "models"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for file in sorted(HERE.glob("*.py"))[:30]:
        shutil.copy(file, folder)
    return folder


def words(captured: str) -> str:
    """Printed text without its line breaks."""
    return " ".join(captured.split())


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name in ("nll.npy", "train.bin")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


def test_no_steps_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps must be at least 1, not 0"):
        demo(out=str(tmp_path / "out"), steps=0)
    assert not (tmp_path / "out").exists()


def test_without_the_models_it_says_where_they_are(
    text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "MODELS", folder / "nowhere")
    demo(str(folder), str(text), steps=2)
    said = words(capsys.readouterr().out)
    assert "5/5 reproduction" in said
    assert "results/laptop/models, and are not part of this installation" in said
    assert "these models have had 2." in said
    assert said.count("for comparison, Xiao et al.") == 1
    assert "paper's effect: vanilla needs" not in said
    assert not (folder / "reproduction").exists()


def test_it_ends_with_the_trained_models_and_goes_on_where_it_was_stopped(
    text: Path,
    folder: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "MODELS", models)
    demo(str(folder), str(text), steps=2)
    made, said = stamps(folder), words(capsys.readouterr().out)
    results = folder / "reproduction/results"
    assert sorted(p.name for p in results.iterdir()) == sorted(TRAINED)
    one = read_json(results / "one-sink-token/results.json")
    # The held-out documents are those of the first part, in the models' own tokens.
    held_out = read_json(folder / "reproduction/data/manifest.json")["splits"]["validation"]
    assert held_out["documents"] == read_json(folder / "data/manifest.json")["splits"]["validation"]["documents"]
    assert one["tokens"]["count"] == min(held_out["tokens"], TRAINED_TOKENS) > 1000
    assert set(one["settings"]) == {"0+64", "1+63", "2+62", "4+60"}
    comparison = read_json(folder / "reproduction/comparison/comparison.json")
    told = finding(comparison["differences"])
    assert words(told) in said
    # What is said is what is in the losses.
    none, kept = (np.load(results / "vanilla" / c / "nll.npy") for c in ("0+64", "4+60"))
    assert (
        f"vanilla without its first tokens (0+64) {100 * np.expm1((none.astype(np.float64) - kept).mean()):+.2f} %"
        in words(told)
    )
    for what in ("one sink token, evicted (0+64)", "one of them evicted (1+63)", "its column left out (0+64)"):
        assert what in told
    assert "parameters, trained for 12 steps on" in said
    assert said.index("just trained, 2 steps: streaming") < said.index("trained for long: streaming")
    assert said.count("for comparison, Xiao et al.") == 1
    assert said.index("trained for long: streaming") < said.index("for comparison, Xiao et al.")

    (results / "two-sink-tokens/4+60/nll.npy").unlink()
    demo(str(folder), str(text), steps=2)
    again = stamps(folder)
    assert {p for p in again if again[p] != made[p]} == {results / "two-sink-tokens/4+60/nll.npy"}
    assert words(told) in words(capsys.readouterr().out)


def test_a_short_text_is_refused_before_anything_is_trained(tmp_path: Path, models: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words " * 50)
    (tmp_path / "shorter.txt").write_text("fewer")
    with pytest.raises(UserError, match="tokens to evaluate on; give more text"):
        demo(str(tmp_path / "out"), str(tmp_path / "*.txt"), steps=2)
    assert not (tmp_path / "out/runs").exists()
    with pytest.raises(UserError, match="tokens to evaluate on; give more text"):
        reproduce(models, [str(tmp_path / "*.txt")], tmp_path / "out2")


def test_files_that_are_no_text_are_said_of_a_text_of_ones_own_alone_and_once(
    text: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PreparedError(Exception):
        """What comes behind the text does not matter here."""

    def stop(*_: object) -> None:
        raise PreparedError

    source = tmp_path / "package"
    shutil.copytree(text, source)
    (source / "compiled.pyc").write_bytes(b"no text")
    monkeypatch.setattr(module, "standard_library", lambda: [str(source)])
    monkeypatch.setattr("sinkpretrain.train.train", stop)
    monkeypatch.setattr(module, "_stream_each", stop)
    for own, times in ("", 0), (str(source), 1):
        out = tmp_path / f"out{times}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with pytest.raises(PreparedError):
                demo(str(out), own)
            with pytest.raises(PreparedError):
                reproduce(models, [str(source)], out / "reproduction")
        assert sum("compiled.pyc" in str(warning.message) for warning in said) == times


def difference(mechanism: str, setting: str, low: float, high: float, against: str = "") -> dict[str, object]:
    return {
        "title": mechanism,
        "mechanism": mechanism,
        "against": against or mechanism,
        "setting": setting,
        "nats": (low + high) / 2,
        "low": low,
        "high": high,
    }


@pytest.mark.parametrize(
    ("none", "ordinary", "sink", "verdict"),
    [
        ((0.3, 0.5), (0.02, 0.04), (-0.01, 0.01), "This is the paper's effect"),
        ((0.3, 0.5), (0.02, 0.04), (0.01, 0.03), "not clearly less than one ordinary token"),
        ((0.3, 0.5), (0.02, 0.04), (0.2, 0.4), "does not clearly lose less than that"),
        ((0.3, 0.5), (-0.01, 0.01), (-0.04, -0.02), "not clearly less than one ordinary token"),
        ((-0.01, 0.02), (-0.01, 0.01), (-0.01, 0.01), "the paper's effect does not show"),
        ((-0.2, -0.1), (0.2, 0.3), (-0.01, 0.01), "the paper's effect does not show"),
    ],
)
def test_the_numbers_choose_the_words(
    none: tuple[float, float], ordinary: tuple[float, float], sink: tuple[float, float], verdict: str
) -> None:
    told = finding(
        [
            difference("vanilla", "0+64", *none),
            difference("vanilla", "1+63", *ordinary),
            difference("sink_tokens(n=1)", "1+63", *sink),
            difference("sink_tokens(n=1)", "1+63", 7.0, 8.0, against="vanilla"),
        ]
    )
    assert verdict in told
    assert ("This is the paper's effect" in told) == (verdict == "This is the paper's effect")
    assert f"one sink token, kept alone (1+63) {100 * np.expm1(sum(sink) / 2):+.2f} %" in words(told)


@pytest.mark.skipif(not MODELS.is_dir(), reason="the trained models are not in this checkout")
@pytest.mark.parametrize("name", TRAINED)
def test_the_models_that_come_with_the_repository(name: str) -> None:
    loaded = load_model(MODELS / name)
    assert loaded.trained.sink_config == sink_recipe(name)
    assert loaded.trained.config.context == 512
    assert sum(f.stat().st_size for f in loaded.files) < 12_000_000
    card = (MODELS / name / "README.md").read_text(encoding="utf-8")
    for fact in ("seeds | weights", "train_sha256", "```yaml", "AutoModelForCausalLM.from_pretrained"):
        assert fact in card
