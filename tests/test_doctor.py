"""doctor: finds what would stop or spoil a job, and what it finds right is right."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MECHANISMS
from data_factory import make_data
from test_train import config

from sinkpretrain import attention, doctor, selftest, slurm
from sinkpretrain.cli import main
from sinkpretrain.config import RunConfig, SinkConfig
from sinkpretrain.data import open_data
from sinkpretrain.doctor import Finding, check_attention, check_disk, check_job, check_memory, needed_bytes
from sinkpretrain.errors import UserError
from sinkpretrain.selftest import self_test
from sinkpretrain.train import resolve


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return config(make_data(tmp_path / "data"), tmp_path / "run")


def flags(run: RunConfig) -> list[str]:
    model = [f"--model.{k}={getattr(run.model, k)}" for k in ("n_layer", "d_model", "n_head", "context")]
    training = ["--training.accelerator=cpu", "--training.precision=32-true"]
    return [*model, *training, f"--data.path={run.data.path}", "--data.batch-size=8", f"--out={run.out}"]


def test_all_is_well_on_a_laptop_and_nothing_is_left(run: RunConfig, tmp_path: Path, capsys) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main(["doctor", *flags(run)]) == 0
    text = capsys.readouterr().out
    for name in ("data", "space", "write speed", "locks", "device", "attention", "causality"):
        assert f"ok   {name}" in text
    assert "FAIL" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_changed_byte_of_the_data_is_found(run: RunConfig, capsys) -> None:
    change_a_byte(Path(run.data.path) / "train.bin")
    assert main(["doctor", *flags(run)]) == 1
    assert "FAIL data: " in capsys.readouterr().out


def test_data_to_validate_on_from_elsewhere_are_checked_too(run: RunConfig, tmp_path: Path, capsys) -> None:
    """Of the other folder only what is validated on; data of another tokenizer are not."""
    own = (Path(run.data.path) / "tokenizer.json").read_text()
    novels = make_data(tmp_path / "novels", seed=1, tokenizer=own)
    change_a_byte(novels / "train.bin")
    elsewhere = f"--data.validation-path={novels}"
    assert main(["doctor", *flags(run), elsewhere]) == 0
    assert "ok   validation: 6,020 tokens to validate on, as they were written" in capsys.readouterr().out
    change_a_byte(novels / "validation.bin")
    assert main(["doctor", *flags(run), elsewhere]) == 1
    assert f"FAIL validation: {novels / 'validation.bin'} has changed since" in capsys.readouterr().out
    other = make_data(tmp_path / "other", seed=2)
    assert main(["doctor", *flags(run), f"--data.validation-path={other}"]) == 1
    assert "FAIL settings: " in (text := capsys.readouterr().out)
    assert "another tokenizer than the training data" in text


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1001] ^= 1
    path.write_bytes(content)


def test_one_failing_check_does_not_hide_the_others(run: RunConfig, capsys) -> None:
    assert main(["doctor", *flags(run), "--data.path=/nowhere"]) == 1
    text = capsys.readouterr().out
    assert "FAIL data: token file /nowhere" in text
    assert "ok   causality" in text


def test_settings_that_do_not_fit_are_said_once(run: RunConfig, capsys) -> None:
    assert main(["doctor", *flags(run), "--training.devices=3"]) == 1
    text = capsys.readouterr().out
    assert text.count("FAIL") == 1
    assert "FAIL settings: data.batch_size 8 does not divide over 3 processes" in text


def test_too_little_space_is_said_with_numbers(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: _Usage(1000))
    space = next(f for f in check_disk(resolve(run, open_data(run.data))) if f.name == "space")
    assert space.ok is False
    log = dataclasses.replace(run.log, checkpoint_every=10, keep=2, weights_every=0)
    assert needed_bytes(dataclasses.replace(run, log=log), 100) == 100 * (12 * (2 + 1 + 1) + 4 * 11)


@pytest.mark.parametrize(
    ("training", "gib"),
    [
        ({"devices": 2, "strategy": "ddp"}, 16),
        ({"devices": 4, "strategy": "fsdp", "gather": "block"}, 4),
        ({"devices": 4, "strategy": "fsdp", "gather": "step"}, 4 + 3),
        ({"devices": 1, "strategy": "fsdp", "gather": "step"}, 16),
        ({"devices": 2, "strategy": "ddp", "precision": "bf16-true"}, 8),
        ({"devices": 2, "strategy": "ddp", "precision": "64-true"}, 32),
    ],
)
def test_a_model_that_no_memory_holds_is_found(
    training: dict[str, Any], gib: int, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 2^30 parameters, GiB are the bytes of a parameter."""

    class Counted:
        def n_parameters(self) -> int:
            return 2**30

    monkeypatch.setattr(doctor, "without_weights", lambda *_: Counted())
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, **training))
    run = resolve(run, open_data(run.data))
    for memory, ok in ((gib * 2**30 + 1, True), (gib * 2**30 - 1, False)):
        monkeypatch.setattr(doctor, "total_memory", lambda _, memory=memory: memory)
        (finding,) = check_memory(run)
        assert finding.ok is ok
        assert finding.text.startswith(f"{gib:.2f} of {memory / 2**30:.1f} GiB for weights, gradients and ")


def test_a_cpus_memory_is_not_judged(run: RunConfig) -> None:
    assert check_memory(resolve(run, open_data(run.data))) == []


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


# --- the job ------------------------------------------------------------------------------------------------------


def test_slurm_against_the_configuration(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert check_job(run)[0].ok is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert "put srun in front" in check_job(run)[0].text
    for name, value in {"SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "show", lambda job: "JobId=7 Requeue=0 EndTime=2099-01-01T00:00:00")
    found = {f.name: f for f in check_job(run)}
    assert found["SLURM_NNODES"] == Finding("SLURM_NNODES", False, "2; training.nodes is 1")
    assert found["SLURM_NTASKS"].ok
    assert found["time limit"].ok
    assert "submit with --requeue" in found["requeue"].text


def test_a_taken_port_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with pytest.raises(UserError, match="taken by another program; export another MASTER_PORT"):
            doctor._require_free("localhost", other.getsockname()[1])


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_mechanism_passes_on_this_device(precision: Any, mechanism: SinkConfig, run: RunConfig) -> None:
    training = dataclasses.replace(run.training, precision=precision)
    findings = check_attention(dataclasses.replace(run, sink=mechanism, training=training))
    assert all(f.ok for f in findings), [str(f) for f in findings]


def _sees_the_future(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _drops_the_column(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _half_precision(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, column: Any, mask: Any = None) -> torch.Tensor:
    return attention.causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), column, mask).to(v.dtype)


def _detached_gate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, column: Any, mask: Any = None) -> torch.Tensor:
    """The trap of flash kernels: the right output, and no gradient through the logsumexp."""
    with torch.no_grad():
        logits = (q @ k.mT) * q.shape[-1] ** -0.5
        blind = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        lse = logits.masked_fill(blind, float("-inf")).logsumexp(-1)
    return attention.merge_column(_drops_the_column(q, k, v), lse, column)


@pytest.mark.parametrize(
    ("wrong", "finding"),
    [
        (_sees_the_future, "causality"),
        (_drops_the_column, "attention"),
        (_half_precision, "attention"),
        (_detached_gate, "attention"),
    ],
)
def test_broken_kernels_are_found(wrong: Any, finding: str, run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinkpretrain import model

    monkeypatch.setattr(model, "causal_attention", wrong)
    found = {f.name: f for f in check_attention(dataclasses.replace(run, sink=MECHANISMS["zero_sink"]))}
    assert found[finding].ok is False


def test_the_reference_is_not_the_kernel(run: RunConfig) -> None:
    """Errors of fp32 are there but small: the two are computed in different ways."""
    result = self_test(dataclasses.replace(run, sink=MECHANISMS["sink_logit"]), "cpu")
    assert 0 < result.output < selftest.LIMITS["32-true"][0]
