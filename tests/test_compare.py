"""The comparison: exact tables, the paper only where it belongs, and what cannot be compared."""

from __future__ import annotations

import io
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from sinkpretrain import figures, metrics
from sinkpretrain.compare import compare, log_to_wandb, print_table
from sinkpretrain.comparison import numbers, sections
from sinkpretrain.comparison.blocks import Picture, number
from sinkpretrain.comparison.read import About, Found, Run
from sinkpretrain.config import ModelConfig, RunConfig, SinkConfig, TrainingConfig
from sinkpretrain.errors import UserError
from sinkpretrain.figures import loss_figure, running_change, running_perplexity
from sinkpretrain.inspect_figures import layers_figure

PYTHIA = {"n_layer": 12, "d_model": 768, "context": 2048}
TINY = {"n_layer": 4, "d_model": 128, "context": 128}


def entry_of(setting: str) -> dict[str, Any]:
    """What results.json says of a setting of this name."""
    cache, *changes = setting.split("-")
    start, recent = map(int, cache.split("+")) if "+" in cache else (None, None)
    return {
        "strategy": cache if start is None else "streaming",
        "start": start,
        "recent": recent,
        "window": None,
        "column": "dropped" if "nocolumn" in changes else None,
        "initial": int(changes[-1]) if "initial" in changes else None,
        "positions": "absolute" if "absolute" in changes else "in-cache",
        "documents": 1 if "documents" in changes else None,
    }


def make_result(
    folder: Path,
    mechanism: str,
    ppl: dict[str, float],
    shape: dict[str, int] = PYTHIA,
    text: str = "t",
    name: str = "",
    seed: int | None = None,
) -> Path:
    """A result folder whose losses have exactly these perplexities, with noise that all settings share."""
    noise = np.random.default_rng(0).normal(0, 0.5, 8191)
    noise -= noise.mean()
    settings: dict[str, Any] = {}
    for setting, value in ppl.items():
        (folder / setting).mkdir(parents=True)
        np.save(folder / setting / "nll.npy", (np.log(value) + noise).astype(np.float32))
        found = {"ppl": value, "interval": [value * 0.99, value * 1.01], "file": f"{setting}/nll.npy"}
        settings[setting] = entry_of(setting) | found
    data = {
        "format": 1,
        "model": {
            "path": "p",
            "name": name or folder.name,
            "sha256": f"{mechanism}{name}",
            "step": 10,
            "mechanism": mechanism,
            "shape": shape,
            "seeds": None if seed is None else {"training": seed, "data": 0},
        },
        "tokens": {"path": "x", "sha256": f"{text}-hash-0123456789", "count": 8192},
        "settings": settings,
        "convention": "cache x+y",
        "positions": "in-cache",
        "dtype": "float32",
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "created": "2026-01-01T00:00:00+00:00",
    }
    (folder / "results.json").write_text(json.dumps(data))
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    """The folder with other values in its results file; nested mappings are updated, not replaced."""
    data = json.loads((folder / "results.json").read_text())

    def update(old: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, dict):
                update(old[key], value)
            else:
                old[key] = value

    update(data, changes)
    (folder / "results.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def table3(tmp_path: Path) -> list[Path]:
    return [
        make_result(tmp_path / "a", "vanilla", {"0+1024": 28.5, "4+1020": 18.25}),
        make_result(
            tmp_path / "b", "zero_sink", {"0+1024": 25000.0, "0+1024-nocolumn": 31000.0, "1+1023": 20.0, "4+1020": 18.0}
        ),
        make_result(tmp_path / "c", "sink_tokens(n=1)", {"0+1024": 1200.0, "1+1023": 18.1, "4+1020": 18.2}),
    ]


def test_table_with_the_papers_numbers_beside_ours(table3: list[Path], tmp_path: Path) -> None:
    compare(table3, tmp_path / "out")
    lines = (tmp_path / "out" / "table3.md").read_text().splitlines()
    assert lines[2:7] == [
        "| mechanism | 0+1024 | 0+1024 without column | 1+1023 | 4+1020 |",
        "|---|---|---|---|---|",
        "| vanilla | 28.50 (27.87) |  |  | 18.25 (18.05) |",
        "| sink_tokens(n=1) | 1,200 (1,235) |  | 18.10 (18.01) | 18.20 (18.02) |",
        "| zero_sink | 25,000 (29,214) | 31,000 (29,214) | 20.00 (19.90) | 18.00 (18.01) |",
    ]
    assert "sha256 t-hash-01234" in "\n".join(lines)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "\n".join(lines[2:7]) in text
    assert "| vanilla | 0+1024 | 4+1020 | +0.4457 | +56.16 % | +56.16 to +56.16 % |" in text  # 28.5 / 18.25
    rows = (tmp_path / "out" / "table3.csv").read_text().splitlines()
    assert rows[0] == "mechanism,name,step,setting,perplexity,low,high,paper"
    assert "vanilla,a,10,4+1020,18.25,18.0675,18.4325,18.05" in rows
    whole = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert whole["results"][0]["model"]["sha256"] == "vanilla"
    assert whole["provenance"][0]["model"] == "vanilla"
    assert "| stream | a | vanilla | t-hash-01234 | cpu | torch 2.13.0 | abc | 2026-01-01T00:00:00+00:00 |" in text


def test_the_paper_stands_below_where_the_setting_is_not_its(tmp_path: Path) -> None:
    result = make_result(tmp_path / "a", "vanilla", {"0+64": 28.5, "4+60": 18.25}, shape=TINY)
    compare([result], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| vanilla | 28.50 | 18.25 |" in text
    assert "## The paper's table" in text
    assert "29,214" in text
    compare([result], tmp_path / "bare", paper=False)
    assert "29,214" not in (tmp_path / "bare" / "comparison.md").read_text()


def test_the_papers_cache_on_another_model_is_not_the_papers_setting(tmp_path: Path) -> None:
    compare([make_result(tmp_path / "a", "vanilla", {"4+1020": 20.0}, shape=TINY)], tmp_path / "out")
    assert "| vanilla | 20.00 |" in (tmp_path / "out" / "table3.md").read_text()


def test_seeds_become_a_mean_and_a_t_interval(tmp_path: Path) -> None:
    for seed, value in enumerate((18.0, 19.0, 20.0)):
        make_result(tmp_path / "seeds" / str(seed), "vanilla", {"4+60": value}, shape=TINY, name=f"s{seed}")
    compare([tmp_path / "seeds"], tmp_path / "out")
    text = (tmp_path / "out" / "table3.md").read_text()
    assert "| vanilla (n=3) | 19.00 ± 2.48 |" in text  # 4.303 * 1 / sqrt(3)
    assert "± half of its 95 % t-interval over seeds" in text
    assert len((tmp_path / "out" / "table3.csv").read_text().splitlines()) == 4


def seeds(tmp_path: Path, known: tuple[int | None, ...] = (1, 2, 3)) -> list[Path]:
    """Three seeds of vanilla and of the zero sink, the latter 0.01, 0.02 and 0.03 nats better in that order."""
    made = []
    for seed, (level, gain) in zip(known, ((3.0, 0.01), (3.2, 0.02), (3.1, 0.03)), strict=True):
        for mechanism, nats in (("vanilla", level), ("zero_sink", level - gain)):
            folder = tmp_path / mechanism / str(len(made))
            made.append(make_result(folder, mechanism, {"4+60": np.exp(nats)}, TINY, name=f"{len(made)}", seed=seed))
    return made


def test_mechanisms_are_paired_by_seed(tmp_path: Path) -> None:
    """The levels of the seeds vary by 0.1, their differences by 0.01: pairing must take the former out."""
    [d] = compare(seeds(tmp_path), tmp_path / "out").records["differences"]
    assert (d["title"], d["against"], d["n"]) == ("zero_sink", "vanilla", 3)
    assert d["nats"] == pytest.approx(-0.02, abs=1e-6)
    half = 4.303 * 0.01 / np.sqrt(3)
    assert (d["seed_low"], d["seed_high"]) == (
        pytest.approx(-0.02 - half, abs=1e-6),
        pytest.approx(-0.02 + half, abs=1e-6),
    )
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| zero_sink (n=3) | 4+60 | vanilla 4+60 | -0.0200 | -1.98 % | -1.98 to -1.98 % | -4.39 to +0.49 % |" in text


def test_a_seed_without_the_other_cache_has_no_say_in_their_difference(tmp_path: Path) -> None:
    """Of three seeds one was streamed with 4+60 alone, whose level is another."""
    caches = ({"0+64": 22.0, "4+60": 20.0}, {"0+64": 33.0, "4+60": 30.0}, {"4+60": 90.0})
    made = [make_result(tmp_path / str(i), "vanilla", c, TINY, name=str(i), seed=i) for i, c in enumerate(caches)]
    [d] = compare(made, tmp_path / "out").records["differences"]
    assert (d["setting"], d["reference"], d["n"]) == ("0+64", "4+60", 2)
    assert d["nats"] == pytest.approx(np.log(1.1), abs=1e-6)
    # And none where no seed has both.
    apart = [
        make_result(tmp_path / f"apart-{seed}", "vanilla", cache, TINY, name=str(seed), seed=seed)
        for seed, cache in enumerate(({"0+64": 22.0}, {"4+60": 20.0}))
    ]
    assert compare(apart, tmp_path / "none").records["differences"] == []


@pytest.mark.parametrize("fewer", ["vanilla", "zero_sink"])
def test_a_seed_that_one_mechanism_lacks_has_no_say_in_their_difference(
    fewer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three pairs of seeds one half is missing, whose level is another: neither table nor figure shows that."""
    drawn: dict[str, float] = {}

    def change_figure(models: Any, settings: list[str], bases: dict[str, Any]) -> Any:
        drawn.update({name: float((losses["4+60"] - bases["4+60"]).mean()) for name, losses in models})
        return draw(models, settings, bases)

    draw = figures.change_figure
    monkeypatch.setattr(figures, "change_figure", change_figure)
    made = [f for f in seeds(tmp_path) if (f.parent.name, f.name) not in ((fewer, "4"), (fewer, "5"))]
    assert len(made) == 5
    [d] = compare(made, tmp_path / "out").records["differences"]
    assert d["n"] == 2
    assert d["nats"] == pytest.approx(-0.015, abs=1e-6)
    assert d["seed_low"] == pytest.approx(-0.015 - 12.706 * 0.005, abs=1e-6)
    both = {"vanilla": 0.0, "zero_sink": -0.015}
    title = {m: f"{m} (n={2 if m == fewer else 3})" for m in both}
    assert drawn == {title[m]: pytest.approx(nats, abs=1e-6) for m, nats in both.items()}
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| zero_sink (n=2) | 4+60 | vanilla 4+60 | -0.0150 |" in text
    assert "Of two mechanisms with seeds in common, those alone are averaged (n)." in text


def test_seeds_apart_are_not_paired(tmp_path: Path) -> None:
    made = [
        make_result(tmp_path / mechanism / str(seed), mechanism, {"4+60": ppl}, TINY, name=str(seed), seed=seed)
        for mechanism, seed, ppl in (("vanilla", 1, 20.0), ("vanilla", 2, 20.0), ("zero_sink", 3, 22.0))
    ]
    [d] = compare(made, tmp_path / "out").records["differences"]
    assert (d["n"], d["seed_low"]) == (1, None)
    assert d["nats"] == pytest.approx(np.log(1.1), abs=1e-6)


def test_a_cell_of_fewer_seeds_than_its_row_says_so(tmp_path: Path) -> None:
    for seed, caches in enumerate(({"0+64": 22.0, "4+60": 20.0}, {"0+64": 24.0, "4+60": 20.0}, {"4+60": 20.0})):
        make_result(tmp_path / "seeds" / str(seed), "vanilla", caches, TINY, name=str(seed), seed=seed)
    make_result(tmp_path / "seeds" / "one", "zero_sink", {"0+64": 22.0, "4+60": 22.0}, TINY, seed=1)
    compare([tmp_path / "seeds"], tmp_path / "out")
    assert (
        "| vanilla (n=3) | 23.00 ± 12.71 (n=2) | 20.00 ± 0.00 |\n| zero_sink | 22.00 | 22.00 |"
        in (tmp_path / "out" / "table3.md").read_text()
    )


@pytest.mark.parametrize("known", [(1, 2, None), (None, None, None)])
def test_seeds_that_are_not_known_are_not_paired(tmp_path: Path, known: tuple[int | None, ...]) -> None:
    [d] = compare(seeds(tmp_path, known), tmp_path / "out").records["differences"]
    assert d["nats"] == pytest.approx(-0.02, abs=1e-6)
    assert d["seed_low"] is None


def test_figures_show_something(table3: list[Path], tmp_path: Path) -> None:
    compare(table3, tmp_path / "out")
    image = imread(tmp_path / "out" / "perplexity.png")
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    assert image[..., :3].std() > 0.02
    assert not (tmp_path / "out" / "loss.png").exists()


def test_labels_of_many_panels_do_not_touch() -> None:
    losses = np.random.default_rng(0).normal(3, 0.1, 1_000_000).astype(np.float32)
    settings = [f"{x}+{size - x}" for size in (512, 1024) for x in (0, 1, 2, 4, 8)]
    figure = figures.change_figure(
        [("vanilla", dict.fromkeys(settings, losses))], settings, dict.fromkeys(settings, losses)
    )
    figure.draw_without_rendering()
    bottom = [axis for axis in figure.axes if axis.get_xlabel()]
    inside = []
    for axis in bottom:
        low, high = axis.get_xlim()
        for place, text in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True):
            if low <= place <= high:
                box = text.get_window_extent()
                inside.append((box.x0, box.x1))
    assert len(inside) >= 2 * len(bottom)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(inside))


def test_running_perplexity() -> None:
    x, y = running_perplexity(np.full(1000, np.log(7.0), dtype=np.float32))
    assert x[-1] == 1000
    assert y == pytest.approx(np.full(len(y), 7.0), rel=1e-5)


def test_models_with_the_same_seed_are_not_seeds_of_one_recipe(tmp_path: Path) -> None:
    """Something else differs (a learning rate, say), and a mean over them would be a mean over nothing."""
    for name, seed, value in (("a", 1, 18.0), ("b", 1, 20.0), ("c", 2, 19.0)):
        make_result(tmp_path / name, "vanilla", {"4+60": value}, shape=TINY, name=name, seed=seed)
    compare([tmp_path], tmp_path / "out")
    lines = (tmp_path / "out" / "table3.md").read_text().splitlines()
    assert lines[4:7] == [
        f"| vanilla: {n}, step 10 | {v} |" for n, v in (("a", "18.00"), ("b", "20.00"), ("c", "19.00"))
    ]


def test_running_change() -> None:
    """Twice the perplexity in the second half: +41 % over all, which is the square root of 2."""
    base = np.full(1000, 2.0)
    x, y = running_change(base + np.repeat([0.0, np.log(2)], 500), base)
    assert x[-1] == 1000
    assert y[x <= 500] == pytest.approx(0)
    assert y[-1] == pytest.approx(100 * (2**0.5 - 1))


def test_a_cache_is_set_against_one_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its curve would mostly show what a larger cache is worth."""
    caches = {"0+32": 30.0, "2+30": 25.0, "0+64": 24.0, "4+60": 20.0, "dense": 10.0}
    make_result(tmp_path / "a", "vanilla", caches, shape=TINY)
    make_result(tmp_path / "b", "zero_sink", dict.fromkeys(caches, 20.0), shape=TINY)
    seen: list[tuple[list[str], dict[str, float]]] = []

    def change_figure(models: Any, settings: list[str], bases: dict[str, Any]) -> Any:
        seen.append((settings, {s: float(np.exp(bases[s].mean(dtype=np.float64))) for s in settings}))
        return draw(models, settings, bases)

    draw = figures.change_figure
    monkeypatch.setattr(figures, "change_figure", change_figure)
    compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    [(_, bases)] = seen
    want = {"0+32": 25.0, "2+30": 25.0, "0+64": 20.0, "4+60": 20.0, "dense": 20.0}
    assert bases == pytest.approx(want, rel=1e-5)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "a change against vanilla in a cache of the same size (2+30, 4+60): below the line is better." in text


def test_many_caches_of_several_sizes_make_a_table() -> None:
    """A row for each size, a column for each number of initial positions; fewer panels are laid out as they come."""

    def places(caches: list[str]) -> dict[str, tuple[int, int]]:
        losses = {c: np.linspace(1, 2, 100) for c in caches}
        figure = figures.perplexity_figure([("m", losses)], caches)
        starts = {}
        for axis in figure.axes:
            if axis.get_visible():
                grid = axis.get_subplotspec()
                assert grid is not None
                starts[axis.get_title().removeprefix("cache ")] = (grid.rowspan.start, grid.colspan.start)
        return starts

    table = ["0+32", "1+31", "4+28", "0+64", "1+63", "2+62", "4+60"]
    assert places(table) == dict(zip(table, [(0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)], strict=True))
    few = ["0+32", "4+28", "0+64", "4+60", "dense"]
    assert places(few) == dict(zip(few, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], strict=True))
    assert places([*table, "dense"])["0+64"] == (1, 0)
    assert places([*table, "dense"])["dense"] == (2, 1)


def test_other_text_is_refused(tmp_path: Path) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"4+60": 18.0})
    b = make_result(tmp_path / "b", "zero_sink", {"4+60": 18.0}, text="u")
    with pytest.raises(UserError, match=rf"{a} and {b} were streamed over different texts"):
        compare([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_model_over_two_texts_is_refused_too(tmp_path: Path) -> None:
    """Not taken for the same result given twice."""
    a = make_result(tmp_path / "a", "vanilla", {"4+60": 18.0})
    b = make_result(tmp_path / "b", "vanilla", {"4+60": 25.0}, text="u")
    with pytest.raises(UserError, match=rf"{a} and {b} were streamed over different texts"):
        compare([a, b], tmp_path / "out")


def test_another_number_of_tokens_is_refused(tmp_path: Path) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"4+60": 18.0})
    b = edit(make_result(tmp_path / "b", "zero_sink", {"4+60": 18.0}), tokens={"count": 4096})
    with pytest.raises(UserError, match=r"8,192 and 4,096 tokens"):
        compare([a, b], tmp_path / "out")


def make_run(folder: Path, sink: str, data: dict[str, str] | None, probe: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\nsink: {{mechanism: {sink}}}\n")
    (folder / "run.json").write_text(json.dumps({"data": data} if data else {}))
    lines: list[dict[str, Any]] = [{"kind": "train", "step": i, "loss": 4.0 - i / 100} for i in range(1, 101)]
    lines += [{"kind": "probe", "step": i, **probe} for i in (0, 50, 100)] if probe else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_on_other_data_are_refused(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", "vanilla", {"train_sha256": "1" * 64, "tokenizer": "t"})
    b = make_run(tmp_path / "b", "zero_sink", {"train_sha256": "2" * 64, "tokenizer": "t"})
    c = make_run(tmp_path / "c", "zero_sink", {"train_sha256": "1" * 64, "tokenizer": "t"})
    with pytest.raises(
        UserError, match=rf"{a} and {b} were trained on different data \(train_sha256 1{{12}} and 2{{12}}\)"
    ):
        compare([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(compare([a, c], tmp_path / "out").found.runs) == 2
    with pytest.warns(UserWarning, match="does not say what data"):
        compare([a, make_run(tmp_path / "d", "zero_sink", None)], tmp_path / "out")


def test_speeds_stand_beside_vanillas_on_the_same_device(tmp_path: Path) -> None:
    made = {"vanilla": ("gpu", 1000.0), "zero_sink": ("gpu", 950.0), "sink_logit": ("cpu", 10.0)}
    for sink, (device, rate) in made.items():
        run = make_run(tmp_path / sink, sink, {"train_sha256": "1"})
        (run / "run.json").write_text(json.dumps({"data": {"train_sha256": "1"}, "attempts": [{"device": device}]}))
        line = {"kind": "train", "step": 101, "loss": 3.0, "tokens_per_second": rate, "peak_memory_bytes": 3 * 2**29}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    compare([tmp_path / sink for sink in made], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| vanilla | vanilla | 1,000 | 1.00 x | 1.50 GiB | gpu |" in text
    assert "| zero_sink | zero_sink | 950 | 0.95 x | 1.50 GiB | gpu |" in text
    assert "| sink_logit | sink_logit | 10 |  | 1.50 GiB | cpu |" in text


def test_training_losses_on_the_same_batches_are_paired(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.5, 200)

    def run(name: str, sink: str, lower: float, tokens: int = 10, settings: str = "", data: bool = True) -> Path:
        folder = make_run(tmp_path / name, sink, {"train_sha256": "1"} if data else None)
        with (folder / "config.yaml").open("a") as file:
            file.write(settings)
        lines = [
            {"kind": "train", "step": n, "tokens": n * tokens, "loss": 4.0 + float(x) - lower * (n > 160)}
            for n, x in enumerate(noise, start=1)
        ]
        lines[190]["loss"] = None if lower else lines[190]["loss"]  # a step that was skipped
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    folders = [
        run("plain", "vanilla", 0.0),
        run("plain-2", "vanilla", 0.0, settings="training: {seed: 2}\ndata: {seed: 2}\n"),
        run("zero", "zero_sink", 0.01),
        run("zero-2", "zero_sink", 0.02, settings="training: {seed: 2}\ndata: {seed: 2}\n"),
        run("logit", "sink_logit", 0.3, settings="training: {seed: 2}\n"),  # other weights, the batches of the first
        run("elsewhere", "zero_sink", 0.01, settings="data: {seed: 3}\n"),
        run("larger", "zero_sink", 0.01, tokens=20),
    ]
    out = tmp_path / "out"
    records = {r["name"]: r for r in compare(folders, out).records["training_differences"]}
    assert {name: r["against"] for name, r in records.items()} == {
        "zero": "plain", "zero-2": "plain-2", "logit": "plain",
    }  # fmt: skip
    assert [records[n]["nats"] for n in ("zero", "zero-2", "logit")] == pytest.approx([-0.01, -0.02, -0.3])
    assert all(r["low"] == pytest.approx(r["nats"]) == pytest.approx(r["high"]) for r in records.values())
    assert (records["zero"]["first_step"], records["zero"]["last_step"]) == (161, 200)
    text = (out / "comparison.md").read_text()
    assert "| zero | plain | 161 to 200 | -0.0100 | -0.0100 to -0.0100 |" in text
    assert (out / "loss_difference.png").is_file()
    with pytest.warns(UserWarning, match="does not say what data"):
        alone = compare([folders[0], run("unknown", "zero_sink", 0.01, data=False)], tmp_path / "other")
    assert not alone.records["training_differences"]


def test_runs_whose_steps_differ_in_size_compare_by_tokens(tmp_path: Path) -> None:
    def run(name: str, sizes: list[int]) -> Run:
        lines: list[dict[str, Any]] = []
        for step, tokens in enumerate(itertools.accumulate(sizes), start=1):
            lines += [{"kind": "train", "step": step, "tokens": tokens, "loss": 1.0}]
        lines += [{"kind": "probe", "step": 0}, {"kind": "probe", "step": len(sizes) - 1}]
        return Run(tmp_path / name, RunConfig(name=name), lines, {})

    even, other, grown = run("even", [10] * 4), run("other", [10] * 6), run("grown", [10, 10, 40, 40])
    assert not numbers.steps_differ([even, other])
    assert numbers.steps_differ([even, grown])
    assert not numbers.steps_differ([grown, Run(tmp_path, RunConfig(), [], {})])  # an old record without tokens
    assert metrics.tokens_at(grown.lines, [0, 2, 4]) == [0, 20, 100]
    assert "tokens" not in numbers.emergence([], [even, other])[0][1][0]
    assert [x["tokens"] for x in numbers.emergence([], [even, grown])[1][1]] == [0, 60]
    section = sections.training(Found(runs=[even, grown]))
    assert any("tokens read" in block.caption for block in section.blocks if isinstance(block, Picture))


def test_emergence_prefers_measured_checkpoints_to_logged_lines(tmp_path: Path) -> None:
    run = Run(tmp_path, RunConfig(name="r"), [{"kind": "probe", "step": 5, "sink_share": 0.5}], {})
    other = Run(tmp_path, RunConfig(name="other"), run.lines, {})
    data = {"model": {"name": "r"}, "emergence": {"from": "checkpoints", "lines": [{"step": 1}, {"step": 2}]}}
    curves = numbers.emergence([About(tmp_path, data)], [run, other])
    assert curves == [("r", [{"step": 1}, {"step": 2}]), ("other", run.lines)]
    data["emergence"]["from"] = "metrics.jsonl"  # type: ignore[index]
    assert numbers.emergence([About(tmp_path, data)], [run])[0] == ("r", run.lines)


def test_zero_shot_files_become_a_table_with_the_papers_numbers(tmp_path: Path) -> None:
    for name, mechanism, shape in (("a", "vanilla", PYTHIA), ("b", "sink_tokens(n=1)", TINY)):
        make_result(tmp_path / name, mechanism, {"4+1020": 18.0}, shape)
        model = json.loads((tmp_path / name / "results.json").read_text())["model"]
        tasks = {
            "piqa": {"acc": 0.615, "acc_norm": 0.62, "stderr": 0.0114, "acc_stderr": 0.0114, "n": 1838, "version": 1.0},
            "lambada_openai": {"perplexity": 30.0, "acc": 0.4, "stderr": 0.007, "n": 5153},
        }
        (tmp_path / name / "zero_shot.json").write_text(
            json.dumps({"what": "zero_shot", "model": model, "tasks": tasks, "harness": "0.4.9", "limit": 1000})
        )
    compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| model | piqa | lambada_openai |" in text
    assert "| vanilla | 61.5 ± 1.1 (62.2) | 40.0 ± 0.7 (39.6) |" in text
    assert "| sink_tokens(n=1) | 61.5 ± 1.1 | 40.0 ± 0.7 |" in text  # not the paper's shape
    assert "zero-shot | a" in text
    assert "lm-evaluation-harness 0.4.9. Only the first 1,000 questions of each task." in text
    assert "vanilla,piqa,0.615,0.62,0.0114,0.0114,1838,1.0" in (tmp_path / "out" / "zero_shot.csv").read_text()
    (tmp_path / "b" / "zero_shot.json").write_text("{}")
    with pytest.raises(UserError, match=r"zero_shot\.json was not written by sinkpretrain zero-shot"):
        compare([tmp_path / "b"], tmp_path / "out")


def test_missing_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither results"):
        compare([tmp_path], tmp_path / "out")
    a = make_result(tmp_path / "a", "vanilla", {"4+60": 18.0})
    (a / "4+60" / "nll.npy").write_bytes((a / "4+60" / "nll.npy").read_bytes()[:500])
    with pytest.raises(UserError, match=r"cannot read the losses .*nll\.npy"):
        compare([a], tmp_path / "out")
    b = make_result(tmp_path / "b", "vanilla", {"4+60": 18.0})
    (b / "results.json").write_text((b / "results.json").read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2"):
        compare([b], tmp_path / "out")
    (b / "results.json").write_text('{"accuracy": 0.5}')
    with pytest.raises(UserError, match="was not written by sinkpretrain stream"):
        compare([b], tmp_path / "out")


@pytest.mark.parametrize("setting", ["4+60", "dense"])
def test_losses_of_another_length_are_refused_before_anything_is_written(tmp_path: Path, setting: str) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"0+64": 20.0, "4+60": 18.0, "dense": 17.0})
    np.save(a / setting / "nll.npy", np.ones(5, np.float32))
    with pytest.raises(UserError, match=r"shape \(5,\), not the 8191"):
        compare([a], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_write_leaves_the_old_files(
    table3: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compare(table3, out)
    old = {p.name: p.read_bytes() for p in out.iterdir()}

    whole = Figure.savefig

    def half(self: Figure, path: Any, **options: Any) -> None:
        if options["format"] == "svg":  # goes into the page, in memory
            return whole(self, path, **options)
        Path(path).write_bytes(b"half a picture")
        raise RuntimeError("stopped")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RuntimeError, match="stopped"):
        compare(table3, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == old


def test_sizes_and_steps_are_rows_of_their_own(tmp_path: Path) -> None:
    """Only seeds are averaged; the paper's value stands beside the model of the paper's shape alone."""
    results = [
        make_result(tmp_path / "a", "vanilla", {"4+1020": 18.5}, name="big"),
        make_result(tmp_path / "b", "vanilla", {"4+1020": 40.0}, name="small", shape=TINY),
        edit(make_result(tmp_path / "c", "vanilla", {"4+1020": 18.1}, name="longer"), model={"step": 2000}),
    ]
    compare(results, tmp_path / "out")
    assert (tmp_path / "out" / "table3.md").read_text().splitlines()[4:8] == [
        "| vanilla: big, step 10 | 18.50 (18.05) |",
        "| vanilla: small, step 10 | 40.00 |",
        "| vanilla: longer, step 2,000 | 18.10 (18.05) |",
        "",
    ]


def test_replaced_initial_tokens_stand_against_the_texts_own(tmp_path: Path) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"4+60-initial-187": 18.2, "4+60": 18.0, "0+64": 30.0}, shape=TINY)
    c = compare([a], tmp_path / "out")
    pairs = [(d["setting"], d["reference"]) for d in c.records["differences"]]
    assert pairs == [("0+64", "4+60"), ("4+60-initial-187", "4+60")]
    assert "| mechanism | 0+64 | 4+60 | 4+60 initial token 187 |" in (tmp_path / "out" / "table3.md").read_text()


def test_a_reference_reads_documents_alike_and_leaves_nothing_out(tmp_path: Path) -> None:
    """As in stream's own table: what is lost at the beginning of every document is no matter of initial positions."""
    caches = {"0+64": 30.0, "2+62": 19.0, "4+60-nocolumn": 25.0, "4+60-absolute": 18.0}
    plain = make_result(tmp_path / "a", "zero_sink", caches, shape=TINY)
    apart = make_result(tmp_path / "b", "zero_sink", {"0+64-documents": 40.0, "1+63-documents": 35.0}, shape=TINY)
    c = compare([plain, apart], tmp_path / "out")
    assert {d["setting"]: d["reference"] for d in c.records["differences"]} == {
        "0+64": "2+62",
        "4+60-nocolumn": "2+62",
        "4+60-absolute": "2+62",
        "0+64-documents": "1+63-documents",
    }


def test_settings_of_one_model_in_two_folders_come_together(tmp_path: Path) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"0+64": 20.0, "1+63": 19.0}, shape=TINY)
    b = make_result(tmp_path / "b", "vanilla", {"1+63": 19.5, "4+60": 18.0}, shape=TINY)
    with pytest.warns(UserWarning, match=rf"{b} holds 1\+63 of the same model as {a}"):
        c = compare([a, b], tmp_path / "out")
    assert "| vanilla | 20.00 | 19.00 | 18.00 |" in (tmp_path / "out" / "table3.md").read_text()
    assert [d["setting"] for d in c.records["differences"]] == ["0+64", "1+63"]
    sources = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
    assert [(s["folder"], list(s["settings"])) for s in sources] == [(str(a), ["0+64", "1+63"]), (str(b), ["4+60"])]


def test_nothing_of_an_earlier_comparison_is_left(tmp_path: Path) -> None:
    """A figure of other models would look like one of these; what is not of a comparison stays."""
    caches = {"0+64": 20.0, "4+60": 18.0}
    a, b = (make_result(tmp_path / m, m, caches, shape=TINY) for m in ("vanilla", "zero_sink"))
    out = tmp_path / "out"
    compare([a, b], out)
    (out / "notes.md").write_text("mine")
    assert (out / "change.png").exists()
    compare([b], out)
    assert not (out / "change.png").exists()
    kept = {"notes.md", "comparison.json", *json.loads((out / "comparison.json").read_text())["files"]}
    assert {p.name for p in out.iterdir()} == kept
    for strange in ("[]", "{", '{"files": ["../vanilla/results.json", "", "."]}', '{"files": [1]}'):
        (out / "comparison.json").write_text(strange)
        compare([b], out)
    assert (a / "results.json").exists()


def test_what_is_not_finite_is_said_and_null_in_json(tmp_path: Path) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"0+64": 20.0, "1+63": 20.0, "4+60": 18.0}, shape=TINY)
    nothing = {"ppl": None, "interval": [None, None]}
    edit(a, settings={"0+64": {**nothing, "nll": None}, "1+63": {**nothing, "nll": 800.0}})
    losses = np.load(a / "0+64" / "nll.npy")
    losses[7] = np.nan
    np.save(a / "0+64" / "nll.npy", losses)
    compare([a], tmp_path / "out")
    assert "| vanilla | nan | inf | 18.00 |" in (tmp_path / "out" / "table3.md").read_text()
    text = (tmp_path / "out" / "comparison.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert [line["perplexity"] for line in json.loads(text)["table3"]] == [None, None, 18.0]


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"settings": {"4+60": {"dtype": "bfloat16"}}}])
def test_a_mixture_of_precisions_is_said(tmp_path: Path, change: dict[str, Any]) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"4+60": 18.0})
    b = edit(make_result(tmp_path / "b", "zero_sink", {"4+60": 18.0}), **change)
    compare([a, b], tmp_path / "out")
    assert "\nfloat32 and bfloat16, cpu, torch 2.13.0.\n" in (tmp_path / "out" / "table3.md").read_text()


def test_runs_become_a_table_and_a_figure(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: r\nsink: {mechanism: sink_tokens, options: {n: 2}}\n")
    (run / "run.json").write_text('{"commit": "abc"}')
    lines: list[dict[str, Any]] = [
        {"kind": "train", "step": i, "loss": 4.0 - i / 1000, "tokens_per_second": 1500.0} for i in range(1, 1001)
    ]
    lines.append({"kind": "validation", "step": 1000, "loss": 3.25})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare([run], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| r | sink_tokens(n=2) | 1234 | 1,000 | 3.010 | 3.2500 |" in text
    assert "| r | sink_tokens(n=2) | 1,500 |  |  |  |" in text
    image = imread(tmp_path / "out" / "loss.png")
    assert image.shape[:2] == (660, 1125)
    assert image[..., :3].std() > 0.02
    assert not (tmp_path / "out" / "perplexity.png").exists()
    whole = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert whole["runs"][0]["about"] == {"commit": "abc"}
    assert whole["training"][0]["validation_loss"] == 3.25


def test_curves_of_seeds_go_by_their_mechanism() -> None:
    def run(mechanism: str, seed: int, **model: int) -> Run:
        config = RunConfig(
            name=f"{mechanism}-{seed}",
            sink=SinkConfig(mechanism),
            model=ModelConfig(**model),
            training=TrainingConfig(seed=seed),
        )
        return Run(Path(config.name), config, [], {})

    def names(*runs: Run) -> list[str]:
        return [name for name, _ in numbers.runs_by_seed(list(runs))]

    pair = run("zero_sink", 1), run("zero_sink", 2)
    assert names(run("vanilla", 1), *pair) == ["vanilla-1", "zero_sink", "zero_sink"]
    assert names(*pair, run("zero_sink", 3, n_layer=2)) == ["zero_sink-1", "zero_sink-2", "zero_sink-3"]
    assert names(pair[0], pair[0]) == ["zero_sink-1", "zero_sink-1"]  # not seeds: something else differs


def test_many_curves_leave_their_figure_readable() -> None:
    """Three seeds of every mechanism: one name in the legend for each mechanism, and panels that keep their size."""
    curve = ([1, 2, 3], [3.0, 2.0, 1.0])
    measures = {"first": [[0.5, 0.2]] * 3, "entropy": [[1.0, 2.0]] * 3, "floor": {"first": 0.1}, "column": [[0.0]] * 3}
    measures |= {"value_norm": [[1.0]] * 3, "norm": [1.0] * 4, "massive": [9.0] * 4}
    few, many = ([f"mechanism_number(option={i})" for i in range(n) for _ in range(3)] for n in (2, 18))
    for draw in (
        lambda names: loss_figure([(n, curve, curve) for n in names]),
        lambda names: layers_figure([(n, measures) for n in names]),
    ):
        small, large = draw(few), draw(many)
        heights = []
        for figure, names in ((small, few), (large, many)):
            FigureCanvasAgg(figure).draw()
            legend = (figure.legends or [figure.axes[0].get_legend()])[0]
            assert [text.get_text() for text in legend.get_texts()] == list(dict.fromkeys(names))
            box = legend.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert box.y0 >= 0
            heights.append(figure.axes[0].get_window_extent().height)
        assert heights[1] > 0.8 * heights[0]
        lines = large.axes[0].lines
        looks = {(line.get_color(), line.get_linestyle()) for line in lines if line.get_linestyle() != "None"}
        assert len(looks) == 18


def test_attention_maps_of_many_models_are_those_of_the_first_few(tmp_path: Path) -> None:
    measures = {"first": [[0.5]], "entropy": [[1.0]], "value_norm": [[1.0]], "norm": [1.0], "massive": [9.0]}
    measures |= {"column": [[0.0]], "kurtosis": [3.0], "floor": {"first": 0.1}, "sink_rates": {"0.3": 0.5}}
    maps = [{"layer": 0, "head": 0, "rows": [[0.0], [0.0, 1.0]], "column": None}]
    last = {"prefix": [[0.5]], "column": [[0.0]], "length": 64}
    for number_, mechanism in enumerate(["vanilla", "vanilla", *(f"m{i}" for i in range(9))]):
        folder = make_result(tmp_path / str(number_), mechanism, {"4+60": 18.0}, TINY, name=f"x{number_}", seed=number_)
        about = {"model": json.loads((folder / "results.json").read_text())["model"], "measures": measures}
        about |= {"what": "inspect", "format": 1, "sequences": {"prefix": 0}, "last_query": last}
        (folder / "inspect.json").write_text(json.dumps(about | {"average_logits": maps}))
    compare([tmp_path], tmp_path / "out")
    assert "6 of 11 models; the others are in their own folders" in (tmp_path / "out" / "comparison.md").read_text()
    assert imread(tmp_path / "out" / "attention_maps.png").shape[0] < 150 * 16


def test_the_terminal_shows_the_same_numbers(table3: list[Path], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=120)
    print_table(compare(table3, tmp_path / "out"), console)
    assert "25,000 (29,214)" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_narrow_terminal_shows_settings_as_rows(tmp_path: Path) -> None:
    """Instead of columns of dots."""
    settings = [f"{x}+{c - x}" for c in (32, 64, 128, 256) for x in (0, 1, 2, 4)]
    a, b = (
        make_result(tmp_path / m, m, {s: 20.0 + n for n, s in enumerate(settings)}) for m in ("vanilla", "zero_sink")
    )
    console = Console(file=io.StringIO(), width=80)
    print_table(compare([a, b], tmp_path / "out"), console)
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["┃", "mechanism", "┃", "vanilla", "┃", "zero_sink", "┃"] in lines
    assert ["│", "4+252", "│", "35.00", "│", "35.00", "│"] in lines
    assert not any("…" in word for line in lines for word in line)


def test_the_same_result_twice_counts_once(tmp_path: Path) -> None:
    a = make_result(tmp_path / "a", "vanilla", {"4+60": 18.0})
    assert len(compare([a, a, tmp_path], tmp_path / "out").found.results) == 1


def test_the_same_weights_under_two_configurations_are_two_models(tmp_path: Path) -> None:
    """One hash, and positions that are scaled in one of them."""
    for name, base, value in (("a", 1e4, 18.0), ("b", 1e6, 20.0)):
        make_result(tmp_path / name, "vanilla", {"4+60": value}, shape=TINY | {"rope_base": base}, name="pythia")
    compare([tmp_path], tmp_path / "out")
    lines = (tmp_path / "out" / "table3.md").read_text().splitlines()
    assert lines[4:6] == ["| vanilla: pythia, step 10 | 18.00 |", "| vanilla: pythia, step 10 | 20.00 |"]


@pytest.mark.parametrize(
    ("value", "text"), [(18.049, "18.05"), (999.994, "999.99"), (29213.7, "29,214"), (3.2e7, "3.2e+07"), (None, "")]
)
def test_numbers_are_printed_as_the_paper_does(value: float | None, text: str) -> None:
    assert number(value) == text


def test_wandb_gets_table_and_figures(table3: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, Any] = {}

    class FakeRun:
        def __enter__(self) -> FakeRun:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def log(self, values: dict[str, Any]) -> None:
            logged.update(values)

    fake = types.SimpleNamespace(
        init=lambda **kwargs: FakeRun(), Table=lambda columns, data: data, Image=lambda path: Path(path).name
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log_to_wandb(compare(table3, tmp_path / "out"), "offline", "p")
    assert logged["perplexity"] == "perplexity.png"
    assert ["vanilla", "a", "4+1020", 18.25] in logged["table3"]


def test_one_model_has_a_line_per_setting(tmp_path: Path) -> None:
    caches = {"0+1024": 1235.0, "1+1023": 18.5, "4+1020": 18.0}
    make_result(tmp_path / "a", "vanilla", caches)
    figure = next(
        block.figure
        for section in compare([tmp_path / "a"], tmp_path / "out").sections
        for block in section.blocks
        if isinstance(block, Picture) and block.name == "perplexity"
    )
    lines = {line.get_label().partition(":")[0] for line in figure.axes[0].lines}
    assert lines >= set(caches)
    changes = [line.get_ydata()[-1] for line in figure.axes[1].lines if len(line.get_ydata()) > 2]
    assert changes == pytest.approx([100 * (1235 / 18 - 1), 100 * (18.5 / 18 - 1)], rel=1e-5)
    # A sampled setting has losses for some tokens only, and is no reason for the others' to vanish.
    path = tmp_path / "a" / "1+1023" / "nll.npy"
    nll = np.load(path)
    nll[::2] = np.nan
    np.save(path, nll)
    compare([tmp_path / "a"], tmp_path / "again")
    assert "nan" not in (tmp_path / "again" / "comparison.md").read_text()
