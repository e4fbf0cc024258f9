"""``sinkpretrain bench train``: how fast training is, measured as a user would meet it, with peers in the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sinkpretrain import metrics
from sinkpretrain.config import LogConfig, RunConfig, load_yaml, recipe_names, recipe_path, sink_recipe
from sinkpretrain.data import Batch, Samples, Stream, open_data, training_order
from sinkpretrain.errors import UserError
from sinkpretrain.files import write_json
from sinkpretrain.lit import PretrainModule
from sinkpretrain.model import without_weights
from sinkpretrain.peers import PEERS
from sinkpretrain.profiling import profile
from sinkpretrain.provenance import provenance
from sinkpretrain.timing import FLUSH, bare_step, device, figure, matmul_rate, seconds_per_step, start_clean
from sinkpretrain.tokens import TokenWriter
from sinkpretrain.train import resolve, train_whole

SYNTHETIC_TOKENS = 20_000_000
SYNTHETIC_IDS = 2048
"""Ids of the random tokens where a recipe leaves the tokenizer to its data."""

SIZES = {
    "pythia-14m": 32,
    "pythia-31m": 32,
    "pythia-70m": 32,
    "pythia-410m": 16,
    "pythia-1b": 8,
    "pythia-1.4b": 8,
}
"""The other sizes that the suite measures, and samples per step that 80 GB hold at context 2,048."""


def bench(
    out: str = "train.json",
    model: str = "pythia-160m",
    sinks: str = "vanilla",
    models: str = "",
    context: int = 0,
    micro_batch: int = 0,
    steps: int = 60,
    compile: bool = True,
    fused: bool = True,
    bare: bool = False,
    kernels: bool = False,
    peers: str = "",
    suite: bool = False,
    minutes: float = 0.0,
) -> dict[str, Any]:
    """Tokens per second of training, on random tokens. Each figure is printed and written as soon as it is there.

    The first of the sinks goes through the real trainer and data path, the other sinks and the other models through a
    bare loop of the same step.

    Args:
        out: JSON file for the figures.
        model: recipe of the model; ``demo`` is the demo's.
        sinks: recipes of sink mechanisms, separated by commas, or ``all``.
        models: recipes of further models, separated by commas.
        context: tokens per sample; 0 is the recipe's.
        micro_batch: samples per optimizer step, in one pass on one device; 0 is the recipe's.
        steps: optimizer steps; the first third is warm-up.
        compile: run the model through torch.compile.
        fused: use the fused kernels.
        bare: also run the first one's step without Lightning, data and logging.
        kernels: also say where a step's time goes on the GPU.
        peers: other implementations of the same model to run beside it, separated by commas: hf, hf-compiled,
            litgpt-compiled.
        suite: everything at once, in order of importance.
        minutes: begin no further measurement after that many; 0 is no limit.

    Returns:
        What is in the file: figures with device, versions and commit.

    Raises:
        UserError: an unknown peer or recipe, or a peer that is not installed.
    """
    if suite:
        bare, sinks = True, "all"
        models, peers, kernels = (
            (",".join(SIZES), "litgpt-compiled,hf-compiled,hf", True) if _cuda() else ("", "hf", False)
        )
    wanted = [p for p in peers.split(",") if p]
    for peer in wanted:
        if peer not in PEERS:
            raise UserError(f"unknown peer {peer!r}; known: {', '.join(PEERS)}.")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder), context, micro_batch, steps, compile, fused)
        names = recipe_names("sinks") if sinks == "all" else sinks.split(",")
        names.sort(key=lambda name: name != "vanilla")
        first = setting.config(model, names[0])
        peer_jobs = {peer: functools.partial(peer_loop, peer, first) for peer in wanted}
        jobs: dict[str, Callable[[], dict[str, Any]]] = {f"ours: {names[0]}": functools.partial(ours, first)}
        if bare:
            jobs[f"bare loop: {names[0]}"] = functools.partial(bare_loop, first, kernels and _cuda())
        jobs |= itertools.islice(peer_jobs.items(), 1)
        for name in names[1:]:
            jobs[f"bare loop: {name}"] = functools.partial(bare_loop, setting.config(model, name, short=True))
        for other in filter(None, models.split(",")):
            jobs[other] = functools.partial(bare_loop, setting.config(other, "vanilla", short=True))
        report = Report(Path(out), suite, minutes)
        for name, job in (jobs | peer_jobs).items():
            report.add(name, job)
    return report.finish()


def _cuda() -> bool:
    return torch.cuda.is_available()


def device_precision() -> Literal["bf16-mixed", "32-true"]:
    """What one trains in on this machine."""
    return "bf16-mixed" if _cuda() else "32-true"


# --- what is measured ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all measurements of a run have in common."""

    folder: Path
    context: int
    micro_batch: int
    steps: int
    compile: bool
    fused: bool

    def config(self, model: str, sink: str, short: bool = False) -> RunConfig:
        """A recipe as a run on random tokens that does nothing but train; ``short`` takes a third of the steps."""
        base = load_yaml(RunConfig, recipe_path(model))
        batch = self.micro_batch or (SIZES.get(model) if _cuda() else None) or base.training.micro_batch
        ids = base.model.tokenizer_size or SYNTHETIC_IDS
        return dataclasses.replace(
            base,
            name=sink,
            out=str(self.folder / f"{model}-{sink}"),
            sink=sink_recipe(sink),
            model=dataclasses.replace(base.model, context=self.context or base.model.context, tokenizer_size=ids),
            data=dataclasses.replace(base.data, path=str(synthetic(self.folder / f"ids-{ids}", ids)), batch_size=batch),
            training=dataclasses.replace(
                base.training,
                steps=max(2 * FLUSH, self.steps // 3) if short else self.steps,
                micro_batch=batch,
                devices=1,
                compile=self.compile,
                fused=self.fused,
                precision=device_precision(),
            ),
            log=only_losses(FLUSH),
        )


def only_losses(every: int) -> LogConfig:
    """A record of every so many steps, and nothing else."""
    return LogConfig(every, validate_every=0, probe_every=0, checkpoint_every=0, weights_every=0, progress=False)


def ours(config: RunConfig) -> dict[str, Any]:
    """``sinkpretrain train`` itself; the rate is the median over full flushes of its own record."""
    start_clean()
    started = time.perf_counter()
    with watching() as (flushes, waits):
        train_whole(config)
    rates = steady_rates(config, config.training.steps)
    tokens = config.data.batch_size * config.model.context
    seconds = tokens / statistics.median(rates)
    waited = sum(waits[len(waits) // 3 :]) / max(1, len(waits) - len(waits) // 3)
    return figure(
        f"ours: {config.name}",
        seconds,
        tokens,
        flops_per_token(resolve(config, open_data(config.data))),
        first_flush_seconds=flushes[0] - started,
        waiting_for_data=waited / seconds,
        spread=max(rates) / min(rates) - 1,
    )


def steady_rates(config: RunConfig, last_step: int) -> list[float]:
    """Tokens per second of a run's flushes up to a step, without the first third of them."""
    lines = [line for line in metrics.read(Path(config.out)) if "tokens_per_second" in line]
    # Steps 1, 2, 4, 8 ... keep weights and so flush early: leave out what is shorter than the others.
    full = [b for a, b in itertools.pairwise(lines) if b["step"] - a["step"] == config.log.every]
    full = [line for line in full if line["step"] <= last_step]
    return [line["tokens_per_second"] for line in (full or lines)[len(full) // 3 :]]


@contextlib.contextmanager
def watching() -> Iterator[tuple[list[float], list[float]]]:
    """When the trainer flushed, and for how many seconds it waited for each batch."""
    flushes: list[float] = []
    waits: list[float] = []
    flush, iterate = PretrainModule._flush, Stream.__iter__

    def noting(self: PretrainModule) -> None:
        flush(self)
        flushes.append(time.perf_counter())

    def timed(self: Stream) -> Iterator[Batch]:
        batches = iterate(self)
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            yield batch

    PretrainModule._flush, Stream.__iter__ = noting, timed  # type: ignore[method-assign]
    try:
        yield flushes, waits
    finally:
        PretrainModule._flush, Stream.__iter__ = flush, iterate  # type: ignore[method-assign]


def bare_loop(config: RunConfig, kernels: bool = False) -> dict[str, Any]:
    """The same module's loss, optimizer and clipping in a loop of its own, on one batch that never changes."""
    start_clean()
    config = resolve(config, open_data(config.data))
    module = PretrainModule(config).to(device())
    module.prepare_kernels(device())
    ids, labels = _one_batch(config, module.model.prefix_ids)
    step = bare_step(lambda: module.loss(ids, labels), module.model, module.configure_optimizers())
    seconds, first = seconds_per_step(step, config.training.steps)
    more = {"where": profile(step)} if kernels else {}
    return figure(
        f"bare loop: {config.name}",
        seconds,
        ids.numel(),
        module.model.flops_per_token(),
        compile_seconds=max(0.0, first - seconds),
        parameters=module.model.n_parameters(),
        **more,
    )


def peer_loop(peer: str, config: RunConfig) -> dict[str, Any]:
    """Another implementation of the same model in a bare loop: same tokens, precision, optimizer and clipping."""
    start_clean()
    config = resolve(config, open_data(config.data))
    net, loss = PEERS[peer](config)
    net.to(device())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids, labels = _one_batch(config, ())
    step = bare_step(lambda: loss(ids, labels), net, optimizer)
    seconds, first = seconds_per_step(step, config.training.steps // 2)
    return figure(peer, seconds, ids.numel(), flops_per_token(config), compile_seconds=max(0.0, first - seconds))


def _one_batch(config: RunConfig, prefix: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and labels of the first step, on the device."""
    samples = Samples(open_data(config.data).train, config.model, prefix)
    stream = Stream(samples, training_order(config.data, samples), config.training.micro_batch)
    batch = stream.share(0)
    return batch.ids.to(device()), batch.labels.to(device())


def flops_per_token(config: RunConfig) -> float:
    """Of training on one token; counted on a model without weights."""
    return without_weights(config.model, config.sink).flops_per_token()


def synthetic(prefix: Path, tokenizer_size: int) -> Path:
    """A token file of random ids, written once."""
    if not prefix.with_suffix(".idx").is_file():
        generator = np.random.default_rng(0)
        with TokenWriter(prefix, tokenizer_size) as writer:
            for _ in range(20):
                writer.add_document(generator.integers(0, tokenizer_size, SYNTHETIC_TOKENS // 20))
    return prefix


# --- what is said about it ----------------------------------------------------------------------------------------


class Report:
    """The figures so far, on the screen and in the file.

    Args:
        out: the JSON file, written anew after each figure.
        lenient: what cannot be measured (a peer that is not installed, too little memory) is noted and passed over.
        minutes: begin nothing more after that many; 0 is no limit.
    """

    def __init__(self, out: Path, lenient: bool, minutes: float) -> None:
        self.out, self.lenient, self.minutes = out, lenient, minutes
        self.started = time.perf_counter()
        self.ceiling = matmul_rate()
        self.figures: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.about = {
            "what": "train",
            **provenance("cuda" if _cuda() else "cpu"),
            "matmul_flops_per_second": self.ceiling,
        }

    def add(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        minutes = (time.perf_counter() - self.started) / 60
        if self.minutes and minutes > self.minutes:
            self.left_out[name] = f"not begun after {self.minutes:g} minutes"
            return
        try:
            figure = measure()
        except (UserError, torch.cuda.OutOfMemoryError) as error:
            if not self.lenient:
                raise
            self.left_out[name] = " ".join(str(error).split())[:300]
            print(f"{name:<34} left out: {self.left_out[name]}", flush=True)
            return
        figure["share_of_matmul_rate"] = round(figure["model_flops_per_second"] / self.ceiling, 4)
        self.figures[name] = figure | {"name": name}
        print(_line(self.figures[name]), flush=True)
        self._write()

    def finish(self) -> dict[str, Any]:
        report = self._write()
        for name, value in report["comparisons"].items():
            print(f"{name}: {value:.4f}")
        for name, reason in self.left_out.items():
            print(f"left out: {name} ({reason})")
        return report

    def _write(self) -> dict[str, Any]:
        report = self.about | {
            "figures": list(self.figures.values()),
            "comparisons": comparisons(self.figures),
            "left_out": self.left_out,
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        write_json(self.out, report)
        return report


def comparisons(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of figures: ours over each peer, the trainer's cost over the bare loop, each mechanism's over vanilla."""
    rates = {name: f["tokens_per_second"] for name, f in figures.items()}
    first = next((r for name, r in rates.items() if name.startswith("ours: ")), None)
    vanilla = rates.get("bare loop: vanilla")
    found = {}
    for name, rate in rates.items():
        if first and name in PEERS:
            found[f"ours over {name}"] = round(first / rate, 4)
        if first and f"ours: {name.removeprefix('bare loop: ')}" in rates and name.startswith("bare"):
            found["cost of Lightning, data and record"] = round(rate / first - 1, 4)
        elif vanilla and name.startswith("bare loop: "):
            found[f"cost of {name.removeprefix('bare loop: ')} over vanilla"] = round(vanilla / rate - 1, 4)
    return found


def _line(figure: dict[str, Any]) -> str:
    start = figure.get("compile_seconds", figure.get("first_flush_seconds"))
    text = (
        f"{figure['name']:<34} {figure['tokens_per_second']:>12,.0f} tokens/s  {figure['milliseconds']:9.2f} ms/step  "
        f"{100 * figure['share_of_matmul_rate']:5.1f} % of a product's rate  "
        f"{figure['peak_memory_bytes'] / 2**30:5.1f} GiB  start {start:.1f} s"
    )
    if "waiting_for_data" in figure:
        text += f"  waiting for data {100 * figure['waiting_for_data']:.2f} %"
    if "where" in figure:
        text += f"\n    GPU busy {100 * figure['where']['busy']:.1f} %; " + ", ".join(
            f"{name} {ms:.1f} ms" for name, ms in figure["where"]["classes"].items()
        )
    return text
