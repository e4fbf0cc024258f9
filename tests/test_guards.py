"""Steps that are not finite are skipped, counted and end the run with the samples named; spikes are recorded."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from data_factory import make_data
from test_train import config, record, run_command, stop_after

from sinkpretrain import lit, metrics
from sinkpretrain.data import Samples, open_data, training_order
from sinkpretrain.errors import UserError
from sinkpretrain.guards import Guard, finite
from sinkpretrain.load import read_checkpoint
from sinkpretrain.train import train


def line(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "grad_norm": None if loss is None else 1.0}


def samples(step: int) -> list[int]:
    return [10 * step + i for i in range(40)]


def test_a_spike_is_recorded_with_its_samples() -> None:
    guard = Guard(3, samples)
    quiet = [line(s, 4.0 + 0.01 * (-1) ** s) for s in range(1, 65)]
    assert guard.events(quiet) == []
    assert guard.events([line(65, 4.05)]) == []
    (event,) = guard.events([line(66, 4.5)])
    assert (event["kind"], event["step"], event["samples"]) == ("spike", 66, samples(66))


def test_replayed_lines_count_like_new_ones() -> None:
    fresh, resumed = Guard(3, samples), Guard(3, samples)
    lines = [line(s, 4.0) for s in range(1, 70)] + [line(70, None), line(71, None)]
    fresh.events(lines)
    for one in [*lines, {"kind": "validation", "step": 70, "loss": 4.0}]:
        resumed.replay(one)
    for guard in (fresh, resumed):
        guard.check()
        guard.events([line(72, None)])
        with pytest.raises(UserError, match=r"3 steps in a row, from step 70 on, whose samples are 700, 701.* 8 more"):
            guard.check()


def test_finite_numbers_only_reach_json() -> None:
    assert [finite(x) for x in (1.23456789, math.nan, math.inf)] == [1.234568, None, None]


def poison(steps: tuple[int, ...], value: float) -> Any:
    original = lit.PretrainModule.loss

    def loss(self: lit.PretrainModule, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = original(self, ids, labels)
        return out * value if self.model.training and self.global_step + 1 in steps else out

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(value: float, tmp_path: Path, monkeypatch) -> None:
    run = config(make_data(tmp_path / "data"), tmp_path / "run", steps=4)
    run = dataclasses.replace(run, log=dataclasses.replace(run.log, checkpoint_every=1))
    monkeypatch.setattr(lit.PretrainModule, "loss", poison((4,), value))
    train(run)
    a, b = (read_checkpoint(tmp_path / "run" / "checkpoints" / f"step-000000{step}.ckpt") for step in (3, 4))
    for name, before in a["state_dict"].items():
        assert torch.equal(before, b["state_dict"][name])
    for number, state in a["optimizer_states"][0]["state"].items():
        for key, before in state.items():
            assert torch.equal(before, b["optimizer_states"][0]["state"][number][key])
    last = [x for x in record(tmp_path / "run") if x["kind"] == "train"][-1]
    assert (last["loss"], last["grad_norm"]) == (None, None)
    (skipped,) = [x for x in record(tmp_path / "run") if x["kind"] == "skipped"]
    opened = open_data(run.data)
    order = training_order(run.data, Samples(opened.train, run.model, (96,)))
    assert skipped["samples"] == order(3 * 8, 8).tolist()
    for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


def test_a_stop_before_a_skipped_step_leaves_the_same_record(tmp_path: Path, monkeypatch) -> None:
    whole, stopped = (config(make_data(tmp_path / f"data-{name}"), tmp_path / name, steps=8) for name in "ab")
    monkeypatch.setattr(lit.PretrainModule, "loss", poison((8,), math.nan))
    train(whole)
    with monkeypatch.context() as m:
        stop_after(7, m)  # the record is written every four steps
        train(stopped)
    train(stopped)
    assert record(tmp_path / "a") == record(tmp_path / "b")


def test_too_many_in_a_row_end_the_run(tmp_path: Path, monkeypatch) -> None:
    data = make_data(tmp_path / "data")
    monkeypatch.setattr(lit.PretrainModule, "loss", poison((3, 4, 5), math.nan))
    with pytest.raises(UserError, match="not finite in 3 steps in a row, from step 3 on, whose samples are"):
        train(config(data, tmp_path / "run", max_skipped=3, steps=12))
    assert [x["step"] for x in metrics.read(tmp_path / "run") if x["kind"] == "skipped"] == [3, 4, 5]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_in_trouble_means_no_step_for_any(strategy: str, tmp_path: Path) -> None:
    """The loss of one of two processes is NaN in one step: both skip it, and their weights stay the same."""
    run = config(make_data(tmp_path / "data"), tmp_path / "run", steps=5, devices=2, strategy=strategy)
    trouble = "if self.global_step == 2 and self.trainer.global_rank == 1 else "
    done = run_command(
        run,
        tmp_path / "a",
        code="from sinkpretrain import lit\n"
        "loss = lit.PretrainModule.loss\n"
        f"lit.PretrainModule.loss = lambda self, *a: loss(self, *a) * float('nan') {trouble}loss(self, *a)\n",
    )
    assert done.returncode == 0, done.stderr
    assert [x["step"] for x in record(tmp_path / "run") if x["kind"] == "skipped"] == [3]
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-0000005.ckpt")
    assert all(v.isfinite().all() for v in last["state_dict"].values())
    assert {float(s["step"]) for s in last["optimizer_states"][0]["state"].values()} == {4.0}
