"""Training: exact resumption, processes, and everything that a run directory refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_factory import make_data
from forked import Forked, Forks

from sinkpretrain import lit, metrics
from sinkpretrain.config import (
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SinkConfig,
    TrainingConfig,
    save_yaml,
)
from sinkpretrain.data import open_data, to_batch
from sinkpretrain.errors import SettingHasNoEffect, UserError
from sinkpretrain.lit import learning_rate, parameter_groups
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.train import resolve, short_of_memory, train

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("train") / "data")


def config(data: Path, out: Path, **training: Any) -> RunConfig:
    return RunConfig(
        out=str(out),
        model=ModelConfig(n_layer=2, d_model=32, n_head=2, context=64),
        sink=SinkConfig("sink_tokens", {"n": 1}),
        data=DataConfig(path=str(data), batch_size=8, validation_samples=10),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup=0.2),
        training=TrainingConfig(
            **(
                {"steps": STEPS, "micro_batch": 3, "precision": "32-true", "accelerator": "cpu", "devices": 1}
                | training
            )
        ),
        log=LogConfig(every=4, validate_every=6, probe_every=6, checkpoint_every=6, weights_every=0, progress=False),
    )


def checkpoint(run: Path, step: int = STEPS) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"step-{step:07d}.ckpt", weights_only=True)


def same(a: Path, b: Path, step: int = STEPS) -> bool:
    """Weights, optimizer state and records equal to the last bit."""
    left, right = checkpoint(a, step), checkpoint(b, step)
    weights = all(torch.equal(v, right["state_dict"][k]) for k, v in left["state_dict"].items())
    moments = all(
        torch.equal(v, right["optimizer_states"][0]["state"][p][k])
        for p, state in left["optimizer_states"][0]["state"].items()
        for k, v in state.items()
    )
    return weights and moments and record(a) == record(b)


def record(run: Path) -> list[dict[str, Any]]:
    volatile = {"tokens_per_second", "model_flops_per_second", "peak_memory_bytes"}
    lines = [x for x in metrics.read(run) if x["kind"] != "checkpoint"]  # when files were written is not the run's
    return [{k: v for k, v in line.items() if k not in volatile} for line in lines]


def _stopper(step: int) -> Any:
    """Stands in for the agreement between processes: a request arrives after this step."""

    def agree(self: lit.PretrainModule, now: int) -> bool:
        self.stopped_by = signal.SIGTERM if now == step else 0
        return now == step

    return agree


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit.PretrainModule, "_agree_to_stop", _stopper(step))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(config(data, run)).finished
    return run


def test_resume_is_bitwise_exact(data: Path, undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    for step in (5, 6):  # between and at an interval of the log
        run = tmp_path / f"stopped-{step}"
        with monkeypatch.context() as m:
            stop_after(step, m)
            result = train(config(data, run))
        assert (result.step, result.finished) == (step, False)
        assert train(config(data, run)).finished
        assert same(run, undisturbed)


def test_who_is_asked_to_stop_saves_first(data: Path, undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    """What else was due is done by the next attempt; once, though the first of them is killed before it saved."""
    run = tmp_path / "run"
    with monkeypatch.context() as m:
        stop_after(6, m)
        train(config(data, run))
    assert checkpoint(run, 6)["samples_seen"] == 6 * 8
    assert max(x["step"] for x in record(run) if x["kind"] != "train") == 0  # there was no time
    with monkeypatch.context() as m:
        m.setattr(lit.PretrainModule, "on_train_batch_end", _fail)
        with pytest.raises(RuntimeError, match="killed"):
            train(config(data, run))
    assert [x["kind"] for x in record(run)[-2:]] == ["validation", "probe"]
    assert train(config(data, run)).finished
    assert same(run, undisturbed)


def _fail(*_: Any) -> None:
    raise RuntimeError("killed")


def test_every_step_is_recorded_once(undisturbed: Path) -> None:
    lines = record(undisturbed)
    assert [x["step"] for x in lines if x["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [x["step"] for x in lines if x["kind"] == "validation"] == [0, 6, 12]
    probe = next(x for x in lines if x["kind"] == "probe")
    assert len(probe["first_mass"]) == len(probe["last_first"]) == len(probe["last_column"]) == 2
    assert probe["last_length"] == 64


def test_the_model_learns(undisturbed: Path) -> None:
    losses = [x["loss"] for x in record(undisturbed) if x["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.3


def test_log_spaced_weights_and_kept_checkpoints(undisturbed: Path) -> None:
    assert [int(p.stem[5:]) for p in sorted((undisturbed / "weights").iterdir())] == [0, 1, 2, 4, 8, 12]
    assert [int(p.stem[5:]) for p in sorted((undisturbed / "checkpoints").glob("*.ckpt"))] == [6, 12]
    first = load_model(undisturbed / "weights" / "step-0000000.safetensors")
    fresh = GPTNeoX(first.model.config, first.model.sink_config, seed=1234)
    assert torch.equal(first.model.head.weight, fresh.head.weight)
    assert load_model(undisturbed).step == STEPS


def test_a_lost_tail_is_written_again(data: Path, undisturbed: Path, tmp_path: Path, monkeypatch) -> None:
    """A run killed after its last checkpoint: the metrics behind it are dropped and come again, once."""
    run = tmp_path / "killed"
    with monkeypatch.context() as m:
        m.setattr(lit.PretrainModule, "on_train_batch_end", _killed_after(8))
        with pytest.raises(RuntimeError, match="killed"):
            train(config(data, run))
    assert record(run)[-1]["step"] == 8
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the line that was being written
    assert train(config(data, run)).finished
    assert same(run, undisturbed)


def _killed_after(step: int) -> Any:
    original = lit.PretrainModule.on_train_batch_end

    def hook(self: lit.PretrainModule, *args: Any) -> None:
        original(self, *args)
        if self.global_step == step:
            raise RuntimeError("killed")

    return hook


def test_a_damaged_checkpoint_is_passed_over(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(undisturbed, run)
    newest = run / "checkpoints" / f"step-{STEPS:07d}.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="using the one before it"):
        assert train(config(data, run)).finished
    assert same(run, undisturbed)


def test_finished_runs_say_so_and_can_go_on(data: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    train(config(data, run, steps=6))
    assert train(config(data, run, steps=6)).finished
    assert "is finished: 6 steps" in capsys.readouterr().out
    assert train(config(data, run, steps=8)).step == 8
    assert [x["step"] for x in record(run) if x["kind"] == "train"] == list(range(1, 9))


# --- several processes --------------------------------------------------------------------------------------------


def run_command(
    config: RunConfig, folder: Path, *flags: str, stop: int = 0, code: str = ""
) -> subprocess.CompletedProcess[str]:
    """``python -m sinkpretrain train`` in a process of its own, as a user would."""
    script = write_script(config, folder, stop, code)
    root = Path(__file__).parent.parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, str(script), "train", "--config", str(folder / "recipe.yaml"), *flags],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def write_script(config: RunConfig, folder: Path, stop: int = 0, code: str = "") -> Path:
    """The command line as a program with more code in front of it, beside the recipe of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    save_yaml(config, folder / "recipe.yaml")
    code = "import sys; from sinkpretrain.cli import main\n" + code
    if stop:
        code += f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        code += "from sinkpretrain import lit; from test_train import _stopper\n"
        code += f"lit.PretrainModule._agree_to_stop = _stopper({stop})\n"
    script = folder / f"main{stop}.py"
    script.write_text(code + "sys.exit(main())\n")
    return script


def start_two(
    forks: Forks,
    config: RunConfig,
    folder: Path,
    *flags: str,
    stop: int = 0,
    code: str = "",
    port: int = 0,
    ranks: tuple[int, ...] = (0, 1),
    **environment: str,
) -> list[Forked]:
    """Two processes of one run, or one of them, started as a cluster would: neither is the other's parent."""
    script = write_script(config, folder, stop, code)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = port or probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "x"} | environment
    words = ["train", "--config", str(folder / "recipe.yaml"), *flags]
    return [
        forks.start(script, *words, output=folder / f"rank{n}.log", RANK=str(n), LOCAL_RANK=str(n), **place)
        for n in ranks
    ]


def run_two(forks: Forks, config: RunConfig, folder: Path, *flags: str, stop: int = 0) -> None:
    """Two processes of a run from their start to their end, after so many steps or all of them."""
    for process in start_two(forks, config, folder, "--training.devices", "2", *flags, stop=stop):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == (128 + signal.SIGTERM if stop else 0), said


def test_tokens_are_counted_across_a_change_of_batch_size(data: Path, tmp_path: Path) -> None:
    small = config(data, tmp_path / "run", steps=4)
    train(small)
    larger = dataclasses.replace(small, data=dataclasses.replace(small.data, batch_size=16))
    larger = dataclasses.replace(larger, training=dataclasses.replace(larger.training, steps=6))
    with pytest.warns(UserWarning, match=r"data.batch_size \(8 there, 16 here\)"):
        train(larger, allow_changes=True)
    tokens = [x["tokens"] for x in record(tmp_path / "run") if x["kind"] == "train"]
    assert tokens == [64 * samples for samples in (8, 16, 24, 32, 48, 64)]


def test_two_processes_resume_exactly_and_agree_with_one(
    forks: Forks, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Two gloo processes: bitwise equal after a restart; equal to one process up to the order of sums.

    The same samples are in each step, so the losses agree to 1e-5 and the weights to 1e-3 of an lr-sized update
    (12 steps of Adam at 3e-3; its first updates are +-lr whatever the gradient's size, so rounding shows there).
    """
    two = config(data, tmp_path / "two", devices=2)
    assert run_command(two, tmp_path / "a").returncode == 0
    halves = dataclasses.replace(two, out=str(tmp_path / "halves"))
    run_two(forks, halves, tmp_path / "b", stop=6)
    shutil.copytree(tmp_path / "halves", tmp_path / "changed")
    run_two(forks, halves, tmp_path / "b")
    assert same(tmp_path / "two", tmp_path / "halves")

    assert train(config(data, tmp_path / "changed", devices=1)).finished  # the other half by one process
    for other in ("two", "changed"):
        assert checkpoint(tmp_path / other)["samples_seen"] == checkpoint(undisturbed)["samples_seen"]
        for ours, theirs in zip(record(undisturbed), record(tmp_path / other), strict=True):
            if "loss" in ours:
                assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)


def test_a_signal_that_takes_the_job_back_into_the_queue_counts_most(forks: Forks, data: Path, tmp_path: Path) -> None:
    """SIGTERM sent right behind SIGUSR1 may come first on one of two nodes."""
    code = (
        "import os, signal; from sinkpretrain import lit; agree = lit.PretrainModule._agree_to_stop\n"
        "def asked(self, step):\n"
        "    if step == 4: os.kill(os.getpid(), (signal.SIGUSR1, signal.SIGTERM)[int(os.environ['RANK'])])\n"
        "    return agree(self, step)\n"
        "lit.PretrainModule._agree_to_stop = asked\n"
    )
    run = config(data, tmp_path / "run", devices=2)
    for process in start_two(forks, run, tmp_path, "--training.devices", "2", code=code):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 128 + signal.SIGUSR1, said


def test_interrupt_saves_and_the_same_command_goes_on(data: Path, tmp_path: Path) -> None:
    """A real SIGINT and SIGTERM to a real process: exit code 128 + n, a checkpoint, no step lost."""
    long = config(data, tmp_path / "run", steps=100_000)
    save_yaml(long, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "sinkpretrain", "train", "--config", str(tmp_path / "recipe.yaml")]
    done = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parent.parent
        )
        deadline = time.monotonic() + 120
        while not any(x["step"] > done + 3 for x in metrics.read(tmp_path / "run")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number, output
        assert "the same command goes on from there" in output
        steps = [x["step"] for x in metrics.read(tmp_path / "run") if x["kind"] == "train"]
        assert steps == list(range(1, len(steps) + 1))
        assert (tmp_path / "run" / "checkpoints" / f"step-{len(steps):07d}.ckpt").is_file()
        done = len(steps)


TOLD = ["env", "--default-signal=HUP"]
"""Starts a process that hears of the end of a terminal, also where the tests run under nohup."""
OF_ITS_INPUT = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class LongRun:
    """A run as a user starts it, whose end is waited for by its record."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.run = folder / "run"
        save_yaml(config(data, self.run, steps=100_000), folder / "recipe.yaml")
        self.words = [sys.executable, "-m", "sinkpretrain", "train", "--config", str(folder / "recipe.yaml")]
        self.words += ["--log.progress", "true"]

    def start(self, before: list[str], **options: Any) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*before, *self.words], cwd=Path(__file__).parent.parent, **options)
        deadline = time.monotonic() + 120
        while not self.steps() > 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        return process

    def steps(self) -> int:
        return max((x["step"] for x in metrics.read(self.run) if x["kind"] == "train"), default=0)

    def saved(self) -> bool:
        return (self.run / "checkpoints" / f"step-{self.steps():07d}.ckpt").is_file()


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """SIGHUP comes with it, and every line that is still printed fails."""
    long, (ours, its) = LongRun(data, tmp_path), os.openpty()
    before = [*TOLD, sys.executable, "-c", OF_ITS_INPUT]
    process = long.start(before, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert long.saved()


def test_nohup_outlives_the_terminal(data: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = LongRun(data, tmp_path).start(["nohup"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM  # the first that asked


def test_a_reader_that_the_same_signal_ends(data: Path, tmp_path: Path) -> None:
    """``train 2>&1 | tee log``, of which Ctrl-C reaches both."""
    long = LongRun(data, tmp_path)
    process = long.start(TOLD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert long.saved()


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": ModelConfig(n_layer=3, d_model=32, n_head=2, context=64)}, r"model\.n_layer \(2 there, 3 here\)"),
        ({"sink": SinkConfig("vanilla")}, r"sink\.mechanism"),
        ({"optimizer": OptimizerConfig(lr=1e-3, min_lr=3e-4, warmup=0.2)}, r"optimizer\.lr"),
        ({"name": "other"}, ""),
    ],
)
def test_another_configuration_is_refused(change: dict, names: str, data: Path, undisturbed: Path) -> None:
    new = dataclasses.replace(config(data, undisturbed), **change)
    before = (undisturbed / "config.yaml").read_text()
    if not names:
        assert train(new).finished
        return
    with pytest.raises(UserError, match=names):
        train(new)
    assert (undisturbed / "config.yaml").read_text() == before


def test_other_data_are_refused_and_moved_data_are_not(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_sha256"):
        train(config(make_data(tmp_path / "other", seed=1), undisturbed))
    shutil.copytree(data, tmp_path / "moved")
    assert train(config(tmp_path / "moved", undisturbed)).finished


def test_foreign_directories_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else than a run"):
        train(config(data, tmp_path))


def test_impossible_settings_are_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = config(data, run)
    bad = {
        "does not divide over 3": dataclasses.replace(base, training=TrainingConfig(devices=3, accelerator="cpu")),
        "do not fit the 32 spare rows": dataclasses.replace(base, sink=SinkConfig("sink_tokens", {"n": 33})),
        "set sink.options.n to 27 at most": dataclasses.replace(base, sink=SinkConfig("sink_tokens", {"n": 28})),
        "no room for text in a context of 16": dataclasses.replace(
            base, sink=SinkConfig("sink_tokens", {"n": 16}), model=dataclasses.replace(base.model, context=16)
        ),
        "prepared with a tokenizer of 96 ids": dataclasses.replace(base, model=ModelConfig(tokenizer_size=50277)),
        "fewer than one sample": dataclasses.replace(base, model=ModelConfig(context=10**6)),
    }
    for sentence, changed in bad.items():
        with pytest.raises(UserError, match=sentence):
            train(changed)
    (data_copy := make_data(tmp_path / "edited") / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not the tokenizer that the manifest names"):
        train(config(data_copy.parent, run))
    assert not run.exists()


def test_a_full_memory_is_one_sentence_and_a_smaller_pass_goes_on(
    data: Path, undisturbed: Path, tmp_path: Path, monkeypatch
) -> None:
    """Eight samples in passes of 3, 3 and 2, then one by one; a step's gradients come out the same."""

    class Full(lit.PretrainModule):
        def loss(self, ids_BT, labels_BT):
            if self.global_step == 5 and len(ids_BT) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().loss(ids_BT, labels_BT)

    monkeypatch.setattr("sinkpretrain.train.PretrainModule", Full)
    run = config(data, tmp_path / "run")
    with pytest.raises(UserError, match=r"memory of cpu .* a pass of 3 x 64 tokens; use --training.micro_batch 1, "):
        train(run)
    smaller = dataclasses.replace(run, training=dataclasses.replace(run.training, micro_batch=1))
    assert train(smaller).finished
    ours, theirs = (np.array([x["loss"] for x in record(r) if "loss" in x]) for r in (tmp_path / "run", undisturbed))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    ("training", "advice"),
    [
        ({"micro_batch": 1}, "use several devices and --training.strategy fsdp"),
        ({"micro_batch": 1, "devices": 2}, "use --training.strategy fsdp"),
        ({"micro_batch": 1, "devices": 2, "strategy": "fsdp"}, "use more devices"),
        ({"micro_batch": 100, "devices": 2}, "a pass of 4 x 64 tokens; use --training.micro_batch 2, "),
    ],
)
def test_what_to_do_about_a_full_memory(training: dict[str, Any], advice: str, data: Path, tmp_path: Path) -> None:
    base = config(data, tmp_path / "run", **training)
    assert advice in short_of_memory(resolve(base, open_data(base.data)))


def test_disk_full_keeps_the_older_checkpoint(data: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    save = torch.save

    def full(checkpoint: Any, path: Any) -> None:
        if "step-0000012" in Path(path).name:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        save(checkpoint, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="disk is full"):
        train(config(data, run))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["newest.json", "step-0000006.ckpt"]
    monkeypatch.setattr(torch, "save", save)
    assert train(config(data, run)).finished


# --- parts --------------------------------------------------------------------------------------------------------


def test_learning_rate_follows_the_recipe() -> None:
    o = OptimizerConfig()
    rates = [learning_rate(s, 1000, o) for s in range(1001)]
    assert rates[0] == pytest.approx(6e-5)
    assert max(rates) == rates[9] == pytest.approx(6e-4)
    assert rates[505] == pytest.approx((6e-4 + 6e-5) / 2, rel=1e-2)
    assert rates[1000] == pytest.approx(6e-5)


def test_only_matrices_decay(tiny: ModelConfig) -> None:
    net = GPTNeoX(tiny)
    decayed, free = parameter_groups(net, 0.1)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))


def test_accumulation_equals_one_large_batch(data: Path, tmp_path: Path) -> None:
    train(config(data, tmp_path / "parts", steps=3, micro_batch=3))
    train(config(data, tmp_path / "whole", steps=3, micro_batch=8))
    losses = [[x["loss"] for x in record(tmp_path / r) if x["kind"] == "train"] for r in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_clipping_works_with_the_fused_optimizer_and_bf16(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(data, run, steps=3, precision="bf16-mixed"))
    assert all(p.dtype == torch.float32 for p in checkpoint(run, 3)["state_dict"].values())


def test_compiled_training_is_the_same(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "compiled"
    train(config(data, run, compile=True, steps=4))
    got = [x["loss"] for x in record(run) if x["kind"] == "train"]
    eager = config(data, tmp_path / "eager", steps=4)
    train(eager)
    assert got == pytest.approx([x["loss"] for x in record(tmp_path / "eager") if x["kind"] == "train"], abs=1e-4)
    assert set(checkpoint(run, 4)["state_dict"]) == set(checkpoint(undisturbed)["state_dict"])


def test_offline_wandb_has_one_id_and_a_folder_per_attempt(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    import wandb

    run = tmp_path / "run"
    offline = config(data, run, steps=4)
    offline = dataclasses.replace(offline, log=dataclasses.replace(offline.log, wandb="offline"))
    with monkeypatch.context() as m:
        stop_after(2, m)
        train(offline)
    wandb.finish()  # as the end of the process does
    time.sleep(1.1)  # wandb names a folder by the second
    assert train(offline).finished
    identity = json.loads((run / "run.json").read_text())["wandb_id"]
    assert len([p for p in (run / "wandb").iterdir() if p.name.endswith(identity)]) == 2
    sentence = f"to upload: wandb sync --id {identity} {run}/wandb/offline-run-*-{identity}"
    assert capsys.readouterr().out.count(sentence) == 2


# --- masks ----------------------------------------------------------------------------------------------------------


def masked(data: Path, out: Path, **model: int) -> RunConfig:
    base = config(data, out)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, **model),
        data=dataclasses.replace(base.data, document_mask=True),
    )


@pytest.mark.parametrize("compile", [False, True])
def test_document_mask_is_what_training_sees(compile: bool, data: Path, tmp_path: Path) -> None:
    """The loss of a batch with several documents: as documents by themselves, each behind the sink, would have it."""
    settings = resolve(masked(data, tmp_path), open_data(DataConfig(path=str(data))))
    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, compile=compile))
    module = lit.PretrainModule(settings)
    end = settings.data.end_of_document
    assert end is not None
    rows = torch.randint(1, 40, (2, 65)) + end
    rows[:, 20] = rows[:, 44] = end
    batch = to_batch(rows.numpy(), module.model.prefix_ids)
    hidden = module.model.hidden(batch.ids, module.model.within_documents(batch.ids, end))
    want = torch.nn.functional.cross_entropy(module.model.head(hidden).flatten(0, 1), batch.labels.flatten())
    plain = torch.nn.functional.cross_entropy(module.model(batch.ids).flatten(0, 1), batch.labels.flatten())
    got = module.loss(batch.ids, batch.labels)
    assert got.item() == pytest.approx(want.item(), abs=1e-5)
    assert abs(got.item() - plain.item()) > 1e-5


def test_masked_training_runs_and_says_so_in_its_weights(data: Path, tmp_path: Path) -> None:
    train(masked(data, tmp_path / "run", window=16, window_sinks=1))
    loaded = load_model(tmp_path / "run").model.config
    assert (loaded.window, loaded.window_sinks) == (16, 1)


@pytest.mark.parametrize(("window", "sinks", "hides"), [(63, 0, False), (40, 23, False), (40, 22, True)])
def test_a_window_that_hides_nothing_is_said(
    data: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder, window: int, sinks: int, hides: bool
) -> None:
    resolve(masked(data, tmp_path, window=window, window_sinks=sinks), open_data(DataConfig(path=str(data))))
    assert any("hides nothing" in str(w.message) for w in recwarn) != hides


def test_document_mask_needs_to_know_the_end(data: Path, tmp_path: Path) -> None:
    base = masked(data, tmp_path)
    with pytest.raises(UserError, match="leave the setting out"):
        train(dataclasses.replace(base, data=dataclasses.replace(base.data, end_of_document=17)))
    bare = dataclasses.replace(base.data, path=f"{data}/train")
    model = dataclasses.replace(base.model, tokenizer_size=300)
    with pytest.raises(UserError, match=r"give data\.end_of_document"):
        train(dataclasses.replace(base, data=bare, model=model))
    with pytest.warns(SettingHasNoEffect, match="no effect without"):
        resolve(
            dataclasses.replace(base, data=DataConfig(path=str(data), batch_size=8, end_of_document=0)),
            open_data(DataConfig(path=str(data))),
        )
