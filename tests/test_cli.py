"""The command line as a user meets it: help, mistakes, exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import refusal
from data_factory import make_data

from sinkpretrain.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("cli") / "data")


def tiny_flags(data: Path, out: Path) -> list[str]:
    flags = {
        "model.n_layer": 2,
        "model.d-model": 32,
        "model.n-head": 2,
        "model.context": 64,
        "data.path": data,
        "data.batch-size": 4,
        "training.steps": 2,
        "training.precision": "32-true",
        "training.accelerator": "cpu",
        "out": out,
    }
    return [f"--{k}={v}" for k, v in flags.items()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: sinkpretrain {command}" in text
    assert "_" not in "".join(w for w in text.split() if w.startswith("--"))


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("trian", "did you mean train?"),
        ("export --model runs/a b", "there is no flag --model: model is given by its place; see --help."),
        ("export runs/a", "export: --out, the folder to make, must be given; see --help."),
        ("export runs/a b --out c", "export: the folder to make is given twice, b and c; give it once."),
        ("train --modle.n-layer 3", "there is no flag --modle.n-layer; did you mean --model.n-layer?"),
        ("train --config pythia-16m", "did you mean pythia-160m?"),
        ("train --config pythia-160m --data.batch-size many", "--data.batch-size must be int, not 'many'."),
        ("train --config pythia-160m --training.precision fp8", "must be one of '32-true', 'bf16-mixed'"),
        ("train --config pythia-160m", "data.path is not set"),
        (
            "train --config zero-sink --sink.options.n 3 --data.path DATA",
            "unknown option 'n' of the mechanism zero_sink",
        ),
        ("train --config pythia-160m --data.path DATA", "was prepared with a tokenizer of 96 ids"),
        (
            "train --data.path DATA --sink.mechanism sink_tokens --sink.options.n 33 --out OUT",
            "do not fit the 32 spare",
        ),
        ("prepare --out OUT", "source"),
        ("prepare --source /nowhere.txt --train-tokenizer bpe:300 --out OUT", "/nowhere.txt matches no file"),
        ("prepare --verify", "needs the folder"),
        ("stream", "model"),
        ("stream /nowhere --tokens x.npy --out OUT", "there is no model at /nowhere"),
        (
            "stream m --tokens x.npy --out OUT --cache -1+60",
            "--cache needs a value; one that begins with a dash is given as --cache=VALUE.",
        ),
        ("stream m --tokens x.npy --out OUT --replace-initial", "stream: --replace-initial needs a value;"),
        ("compare OUT --out OUT", "OUT"),
        ("compare DATA EMPTY --out OUT", "one of the folders to compare is an empty name"),
        ("export /nowhere OUT", "there is no model at /nowhere"),
    ],
)
def test_mistakes_are_one_sentence(
    command: str, sentence: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [w.replace("DATA", str(data)).replace("OUT", str(out)).replace("EMPTY", "") for w in command.split()]
    error = refusal(words, capsys)
    assert sentence.replace("OUT", str(out)) in error
    assert "Traceback" not in error
    assert not out.exists()


OF_COMMANDS = {
    "prepare": "--source SOURCE --train-tokenizer bpe:300",
    "train": "--config demo --data.path DATA",
    "doctor": "--config demo --data.path DATA",
    "stream": "model --tokens x.npy",
    "inspect": "model --tokens x.npy",
    "zero-shot": "model",
    "compare": "DATA",
    "export": "model",
    "demo": "",
    "bench train": "",
    "bench scaling": "",
    "bench curves": "DATA",
    "bench stream": "",
    "bench decode": "",
}


@pytest.mark.parametrize(
    "empty", [["--out", ""], ["--out="], ["--out", "out", "--out="]], ids=["word", "equals", "last"]
)
@pytest.mark.parametrize("command", OF_COMMANDS)
def test_an_empty_out_is_refused_before_any_work(
    command: str,
    empty: list[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As an unset variable of the shell gives it; as a path, it would be the folder one happens to be in."""
    source = tmp_path / "source.txt"
    source.write_text("some text\n" * 50)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = OF_COMMANDS[command].replace("SOURCE", str(source)).replace("DATA", str(data)).split()
    assert "--out is empty; name where to write" in refusal([*command.split(), *flags, *empty], capsys)
    assert not list(Path().iterdir())


def test_every_command_that_writes_is_tried_without_a_place(capsys: pytest.CaptureFixture[str]) -> None:
    from sinkpretrain.commands import BENCHMARKS

    every = {*COMMANDS, *(f"bench {what}" for what in BENCHMARKS)} - {"bench"}
    for command in sorted(every):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        assert ("--out OUT" in capsys.readouterr().out) == (command in OF_COMMANDS), command


def test_a_full_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 2 GiB free.")

    monkeypatch.setattr("sinkpretrain.commands.zero_shot", full)
    assert main(["zero-shot", "model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sinkpretrain zero-shot: the GPU's memory is full (CUDA out of memory); use a smaller batch")


def test_a_full_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(arguments: list[str]) -> int:
        torch.empty(1 << 60, dtype=torch.uint8)
        return 0

    monkeypatch.setattr("sinkpretrain.commands.zero_shot", full)
    assert main(["zero-shot", "model"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sinkpretrain zero-shot: there is not enough memory (can't allocate memory: you tried to")
    assert len(said.splitlines()) == 1
    assert said.count("\n") == 1


def test_a_misspelt_key_in_a_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("model:\n  n_layr: 3\n")
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 2
    assert "unknown setting 'model.n_layr'; did you mean model.n_layer?" in capsys.readouterr().err
    (tmp_path / "r.yaml").write_text("model: [")
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 2


def test_recipes_and_flags_are_merged_in_order(data: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    (tmp_path / "late.yaml").write_text("optimizer:\n  lr: 0.001\n")
    flags = ["--config", f"two-sink-tokens,{tmp_path / 'late.yaml'}", "--optimizer.min-lr", "0", *tiny_flags(data, out)]
    assert main(["train", *flags]) == 0
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["sink"] == {"mechanism": "sink_tokens", "options": {"n": 2}}
    assert resolved["optimizer"]["lr"] == 0.001
    assert resolved["optimizer"]["min_lr"] == 0
    assert resolved["model"]["tokenizer_size"] == 96
    assert resolved["model"]["vocab_size"] == 128


def test_a_printed_configuration_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--config", "laptop,one-sink-token", "--training.steps", "7", "--allow-changes", "true"]
    for again in range(2):
        with pytest.raises(SystemExit) as ended:
            main([*flags, "--print-config"])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        if again:
            assert printed == (tmp_path / "mine.yaml").read_text()
        (tmp_path / "mine.yaml").write_text(printed)
        flags = ["train", "--config", str(tmp_path / "mine.yaml")]
    assert yaml.safe_load(printed)["training"]["steps"] == 7


def test_train_stream_compare_export(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path of the README on toy data, through the command line."""
    for sink in ("vanilla", "one-sink-token", "zero-sink"):
        run, results = tmp_path / "runs" / sink, tmp_path / "results" / sink
        assert main(["train", "--config", sink, *tiny_flags(data, run)]) == 0
        assert (
            main(["stream", str(run), "--tokens", str(data), "--cache", "0+32,1+31,4+28", "--out", str(results)]) == 0
        )
    written = json.loads((results / "results.json").read_text())
    assert set(written["settings"]) == {"0+32", "0+32-nocolumn", "1+31", "4+28"}
    assert np.load(results / "4+28" / "nll.npy").dtype == np.float32
    assert main(["compare", str(tmp_path / "results"), str(tmp_path / "runs"), "--out", str(tmp_path / "c")]) == 0
    table = (tmp_path / "c" / "table3.md").read_text()
    assert "sink_tokens(n=1)" in table
    assert {p.name for p in (tmp_path / "c").iterdir()} >= {"table3.csv", "perplexity.png", "loss.png"}
    capsys.readouterr()
    run, folder = tmp_path / "runs" / "zero-sink", tmp_path / "hf"
    (run / "tokenizer.json").unlink()  # the toy data's is none
    assert main(["export", str(run), "--out", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "stock GPT-NeoX with a seeded slot" in told
    assert f"{folder / 'README.md'} says how to load it" in told
    assert main(["export", str(run), str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_mistakes_answer_at_once() -> None:
    """A misspelt flag costs no import of torch."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "sinkpretrain", "train", "--confg", "x"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "did you mean --config?" in done.stderr
    modules = subprocess.run(
        [sys.executable, "-c", "import sys, sinkpretrain.commands; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert modules.stdout.strip() == "False"
    assert time.monotonic() - started < 20


def test_what_a_command_imports_is_not_looked_through_for_garbage(tmp_path: Path) -> None:
    """That takes longer than the imports; once they are made, the collector is there again."""
    code = (
        "import gc, sys; from sinkpretrain.cli import main\n"
        "code = main(sys.argv[1:]); print(code, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    for words in (["train", "--data.path", str(tmp_path / "nothing")], ["stream", str(tmp_path / "nothing")]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "2 True True", done.stderr


def test_list_shows_every_mechanism(capsys: pytest.CaptureFixture[str]) -> None:
    from sinkpretrain import sinks

    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in sinks.REGISTRY)
    assert main(["list", "--format", "json"]) == 0
    rows = {row["mechanism"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["key_value_bias"]["parameters"] == 18_432
    assert rows["sink_tokens"]["parameters"] == 768
    assert rows["output_gate"]["options"] == {"elementwise": False}
    assert [rows[n]["export"] for n in ("vanilla", "zero_sink", "softpick")] == ["stock", "seeded", "own"]
    assert "2309.17453" in rows["sink_tokens"]["source"]
    assert main(["list", "--config", "pythia-14m", "--format", "markdown"]) == 0
    table = capsys.readouterr().out
    assert "| `sink_tokens` |" in table
    assert "| 128 |" in table
    assert main(["list", "--config", "demo"]) == 0  # whose vocabulary is that of the data
    assert main(["list", "--config", "pythia-15m"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_exit_code_needs_no_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "sinkpretrain", "trian"], stderr=writer, check=False)
    os.close(writer)
    assert done.returncode == 2


def test_the_docs_have_the_same_table() -> None:
    from sinkpretrain.catalogue import list_mechanisms

    assert list_mechanisms(format="markdown") in (ROOT / "docs" / "mechanisms.md").read_text(encoding="utf-8")


def test_commands_in_the_docs_have_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    flags: dict[str, set[str]] = {}
    found = 0
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = file.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(r"sinkpretrain ((?:bench )?[a-z-]+)([^`\n#]*)", text):
            if command.split()[0] not in COMMANDS:
                continue
            if command not in flags:
                with pytest.raises(SystemExit):
                    main([*command.split(), "--help"])
                flags[command] = set(re.findall(r"--[\w.-]+", capsys.readouterr().out))
            used = {flag.replace("_", "-") for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*\w", rest)}
            assert used <= flags[command], f"{file.name}: sinkpretrain {command}"
            found += len(used)
    assert found > 100
