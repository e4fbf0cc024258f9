"""Comparisons of results whose losses stayed on another machine: what results.json has is shown, the rest said."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_factory import SIZE, make_run
from test_compare import TINY, edit, make_result, seeds

from sinkpretrain.compare import Comparison, compare, pictures
from sinkpretrain.config import SinkConfig
from sinkpretrain.evaluate import stream

MISSING = "are missing, so curves and differences that need them are left out"


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models over one text, with the settings that a page tells apart."""
    folder = tmp_path_factory.mktemp("streamed")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(1, SIZE, 900).astype(np.int32))
    for mechanism in ("vanilla", "zero_sink"):
        run = make_run(folder / "runs" / mechanism, SinkConfig(mechanism), None)
        where: dict[str, Any] = {"tokens": str(folder / "tokens.npy"), "device": "cpu", "progress": False}
        out = folder / "results" / mechanism
        stream(str(run), cache="0+16,1+15,4+12", strategy="streaming,dense", out=str(out), replace_initial="7", **where)
    return folder / "results"


def without(results: Path, to: Path, gone: str) -> Path:
    """A copy of results without the files of losses that a pattern names."""
    shutil.copytree(results, to)
    files = list(to.glob(gone))
    assert files
    for file in files:
        file.unlink()
        file.parent.rmdir()  # as where nobody made the folder
    return to


def drawn(c: Comparison) -> dict[str, list[str]]:
    """By picture: the titles of its panels, and the names in its legend."""
    return {
        p.name: [a.get_title() for a in p.figure.axes if a.get_visible()]
        + [text.get_text() for legend in p.figure.legends for text in legend.get_texts()]
        for p in pictures(c.sections)
    }


def text_of(c: Comparison) -> str:
    return (c.out / "comparison.md").read_text()


def test_results_without_any_losses_show_what_results_json_has(streamed: Path, tmp_path: Path) -> None:
    whole = compare([streamed], tmp_path / "whole")
    assert MISSING not in text_of(whole)
    copied = without(streamed, tmp_path / "copied", "*/*/nll.npy")
    with pytest.warns(UserWarning, match=MISSING):
        c = compare([copied], tmp_path / "out")
    for file in ("table3.csv", "streaming_speed.csv"):
        assert (c.out / file).read_text() == (whole.out / file).read_text()
    # To the last digit: a model's own differences are the ones that stream found with the same losses.
    own = [d for d in whole.records["differences"] if d["title"] == d["against"]]
    assert {(d["mechanism"], d["setting"]) for d in own} >= {("zero_sink", "0+16-nocolumn"), ("vanilla", "0+16")}
    assert c.records["differences"] == own
    assert len(own) < len(whole.records["differences"])
    assert drawn(c) == {}
    assert not list(c.out.glob("*.png"))
    said = (
        f"The losses of all models {MISSING} (but not differences within one model that its results.json has); they "
        f"belong beside results.json: {copied}/vanilla/0+16/nll.npy and so on."
    )
    for page in ("comparison.md", "index.html"):
        assert said in (c.out / page).read_text()
    assert "## Against vanilla" not in text_of(c)


def test_one_model_without_losses_is_in_the_tables_only(streamed: Path, tmp_path: Path) -> None:
    whole = compare([streamed], tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"losses of zero_sink \(all settings"):
        c = compare([without(streamed, tmp_path / "copied", "zero_sink/*/nll.npy")], tmp_path / "out")
    pairs = [d for d in whole.records["differences"] if d["title"] == d["against"]]
    assert c.records["differences"] == pairs
    assert drawn(c) == {"perplexity": [name for name in drawn(whole)["perplexity"] if "zero_sink" not in name]}


def test_a_single_setting_without_losses_takes_what_needs_it(streamed: Path, tmp_path: Path) -> None:
    whole = compare([streamed], tmp_path / "whole")
    # Vanilla's reference: of the other model, only its own differences remain.
    copied = without(streamed, tmp_path / "reference", "vanilla/4+12/nll.npy")
    with pytest.warns(UserWarning, match=rf"losses of vanilla \(4\+12; {copied}/vanilla\)"):
        c = compare([copied], tmp_path / "out")
    assert c.records["differences"] == [d for d in whole.records["differences"] if d["title"] == d["against"]]
    assert drawn(c) == {"perplexity": drawn(whole)["perplexity"]}  # zero_sink still has a curve in that panel
    # Of any other one, the rows of that alone go; a panel goes where nobody has a curve.
    copied = without(streamed, tmp_path / "other", "*/1+15/nll.npy")
    with pytest.warns(UserWarning, match=r"vanilla \(1\+15; .*zero_sink \(1\+15; "):
        c = compare([copied], tmp_path / "out")
    assert c.records["differences"] == [
        d for d in whole.records["differences"] if d["title"] == d["against"] or d["setting"] != "1+15"
    ]
    assert drawn(c) == {
        name: [word for word in words if word != "cache 1+15"] for name, words in drawn(whole).items()
    }  # both pictures


@pytest.mark.parametrize(("gone", "panels"), [("4+12", 1), ("0+16", 2), ("*[!2]", 1)])
def test_of_one_model_the_settings_with_losses_are_drawn(
    streamed: Path, tmp_path: Path, gone: str, panels: int
) -> None:
    """Beside the perplexity stands its change, where what it would be a change against has its losses."""
    whole = compare([streamed / "vanilla"], tmp_path / "whole")
    copied = without(streamed / "vanilla", tmp_path / "copied", f"{gone}/nll.npy")
    with pytest.warns(UserWarning, match=MISSING):
        c = compare([copied], tmp_path / "out")
    [picture] = pictures(c.sections)
    assert len(picture.figure.axes) == panels
    assert c.records["differences"] == whole.records["differences"]


def test_means_over_seeds_need_the_losses_of_all(tmp_path: Path) -> None:
    """Of three pairs of seeds one model's losses are missing: two of three would stand beside the mean of three."""
    made = seeds(tmp_path)
    (made[3] / "4+60" / "nll.npy").unlink()
    with pytest.warns(UserWarning, match=rf"losses of zero_sink: 3, step 10 \(all settings; {made[3]}\)"):
        c = compare(made, tmp_path / "out")
    assert c.records["differences"] == []
    assert drawn(c) == {"perplexity": ["cache 4+60", "vanilla (n=3)"]}
    assert "| zero_sink (n=3) |" in text_of(c)


def test_what_stream_set_against_another_setting_is_not_taken(tmp_path: Path) -> None:
    """A model streamed into two folders: each knows its own settings, and the page's reference is the other's."""
    known = {"setting": "0+64", "against": "1+63", "nats": 0.1, "interval": [0.0, 0.2]}
    a = edit(make_result(tmp_path / "a", "vanilla", {"0+64": 20.0, "1+63": 19.0}, TINY), differences=[known])
    b = make_result(tmp_path / "b", "vanilla", {"4+60": 18.0, "0+64": 20.0}, TINY)
    edit(b, differences=[known | {"against": "4+60"}])  # of its own 0+64, which is shown from the other folder
    for folder in (a, b):
        shutil.rmtree(folder / "0+64")
    with pytest.warns(UserWarning, match=rf"vanilla \(0\+64; {a}\)"):
        c = compare([a, b], tmp_path / "out")
    assert [(d["setting"], d["reference"]) for d in c.records["differences"]] == [("1+63", "4+60")]
    with pytest.warns(UserWarning, match=MISSING):
        [d] = compare([a], tmp_path / "one").records["differences"]
    assert [d[k] for k in ("setting", "reference", "n", "nats", "low", "high")] == ["0+64", "1+63", 1, 0.1, 0.0, 0.2]
