"""``sinkpretrain bench scaling``: the command ``train`` on 1, 2, 4, 8 devices of one host, without a scheduler.

Two questions for each model: the recipe's batch divided over more devices, and more devices with a batch of their own.
Smaller jobs run side by side on a host whose GPUs hold them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from sinkpretrain.bench import Setting, flops_per_token, steady_rates
from sinkpretrain.bench_rank import PROFILED_STEPS
from sinkpretrain.config import RunConfig, load_yaml, recipe_path, save_yaml
from sinkpretrain.device import gpu_names
from sinkpretrain.errors import UserError
from sinkpretrain.files import read_json, write_json
from sinkpretrain.provenance import provenance
from sinkpretrain.signals import to_take

PASSES = 40
"""Passes of a device through its model that a job has time for; a step has one or more."""

FEWEST_STEPS = 4
"""Timed steps of a job, however many passes each has."""

SHORTEST = 30.0
"""Seconds below which no job is worth beginning."""

RULES = ("per device", "in all")
"""What stays the same on more devices: the samples of each, or those of a step."""


@dataclass(frozen=True)
class Job:
    """One run of ``train``."""

    model: str
    rule: str
    devices: int
    config: RunConfig

    def __str__(self) -> str:
        return f"{self.model}, batch {self.rule} the same, {self.devices} device{'s' * (self.devices > 1)}"

    @property
    def folder(self) -> Path:
        return Path(self.config.out).parent


def bench_scaling(
    out: str = "scaling.json",
    models: str = "pythia-160m,pythia-1b",
    devices: str = "",
    context: int = 0,
    minutes: float = 9.0,
    side_by_side: bool = True,
    compile: bool = True,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    gather: Literal["auto", "step", "block"] = "auto",
) -> dict[str, Any]:
    """Tokens per second of training on 1, 2, 4, ... devices of this host, and what is lost to waiting.

    Args:
        out: JSON file for the figures, written anew after each.
        models: recipes of models, separated by commas; the first is the most important. Those of a billion parameters
            and more are sharded over the devices, unless strategy says otherwise.
        devices: numbers of devices, separated by commas; by default the powers of two up to the GPUs of this host, or
            1 and 2 processes on a CPU.
        context: tokens per sample; 0 is the recipe's.
        minutes: end by then, with what there is.
        side_by_side: run jobs that fit on the host's GPUs together at the same time.
        compile: run the models through torch.compile.
        strategy: training.strategy of every job.
        gather: training.gather of every job.

    Returns:
        What is in the file: figures with device, versions and commit.

    Raises:
        UserError: an unknown recipe, or more devices than there are.
    """
    started = time.monotonic()
    gpus = torch.cuda.device_count()
    counts = _counts(devices, gpus)
    report: dict[str, Any] = {
        "what": "scaling",
        **provenance("cuda" if gpus else "cpu"),
        "devices": gpus or os.cpu_count(),
        "figures": [],
        "left_out": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), context, 0, 0, compile, fused=True)
        for model in models.split(","):
            # By size first, so that the small jobs of both rules lie together and share the host.
            each = itertools.product(counts, RULES)
            plan = [job(setting, model, rule, n, strategy=strategy, gather=gather) for n, rule in each]
            for together in waves(plan, gpus if side_by_side else 0):
                left = 60 * minutes - (time.monotonic() - started)
                if left < SHORTEST and report["figures"]:
                    report["left_out"] |= {str(j): f"not begun after {minutes:g} minutes" for j in together}
                    continue
                found, failed = run(together, left, gpus)
                report["figures"] += found
                report["left_out"] |= failed
                compare(report["figures"])
                for figure in found:
                    print(line(figure), flush=True)
                for name, reason in failed.items():
                    print(f"{name}: left out, {reason}", flush=True)
                write_json(Path(out), report)
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(Path(out), report)
    print(table(report))
    return report


def _counts(devices: str, gpus: int) -> list[int]:
    """Numbers of devices, most first; raises UserError."""
    if not devices:
        return [n for n in (64, 32, 16, 8, 4, 2, 1) if n <= (gpus or 2)]
    try:
        counts = sorted({int(n) for n in devices.split(",")}, reverse=True)
    except ValueError as error:
        raise UserError(f"--devices {devices} is no list of numbers like 1,2,4.") from error
    if counts[-1] < 1 or (gpus and counts[0] > gpus):
        raise UserError(f"--devices {devices}: this host has {gpus} GPUs; give numbers from 1 to that.")
    return counts


def job(setting: Setting, model: str, rule: str, devices: int, **training: Any) -> Job:
    """A recipe's run on so many devices, with these settings of ``training``; raises UserError if its batch does not
    divide over them."""
    base = setting.config(model, "vanilla")
    micro = base.training.micro_batch
    batch = micro * devices if rule == "per device" else load_yaml(RunConfig, recipe_path(model)).data.batch_size
    if batch % devices:
        raise UserError(f"the batch of {model}, {batch} samples, does not divide over {devices} devices.")
    steps = max(FEWEST_STEPS, PASSES * micro * devices // batch)
    every = max(1, steps // 8)
    config = dataclasses.replace(
        base,
        out=str(setting.folder / f"{model}-{rule.replace(' ', '-')}-{devices}" / "run"),
        data=dataclasses.replace(base.data, batch_size=batch),
        # The profiled steps are behind the last full flush.
        training=dataclasses.replace(
            base.training, devices=devices, steps=steps // every * every + PROFILED_STEPS, **training
        ),
        log=dataclasses.replace(base.log, every=every),
    )
    return Job(model, rule, devices, config)


def waves(plan: list[Job], gpus: int) -> list[list[Job]]:
    """The jobs in groups that fit on the GPUs together, in their order; each alone where there are none."""
    groups: list[list[Job]] = []
    for job in plan:
        if groups and sum(j.devices for j in groups[-1]) + job.devices <= gpus:
            groups[-1].append(job)
        else:
            groups.append([job])
    return groups


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """What would end this process alone unwinds it, so that the jobs, in sessions of their own, end with it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()  # elsewhere Python takes no handlers
    taken = {n: signal.signal(n, leave) for n in to_take() if here and n != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


@_told_to_end()
def run(jobs: list[Job], seconds: float, gpus: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Run jobs together, for so many seconds at most: figures of those that finished, and why others did not."""
    deadline, first = time.monotonic() + seconds, 0
    processes = []
    try:
        for job in jobs:
            processes.append(_start(job, range(first, first + job.devices) if gpus else (), len(jobs)))
            first += job.devices
        codes = [_wait(process, deadline) for process in processes]
    finally:
        for process in processes:
            _end(process)
    found, failed = [], {}
    for job, code in zip(jobs, codes, strict=True):
        if code == 0:
            found.append(figure(job))
        elif code is None:
            failed[str(job)] = "not finished in time"
        else:
            said = (job.folder / "log").read_text(encoding="utf-8", errors="replace").split("\n")
            failed[str(job)] = f"ended with code {code}: {next((s for s in reversed(said) if s.strip()), '')[:300]}"
    return found, failed


def _start(job: Job, gpus: range | tuple[int, ...], beside: int) -> subprocess.Popen[bytes]:
    """``train`` as on a host of its own: it launches its other processes itself, also within a Slurm job."""
    job.folder.mkdir(parents=True)
    save_yaml(job.config, job.folder / "recipe.yaml")
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {k: v for k, v in os.environ.items() if k not in ranks and not k.startswith("SLURM_")}
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    # Every process compiles; by default each would start a compiler per core.
    threads = max(1, (os.cpu_count() or 1) // job.devices // beside)
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(16, threads)))
    if gpus:
        names = gpu_names(torch.cuda.device_count())
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] for i in gpus)
    command = [sys.executable, "-m", "sinkpretrain.bench_rank", str(job.folder), "train"]
    with (job.folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--config", str(job.folder / "recipe.yaml")],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _wait(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, deadline - time.monotonic()))
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it launched, if any are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- what is said about it ----------------------------------------------------------------------------------------


def figure(job: Job) -> dict[str, Any]:
    """What a finished job's record and its processes say."""
    rates = steady_rates(job.config, job.config.training.steps - PROFILED_STEPS)
    tokens = job.config.data.batch_size * job.config.model.context
    rate = statistics.median(rates)
    ranks = [read_json(p) for p in sorted(job.folder.glob("rank-*.json"))]
    waits = [statistics.fmean(r["waits"][len(r["waits"]) // 3 :]) for r in ranks]
    exposed = [r["communication"] for r in ranks if r["communication"] is not None]
    return {
        "model": job.model,
        "same": job.rule,
        "devices": job.devices,
        "tokens_per_step": tokens,
        "tokens_per_second": round(rate, 1),
        "milliseconds": round(1000 * tokens / rate, 3),
        "spread": round(max(rates) / min(rates) - 1, 4),
        "model_flops_per_second_and_device": rate * flops_per_token(job.config) / job.devices,
        "waiting_for_data": round(max(waits) * rate / tokens, 5),
        "communication_milliseconds": max((c["milliseconds"] for c in exposed), default=None),
        "exposed_communication_milliseconds": max((c["exposed_milliseconds"] for c in exposed), default=None),
        "peak_memory_bytes": max(r["peak_memory_bytes"] for r in ranks),
    }


def compare(figures: list[dict[str, Any]]) -> None:
    """Add each figure's efficiency: its rate per device over that of one device alone, where that is known."""
    alone = {(f["model"], f["same"]): f["tokens_per_second"] for f in figures if f["devices"] == 1}
    for f in figures:
        one = alone.get((f["model"], f["same"]))
        f["efficiency"] = round(f["tokens_per_second"] / one / f["devices"], 4) if one else None


def line(f: dict[str, Any]) -> str:
    """One row of the table."""
    exposed, efficiency = f["exposed_communication_milliseconds"], f["efficiency"]
    return (
        f"{f['model']:<14} {f['same']:<11} {f['devices']:>7} {f['tokens_per_second']:>12,.0f} "
        f"{f['milliseconds']:>10.1f} {'' if efficiency is None else f'{efficiency:.3f}':>11} "
        f"{100 * f['waiting_for_data']:>8.2f} % {'-' if exposed is None else f'{exposed:.2f}':>12} "
        f"{f['peak_memory_bytes'] / 2**30:>8.1f}"
    )


def table(report: dict[str, Any]) -> str:
    """All figures, by model and rule and then by devices, and what is missing."""
    head = (
        f"{'model':<14} {'same batch':<11} {'devices':>7} {'tokens/s':>12} {'ms/step':>10} {'efficiency':>11} "
        f"{'data':>10} {'waits (ms)':>12} {'GiB':>8}"
    )
    rows = sorted(report["figures"], key=lambda f: (f["model"], RULES.index(f["same"]), f["devices"]))
    missing = [f"left out: {name} ({reason})" for name, reason in report["left_out"].items()]
    return "\n".join(["", head, *map(line, rows), *missing])
