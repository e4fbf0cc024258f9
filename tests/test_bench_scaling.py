"""Scaling over devices: real runs of ``train`` in processes of their own, and the arithmetic on what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from sinkpretrain import bench, bench_scaling
from sinkpretrain.bench_rank import communication, length
from sinkpretrain.bench_scaling import Job, compare, waves
from sinkpretrain.config import RunConfig
from sinkpretrain.errors import UserError


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(bench, "SYNTHETIC_TOKENS", 40_000)
    monkeypatch.setattr(bench_scaling, "PASSES", 12)


def test_one_and_two_processes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_scaling, "RULES", ("per device",))
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # of a job around it, which must not decide how many processes there are
    monkeypatch.setenv("SLURM_NTASKS", "1")
    out = tmp_path / "scaling.json"
    report = bench_scaling.bench_scaling(str(out), models="demo", context=32, compile=False)
    assert report["left_out"] == {}
    two, one = report["figures"]
    assert (one["devices"], two["devices"]) == (1, 2)
    assert two["tokens_per_step"] == 2 * one["tokens_per_step"] == 2 * 16 * 32
    assert one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(two["tokens_per_second"] / one["tokens_per_second"] / 2, abs=1e-4)
    assert one["peak_memory_bytes"] > 1 << 27
    assert 0 <= two["waiting_for_data"] < 1
    assert two["exposed_communication_milliseconds"] is None  # NCCL's kernels are on GPUs only
    assert json.loads(out.read_text())["figures"] == report["figures"]
    last = capsys.readouterr().out.rstrip().splitlines()[-2:]
    assert [row.split()[:4] for row in last] == [["demo", "per", "device", "1"], ["demo", "per", "device", "2"]]


def test_a_job_that_fails_or_takes_too_long_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_scaling, "RULES", ("in all",))
    report = bench_scaling.bench_scaling(
        str(tmp_path / "s.json"), models="demo", devices="1", context=1 << 20, compile=False
    )
    assert report["figures"] == []
    assert "fewer than one sample" in report["left_out"]["demo, batch in all the same, 1 device"]
    report = bench_scaling.bench_scaling(str(tmp_path / "s.json"), models="demo", devices="1", minutes=0.01)
    assert report["left_out"] == {"demo, batch in all the same, 1 device": "not finished in time"}


def test_what_ends_the_benchmark_ends_its_jobs(monkeypatch) -> None:
    started = []

    def start(*_: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "60"], start_new_session=True))
        return started[-1]

    monkeypatch.setattr(bench_scaling, "_start", start)
    monkeypatch.setattr(bench_scaling, "_wait", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        bench_scaling.run([Job("demo", "per device", 1, RunConfig())] * 2, 60.0, 0)
    assert left.value.code == 128 + signal.SIGTERM
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_devices_that_are_not_there_are_refused(monkeypatch) -> None:
    for wrong in ("0,1", "two"):
        with pytest.raises(UserError, match="--devices"):
            bench_scaling._counts(wrong, 0)
    with pytest.raises(UserError, match="this host has 4 GPUs"):
        bench_scaling._counts("8", 4)
    assert bench_scaling._counts("", 8) == [8, 4, 2, 1]
    assert bench_scaling._counts("", 6) == [4, 2, 1]


@pytest.mark.parametrize(
    ("gpus", "expected"), [(8, [[8], [4, 2, 1]]), (4, [[8], [4], [2, 1]]), (0, [[8], [4], [2], [1]])]
)
def test_small_jobs_share_a_host(gpus: int, expected: list[list[int]]) -> None:
    plan = [Job("m", "in all", n, RunConfig()) for n in (8, 4, 2, 1)]
    assert [[j.devices for j in wave] for wave in waves(plan, gpus)] == expected


def test_small_jobs_of_both_rules_share_a_host(tmp_path: Path, monkeypatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(bench_scaling.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench_scaling, "provenance", lambda device: {})
    monkeypatch.setattr(bench_scaling, "run", lambda jobs, *_: (seen.append([j.devices for j in jobs]), ([], {}))[1])
    bench_scaling.bench_scaling(str(tmp_path / "s.json"), models="demo,demo")
    assert seen == [[2], [2], [1, 1]] * 2


def test_exposed_communication_is_what_nothing_else_covers() -> None:
    def event(name: str, ts: float, dur: float, cat: str = "kernel") -> dict:
        return {"name": name, "ts": ts, "dur": dur, "cat": cat}

    events = [
        event("ncclDevKernel_AllReduce", 0, 10_000),
        event("gemm", 0, 6_000),
        event("gelu", 5_000, 2_000),
        event("ncclDevKernel_AllReduce", 9_000, 3_000),
        event("Memcpy DtoD", 11_000, 500, "gpu_memcpy"),
        event("cudaLaunchKernel", 0, 100_000, "cuda_runtime"),
        {"name": "process_name", "ph": "M"},
    ]
    assert communication(events, steps=2) == {"milliseconds": 6.0, "exposed_milliseconds": 2.25}
    assert length([]) == 0


def test_efficiency_is_against_one_device_of_the_same_series() -> None:
    figures = [
        {"model": m, "same": rule, "devices": n, "tokens_per_second": rate}
        for m, rule, n, rate in (("a", "in all", 8, 720), ("a", "in all", 1, 100), ("a", "per device", 2, 100))
    ]
    compare(figures)
    assert [f["efficiency"] for f in figures] == [0.9, 1.0, None]
