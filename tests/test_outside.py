"""A mechanism from outside of the package, the one of docs/mechanisms.md, in everything that a run goes through."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_measures
import test_sinks
import test_streaming
import torch
import yaml
from conftest import TINY, refusal
from data_factory import make_data
from run_factory import make_run
from test_train import config, same, stop_after
from transformers import AutoModelForCausalLM

from sinkpretrain import outside
from sinkpretrain.cli import main
from sinkpretrain.comparison.read import find
from sinkpretrain.config import RunConfig, SinkConfig, save_yaml
from sinkpretrain.data import open_data
from sinkpretrain.errors import UserError
from sinkpretrain.experiment import load_experiment
from sinkpretrain.export import Exported, export
from sinkpretrain.hooks import check_hooks
from sinkpretrain.load import load_model
from sinkpretrain.sinks import ZeroSink, build, mechanism_class
from sinkpretrain.submit import check
from sinkpretrain.train import facts, train
from sinkpretrain.zero_shot import zero_shot

ROOT = Path(__file__).parent.parent
EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mechanisms.md").read_text(encoding="utf-8"), re.DOTALL)[
    0
]
SINK = SinkConfig("my_sinks:LogCount", {"slope": 0.5})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with the documentation's example in it; what a test imports goes with it."""
    (tmp_path / "my_sinks.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__ or "").parent == tmp_path:
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("outside") / "data")


def run_config(data: Path, out: Path, **training: Any) -> RunConfig:
    return dataclasses.replace(config(data, out, **training), sink=SINK)


def edit(file: Path, more: str = "# edited\n") -> None:
    """The module's code is another one, for what imports it from now on."""
    file.write_text(EXAMPLE + more)
    sys.modules.pop("my_sinks")


def exported_folder(run: Path) -> Exported:
    """In ``hf`` beside the run; without a tokenizer, for that of ``make_data`` is none."""
    (run / "tokenizer.json").unlink()
    return export(run, run.parent / "hf")


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shown",
    [
        test_sinks.test_gradients_equal_an_eager_softmax,
        test_sinks.test_gradients_within_a_window,
        test_sinks.test_gradients_within_documents,
        test_sinks.test_every_parameter_of_a_mechanism_learns,
        test_sinks.test_other_weights_start_the_same_whatever_the_mechanism,
        test_measures.test_every_measure_against_loops_over_single_numbers,
        test_streaming.test_dropped_column,
    ],
)
def test_what_holds_for_the_packages_mechanisms_holds_for_it(shown: Any) -> None:
    """Gradients against the definition in fp64, measures, streams."""
    shown(SINK)


def test_it_is_the_column_that_it_says() -> None:
    """With slope 0 and the bias at 0 it is the zero sink; a slope of 1 is a key of logit 0 for every key."""
    q, seen = torch.randn(2, TINY.n_head, 5, TINY.head_dim), torch.arange(1, 6)
    flat, zero = build(SinkConfig("my_sinks:LogCount", {"slope": 0.0}), TINY), ZeroSink(TINY)
    assert torch.equal(flat.column(q, seen).logit.expand(4, 5), zero.column(q, seen).logit.expand(4, 5))
    assert torch.allclose(build(SinkConfig("my_sinks:LogCount"), TINY).column(q, seen).logit[0], seen.float().log())
    check_hooks(SINK, TINY.resolved())


def test_the_current_directory_comes_first_for_its_module_alone(here: Path) -> None:
    """What somebody else imports later is not taken from it, unless it is nowhere else."""
    (here / "colorsys.py").write_text("raise ValueError\n")
    (here / "beside.py").write_text("")
    (here / "wave.py").write_text(EXAMPLE)  # a name of the standard library
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "colorsys", raising=False)
        patch.delitem(sys.modules, "wave", raising=False)
        assert outside.hashes(SinkConfig("wave:LogCount"))["wave"] == next(iter(outside.hashes(SINK).values()))
        assert importlib.import_module("colorsys").__file__ != str(here / "colorsys.py")
        assert importlib.import_module("beside").__file__ == str(here / "beside.py")


# --- what goes with a run -------------------------------------------------------------------------------------------


def test_a_run_from_training_to_an_exported_folder(data: Path, here: Path, capsys, monkeypatch) -> None:
    """Stopped and gone on with, exactly; streamed, exported; loaded where nothing but its name is known."""
    assert train(run_config(data, here / "whole")).finished
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        assert not train(run_config(data, here / "run")).finished
    assert train(run_config(data, here / "run")).finished
    assert same(here / "whole", here / "run")

    (sha256,) = outside.hashes(SINK).values()
    assert json.loads((here / "run" / "run.json").read_text())["mechanism_sha256"] == {"my_sinks": sha256}
    mine = run_config(data, here / "run")
    assert facts(mine, open_data(mine.data), None)["code of my_sinks"] == sha256  # ranks must agree in it

    tokens = str(data)
    assert (
        main(["stream", "run", "--tokens", tokens, "--split", "validation", "--cache", "0+8,4+4", "--out", "r/mine"])
        == 0
    )
    exported = exported_folder(here / "run")
    assert exported.form == "own"
    assert (
        main(["stream", "hf", "--tokens", tokens, "--split", "validation", "--cache", "0+8,4+4", "--out", "r/hf"]) == 0
    )
    assert "warning" not in capsys.readouterr().err
    a, b = (json.loads((here / "r" / name / "results.json").read_text()) for name in ("mine", "hf"))
    assert a["model"]["mechanism"] == b["model"]["mechanism"] == "my_sinks:LogCount(slope=0.5)"
    assert a["settings"]["0+8"]["nll"] == pytest.approx(b["settings"]["0+8"]["nll"], abs=1e-5)
    for folder in (here / "run", exported.folder):
        assert [p.read_text() for p in (folder / "mechanism").iterdir()] == [EXAMPLE]
    card = (exported.folder / "README.md").read_text()
    assert "The module `my_sinks` is needed as well" in card
    assert "its class `LogCount`" in card

    script = here / "elsewhere" / "load.py"  # the folder of a script is on its path, and the current one is not
    script.parent.mkdir()
    script.write_text(
        "import torch, sinkpretrain.hf_model\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(exported.folder)!r})\n"
        "print(model(torch.arange(1, 21)[None]).logits.double().sum().item())\n"
    )
    done = in_a_process(script, here)
    assert done.returncode == 0, done.stderr
    want = load_model(here / "run").model(torch.arange(1, 21)[None]).double().sum().item()
    assert float(done.stdout) == pytest.approx(want, abs=1e-2)


def in_a_process(script: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, cwd=folder, env=environment, timeout=300
    )


def test_the_current_directory_counts_for_the_console_script_and_its_ranks(data: Path, here: Path) -> None:
    """Two processes, of which the first starts the other."""
    script = here / "bin" / "sinkpretrain"
    script.parent.mkdir()
    script.write_text("import sys\nfrom sinkpretrain.cli import main\nsys.exit(main())\n")
    save_yaml(run_config(data, here / "run", steps=2, devices=2), here / "recipe.yaml")
    done = in_a_process(script, here, "train", "--config", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert load_model(here / "run").step == 2


@pytest.fixture
def trained(data: Path, here: Path) -> Path:
    train(run_config(data, here / "run", steps=2))
    return here / "run"


def test_other_code_is_refused_unless_allowed(data: Path, here: Path, trained: Path, capsys) -> None:
    longer = run_config(data, trained, steps=4)
    before = (trained / "run.json").read_text()
    edit(here / "my_sinks.py")
    was = next((trained / "mechanism").iterdir())
    sentence = rf"changed since {trained} was trained: my_sinks \(as it was: {was}\); restore it, choose another --out"
    with pytest.raises(UserError, match=sentence):
        train(longer)
    assert (trained / "run.json").read_text() == before
    with pytest.warns(UserWarning, match="goes on with changes: my_sinks"):
        assert train(longer, allow_changes=True).finished
    assert {p.read_text() for p in (trained / "mechanism").iterdir()} == {EXAMPLE, EXAMPLE + "# edited\n"}
    edit(here / "my_sinks.py", "")
    with pytest.raises(UserError, match="restore it"):  # the run's code is the new one now
        train(run_config(data, trained, steps=5))


OTHER_PARAMETERS = """

class LogCount(LogCount):
    def __init__(self, model, slope: float = 1.0):
        super().__init__(model, slope)
        self.bias = nn.Parameter(torch.zeros(1))
"""


def test_a_process_killed_before_the_first_step_leaves_the_directory_free(
    data: Path, here: Path, trained: Path
) -> None:
    for part in trained.iterdir():
        if part.name not in ("run.json", "lock", "mechanism"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    left = trained / "mechanism" / ".my_sinks-0.py.17.tmp"
    left.write_text("half")
    edit(here / "my_sinks.py")
    assert train(run_config(data, trained, steps=2)).finished
    assert not left.exists()


def test_code_with_other_parameters_is_refused_even_if_allowed(data: Path, here: Path, trained: Path) -> None:
    before = (trained / "run.json").read_text()
    edit(here / "my_sinks.py", OTHER_PARAMETERS)
    with pytest.raises(UserError, match=r"tensors are others \(blocks\.0\.attn\.sink\.bias, for one\)"):
        train(run_config(data, trained, steps=4), allow_changes=True)
    assert (trained / "run.json").read_text() == before


def test_the_code_of_what_a_class_extends_counts(here: Path) -> None:
    (here / "narrow.py").write_text("import my_sinks\nclass Narrow(my_sinks.LogCount): pass\n")
    assert set(outside.hashes(SinkConfig("narrow:Narrow"))) == {"my_sinks", "narrow"}
    (here / "zero.py").write_text("from sinkpretrain.sinks import ZeroSink\nclass Zero(ZeroSink): pass\n")
    assert set(outside.hashes(SinkConfig("zero:Zero"))) == {"zero"}
    assert outside.hashes(SinkConfig("zero_sink")) == {}


def test_what_runs_is_hashed_and_not_what_was_written_since(here: Path) -> None:
    before = outside.hashes(SINK)
    (here / "my_sinks.py").write_text(EXAMPLE + "# edited\n")
    assert outside.hashes(SINK) == before
    del sys.modules["my_sinks"]
    assert outside.hashes(SINK) != before


def test_streams_of_other_code_are_warned_of_and_kept_apart(data: Path, here: Path, trained: Path, capsys) -> None:
    exported_folder(trained)
    words = ["stream", "run", "--tokens", str(data), "--split", "validation", "--cache", "0+8", "--out"]
    assert main([*words, "r/a"]) == 0
    edit(here / "my_sinks.py")
    capsys.readouterr()
    assert main([*words, "r/b"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warned) == 1
    assert (
        "the code of the sink mechanism has changed since run was trained: my_sinks (as it was: run/mech" in warned[0]
    )
    assert main([*words, "r/a"]) == 2
    assert "r/a holds results of another model" in capsys.readouterr().err
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.warns(UserWarning, match=f"changed since {here / 'hf'} was trained: my_sinks"):
            load(here / "hf")
    assert len(find([here / "r"]).results) == 2


def test_compare_needs_no_module_and_shows_it_last(data: Path, here: Path, trained: Path) -> None:
    train(config(data, here / "another", steps=2))
    edit(here / "my_sinks.py", "raise ValueError\n")
    assert [run.mechanism for run in find([trained, here / "another"]).runs] == [
        "sink_tokens(n=1)",
        "my_sinks:LogCount(slope=0.5)",
    ]


# --- other commands -------------------------------------------------------------------------------------------------


def test_list_shows_one(capsys) -> None:
    assert main(["list", "--mechanism", "my_sinks:LogCount", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["mechanism"], row["parameters"], row["export"]) == ("my_sinks:LogCount", 144, "own")


def test_list_says_what_is_wrong_with_one(here: Path, capsys) -> None:
    hook = "    def values(self, x, v): return v * x.shape[1]"
    (here / "wrong.py").write_text(
        f"from sinkpretrain.mechanism import Mechanism\nclass Mine(Mechanism):\n{SAID}{hook}\n"
    )
    error = refusal(["list", "--mechanism", "wrong:Mine"], capsys)
    assert "the hook values of said makes something else of a token" in error


def test_an_experiment_looks_for_the_module_first(data: Path, here: Path) -> None:
    (here / "mine.yaml").write_text('sink: {mechanism: "my_sinks:LogCount"}\n')
    experiment = {"out": "e", "recipe": "demo", "variants": ["mine.yaml"], "settings": {"data.path": str(data)}}
    (here / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    check(load_experiment(here / "experiment.yaml"))
    edit(here / "my_sinks.py", "import nothing_of_the_kind\n")
    with pytest.raises(UserError, match=r"^mine: cannot import my_sinks, .*No module named 'nothing_of_the_kind'"):
        check(load_experiment(here / "experiment.yaml"))
    assert not (here / "e").exists()


# --- refusals -------------------------------------------------------------------------------------------------------

SAID = "    name = summary = source = 'said'\n"
WRONG = {
    "no module": ("nowhere:Mine", "", r"there is no module nowhere, .*; put nowhere\.py into the current directory"),
    "no submodule": ("wrong.sub:Mine", "", r"there is no module wrong\.sub, .*; put wrong/sub\.py into"),
    "a file": (
        "wrong.py:Mine",
        "",
        r"is not of the form module:Class; my_sinks:Mine is the class Mine in my_sinks\.py",
    ),
    "a path": ("./wrong:Mine", "", "is not of the form module:Class"),
    "no name of a class": ("wrong:", "", "is not of the form module:Class"),
    "a dot": (
        "wrong.Mine",
        "",
        "unknown sink mechanism 'wrong.Mine'; one of your own is named module:Class, the others:",
    ),
    "no class": (
        "wrong:Mine",
        "",
        r"the module wrong \(.*/wrong\.py\) has no class Mine; it has no class of a mechanism",
    ),
    "misspelt": ("wrong:mine", "class Mine(Mechanism): pass", "has no class mine; did you mean Mine"),
    "no mechanism": ("wrong:Mine", "class Mine: pass", r"wrong:Mine \(.*\) is no subclass of sinkpretrain\.mechanism"),
    "no class at all": ("wrong:Mine", "def Mine(): pass", "is no subclass of"),
    "fails": (
        "wrong:Mine",
        "1 / 0",
        r"cannot import wrong, .*\(ZeroDivisionError: division by zero, .*wrong\.py line 2\)",
    ),
    "no Python": ("wrong:Mine", "def f(:", r"cannot import wrong, .* \(SyntaxError: .*line 2\)\)"),
    "a script": ("wrong:Mine", "raise SystemExit('usage')", r"cannot import wrong, .* \(SystemExit: usage, "),
    "no name": (
        "wrong:Mine",
        "class Mine(Mechanism): pass",
        "wrong:Mine cannot be used: Mine has no name; give the class",
    ),
    "no summary": ("wrong:Mine", "class Mine(Mechanism): name = 'x'", "Mine has no summary"),
    "no source": ("wrong:Mine", "class Mine(Mechanism): name = summary = 'x'", "Mine has no source"),
    "an option without default": (
        "wrong:Mine",
        f"class Mine(Mechanism):\n{SAID}    def __init__(self, model, scale): pass",
        "the option scale of Mine needs a default",
    ),
    "no place for the model": (
        "wrong:Mine",
        f"class Mine(Mechanism):\n{SAID}    def __init__(self): pass",
        "must take the model's configuration first",
    ),
    "cannot be made": (
        "wrong:Mine",
        f"class Mine(Mechanism):\n{SAID}    def __init__(self, model):\n        self.scale = scale",
        r"wrong:Mine cannot be made \(NameError: name 'scale' is not defined, .*wrong\.py line 5\)",
    ),
    "two normalisations": (
        "wrong:Mine",
        f"class Mine(Mechanism):\n{SAID}    def column(self, q, seen): pass\n    def weigh(self, a, visible): pass",
        "fills both column and weigh",
    ),
    "no file": (
        "wrong:Mine",
        f"class Mine(Mechanism):\n{SAID}    __module__ = 'made.up'",
        r"the code of the sink mechanism made\.up:Mine cannot be read",
    ),
    "a hook": (
        "wrong:Mine",
        f"class Mine(Mechanism):\n{SAID}    def values(self, x, v): return v * x.shape[1]",
        "the hook values of said makes something else of a token",
    ),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_what_cannot_be_used_is_refused_before_anything_is_written(case: str, data: Path, here: Path) -> None:
    name, code, sentence = WRONG[case]
    (here / "wrong.py").write_text(f"from sinkpretrain.mechanism import Mechanism\n{code}\n")
    with pytest.raises(UserError, match=sentence):
        train(dataclasses.replace(config(data, here / "run"), sink=SinkConfig(name)))
    assert not (here / "run").exists()


def test_a_model_without_its_module_is_named_with_it(
    here: Path, trained: Path, tmp_path_factory, monkeypatch, capsys
) -> None:
    exported_folder(trained)
    del sys.modules["my_sinks"]
    monkeypatch.chdir(tmp_path_factory.mktemp("another machine"))
    capsys.readouterr()
    for path in (trained, here / "hf"):
        error = refusal(["stream", str(path), "--tokens", "t.npy", "--cache", "0+8", "--out", "r"], capsys)
        assert re.search(rf"{path}.*: there is no module my_sinks, .*; put my_sinks\.py into the current dir", error)
    with pytest.raises(UserError, match="there is no module my_sinks"):
        AutoModelForCausalLM.from_pretrained(here / "hf")


def test_a_seeded_folder_is_not_taken_for_a_stock_one(
    here: Path, tokenizer_file: Path, tmp_path_factory, monkeypatch
) -> None:
    """transformers alone would compute another model, and zero-shot would not say so."""
    (here / "seeded.py").write_text("from sinkpretrain.sinks import KeyBias\nclass Mine(KeyBias): pass\n")
    run = make_run(here / "run", SinkConfig("seeded:Mine"), tokenizer_file)
    assert export(run, here / "hf").form == "seeded"
    model = load_model(run).trained
    ids = torch.arange(1, 21)[None]
    assert torch.allclose(load_model(here / "hf").model(ids), model(ids), atol=1e-5)
    assert "For sinkpretrain's own commands, **the module `seeded` is needed" in (here / "hf" / "README.md").read_text()
    del sys.modules["seeded"]
    monkeypatch.chdir(tmp_path_factory.mktemp("another machine"))
    for look in (load_model, lambda folder: zero_shot(folder, "arc_easy", out="o", local="none")):
        with pytest.raises(UserError, match=f"^{here / 'hf'}: there is no module seeded"):
            look(str(here / "hf"))


def test_no_file_of_a_loaded_folder_is_imported(here: Path, trained: Path, tmp_path_factory, monkeypatch) -> None:
    del sys.modules["my_sinks"]
    (here / "my_sinks.py").rename(trained / "my_sinks.py")
    shutil.copy(trained / "my_sinks.py", trained / "mechanism" / "my_sinks.py")
    with pytest.raises(UserError, match="there is no module my_sinks"):
        load_model(trained)


def test_options_are_checked_as_those_of_the_package() -> None:
    for options, sentence in (({"slop": 1.0}, "unknown option 'slop'"), ({"slope": True}, "must be of type float")):
        with pytest.raises(UserError, match=sentence):
            mechanism_class(SinkConfig("my_sinks:LogCount", options))
