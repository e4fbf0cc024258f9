"""``sinkpretrain bench decode``: figure 10 of StreamingLLM, the time and memory that one more token takes.

Streaming reads each token once over a cache of L; its alternative, a sliding window with re-computation, runs a forward
over the last L tokens for each new one. Both draw their tokens in the same way, both are CUDA graphs on a GPU, and the
weights are random: what they are does not change the time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sinkpretrain.cache import Cache
from sinkpretrain.comparison.paper import FIGURE_10, FIGURE_10_CITATION
from sinkpretrain.config import ModelConfig
from sinkpretrain.decode import Engine, Outbox, Replayed, TokenStream
from sinkpretrain.decoder import Decoder, Rotary, Spec
from sinkpretrain.device import choose_device, choose_dtype, peak_memory
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.files import write_json
from sinkpretrain.language import LanguageModel
from sinkpretrain.model import GPTNeoX
from sinkpretrain.provenance import provenance
from sinkpretrain.sampling import Sampler, Sampling
from sinkpretrain.streaming import stream_nll
from sinkpretrain.timing import free_memory, matmul_rate, product_weights

START = 4
"""Initial positions in every cache, as in the paper's figure."""

FEWEST, LONGEST = 5, 400
"""Tokens measured: as many as fit the time given, within these."""


@dataclass(frozen=True)
class Job:
    """One measurement: a model, a way to produce tokens, the size of the cache."""

    model: str
    strategy: Literal["streaming", "streaming, compiled", "recompute"]
    length: int
    drawing: str = "temperature"

    def __str__(self) -> str:
        return f"{self.model} {self.strategy} {self.length} {self.drawing}"


DRAWINGS = {
    "greedy": Sampling(temperature=0.0),
    "temperature": Sampling(temperature=1.0),
    "top-k 50": Sampling(top_k=50),
    "top-p 0.95": Sampling(top_p=0.95),
    "min-p 0.05": Sampling(min_p=0.05),
    "penalty 1.1": Sampling(repetition_penalty=1.1),
}


def bench_decode(
    out: str = "decode.json",
    models: str = "160m,llama-2-13b,llama-2-7b",
    caches: str = "256,512,1024,2048,4096",
    seconds: float = 1.0,
    minutes: float = 0.0,
    recompute: bool = True,
    compile: bool = True,
    drawings: bool = True,
    profile: bool = False,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, Any]:
    """Milliseconds and memory per token: streaming beside a sliding window with re-computation (the paper's figure 10).

    Args:
        out: JSON file for the figures; the plot goes beside it.
        models: shapes, with random weights: 160m, llama-2-7b, llama-2-13b, toy; separated by commas.
        caches: sizes L of the cache, 4 initial positions and L - 4 recent ones; separated by commas.
        seconds: how long to measure each.
        minutes: what has not begun by then is left out; 0 is no limit.
        recompute: measure the window with re-computation too.
        compile: also measure a compiled step (of the first model, at the cache nearest to 1,024).
        drawings: also measure ways to draw a token (of the same).
        profile: also print which kernels a token's time goes to.
        dtype: of weights and activations; auto is bfloat16 on a GPU and float32 elsewhere.
        device: where to compute.

    Returns:
        What is in the file: figures with device, versions and commit.

    Raises:
        UserError: an unknown model or a cache too small.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    names, lengths = known_names(models, SHAPES, "model"), _lengths(caches)
    plan = [job for job in jobs(names, lengths, compile, drawings) if recompute or job.strategy != "recompute"]
    started = time.monotonic()
    report: dict[str, Any] = {
        "what": "decode",
        **provenance(where),
        "dtype": str(kind).removeprefix("torch."),
        "paper": FIGURE_10_CITATION,
        "difference_to_the_evaluator": check(where),
        "matmul_flops_per_second": matmul_rate(where),
        "figures": [],
        "left_out": [],
    }
    print(
        f"the engine and the evaluator differ by {report['difference_to_the_evaluator']:.1e} nats at most", flush=True
    )
    ceiling = report["matmul_flops_per_second"]
    try:
        held: tuple[str, LanguageModel] | None = None
        for job in plan:
            if minutes and time.monotonic() - started > 60 * minutes:
                report["left_out"].append(str(job))
                continue
            if held is None or held[0] != job.model:
                held = None
                free_memory()
                held = (job.model, build(job.model, where, kind))
            try:
                report["figures"].append(_show(measure(job, held[1], seconds, profile), ceiling))
            except Exception as error:  # a figure that fails must not cost the others
                report["left_out"].append(f"{job}: {type(error).__name__}: {first_line(error)}")
                print(report["left_out"][-1], flush=True)
            write_json(Path(out), report)
    finally:  # of an interrupted run too, what there is
        show(report, Path(out))
    return report


def show(report: dict[str, Any], out: Path) -> None:
    """Plot and table."""
    from sinkpretrain.bench_figures import decode_figure
    from sinkpretrain.figures import save_figure

    if pairs(report):
        save_figure(decode_figure(report), out.with_suffix(".png"))
    print(table(report))


def jobs(models: list[str], lengths: list[int], compiled: bool, drawings: bool) -> list[Job]:
    """What is measured, in the order of importance: whoever stops early has what matters."""
    plan = []
    for model in models:
        for length in sorted(lengths, reverse=model != models[0]):
            plan += [Job(model, "streaming", length), Job(model, "recompute", length)]
    usual = min(lengths, key=lambda length: abs(length - 1024))
    if drawings:
        plan += [Job(models[0], "streaming", usual, d) for d in DRAWINGS if d != "temperature"]
    if compiled:
        plan.append(Job(models[0], "streaming, compiled", usual))
    return plan


def known_names(text: str, known: Collection[str], what: str) -> list[str]:
    """Names separated by commas; raises UserError if there are none, or one is not known."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names or [""] if name not in known]
    if unknown:
        raise UserError(f"unknown {what} {unknown[0]!r}; known: {', '.join(known)}.")
    return names


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > START for part in parts):
        raise UserError(f"--caches {text!r} must be sizes above {START}, for example 256,1024.")
    return [int(part) for part in parts]


# --- models -------------------------------------------------------------------------------------------------------


def _llama(layers: int, width: int, heads: int, hidden: int, vocabulary: int = 32000) -> Spec:
    head_dim = width // heads
    return Spec(
        family="llama",
        n_layer=layers,
        d_model=width,
        n_head=heads,
        n_kv_head=heads,
        head_dim=head_dim,
        d_ff=hidden,
        vocab_size=vocabulary,
        context=4096,
        positions=Rotary(tuple(10000.0 ** (-i / head_dim) for i in range(0, head_dim, 2))),
        windows=(None,) * layers,
        norm="rms",
        norm_eps=1e-5,
        residual="sequential",
        gated=True,
        activation="silu",
        tied=False,
    )


SHAPES: dict[str, Callable[[], LanguageModel]] = {
    "160m": lambda: GPTNeoX(ModelConfig(vocab_size=50304, tokenizer_size=50277), seed=None),
    "llama-2-7b": lambda: Decoder(_llama(32, 4096, 32, 11008)),
    "llama-2-13b": lambda: Decoder(_llama(40, 5120, 40, 13824)),
    "toy": lambda: Decoder(_llama(2, 64, 4, 128, vocabulary=512)),
}


def build(name: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A model of that shape, its weights drawn where they will be used."""
    with torch.device("meta"):
        model = SHAPES[name]()
    assert isinstance(model, nn.Module)
    # Norms keep their ones; everything else is drawn, as small as a trained model's.
    made = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, p in made.named_parameters():
            if p.dim() > 1:
                p.normal_(0.0, 0.02)
            else:
                p.fill_(1.0 if parameter_name.endswith("weight") else 0.0)
    ready: LanguageModel = made.eval().requires_grad_(False)
    return ready


# --- measuring ----------------------------------------------------------------------------------------------------


class Recomputing:
    """Tokens from a fresh forward over the last L tokens each."""

    def __init__(self, model: LanguageModel, sampler: Sampler, ids_L: Tensor) -> None:
        self.model, self.sampler, self.ids_1L = model, sampler, ids_L[None].clone()
        self._drawn_1 = torch.zeros_like(ids_L[:1])
        self._advance = Replayed(self._forward_and_draw, sampler.generator)
        self._outbox = Outbox(ids_L.device)

    def __iter__(self) -> Iterator[int]:
        self._advance()
        while True:
            look = self._outbox.send(self._drawn_1)
            self._advance()
            yield look()

    @torch.inference_mode()
    def _forward_and_draw(self) -> None:
        logits_V = self.model.head(self.model.hidden(self.ids_1L)[0, -1]).float()
        self._drawn_1.copy_(self.sampler(logits_V, self.ids_1L[0]))
        self.ids_1L.copy_(torch.cat((self.ids_1L[:, 1:], self._drawn_1[None]), dim=1))


def measure(job: Job, model: LanguageModel, seconds: float, profile: bool = False) -> dict[str, Any]:
    """One job's figure: tokens are taken as ``generate`` takes them, one by one on the host."""
    device = model.embed.weight.device
    free_memory()
    began = time.perf_counter()
    sampling = DRAWINGS[job.drawing]
    forbidden = torch.arange(model.config.vocab_size, device=device) >= model.config.tokenizer_size
    sampler = Sampler(sampling, forbidden, torch.Generator(device).manual_seed(0))
    ids = torch.randint(0, model.config.tokenizer_size, (job.length + START,), device=device)
    cache_bytes = 0
    tokens: Recomputing | TokenStream
    if job.strategy == "recompute":
        tokens = Recomputing(model, sampler, ids[: job.length])
    else:
        engine = Engine(model, Cache(START, job.length - START), tracks_ids=sampler.reads_cached)
        engine.read(ids.tolist())
        free_memory()  # the peak is that of the tokens to come
        if job.strategy == "streaming, compiled":
            engine.compile()
        tokens, cache_bytes = TokenStream(engine, sampler), engine.rings.memory_bytes()
    endless = iter(tokens)
    times = _times(endless, seconds)
    if profile:
        print(kernels(endless, device), flush=True)
    return {
        "model": job.model,
        "strategy": job.strategy,
        "cache": f"{START}+{job.length - START}",
        "length": job.length,
        "drawing": job.drawing,
        "milliseconds": round(1000 * sum(times) / len(times), 4),
        "tokens": len(times),
        "first_token_seconds": round(time.perf_counter() - began - sum(times), 2),
        "peak_memory_bytes": peak_memory(device),
        "cache_bytes": cache_bytes,
        "parameters": model.n_parameters(),
        "flops_per_token": flops_per_token(model, job.length if job.strategy == "recompute" else 1),
    }


def flops_per_token(model: LanguageModel, positions: int) -> float:
    """Floating-point operations of the products for one token drawn, attention's not counted: a forward over so many
    positions, of which the last one alone has logits."""
    assert isinstance(model, nn.Module)
    head = model.head.weight.numel()
    return 2.0 * ((product_weights(model) - head) * positions + head)


def _times(tokens: Iterator[int], seconds: float) -> list[float]:
    """Seconds per token once the graph is captured; the sum is what a reader waits for."""
    for _ in range(2 * FEWEST):  # more than Replayed runs before it captures
        next(tokens)
    times: list[float] = []
    clock = time.perf_counter()
    while len(times) < FEWEST or (sum(times) < seconds and len(times) < LONGEST):
        next(tokens)
        now = time.perf_counter()
        times.append(now - clock)
        clock = now
    return times


def kernels(tokens: Iterator[int], device: torch.device, count: int = 20) -> str:
    """What the time of ``count`` tokens went to, by kernel (by operation on a CPU)."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=kinds) as seen:
        for _ in range(count):
            next(tokens)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=70))


def check(device: torch.device) -> float:
    """Largest difference, in nats, between the engine's losses and the evaluator's on this device, in fp32.

    A wrong figure is worse than none: more than 1e-3 raises.
    """
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, d_model=128, n_head=2, vocab_size=128, tokenizer_size=100, context=64)
    model = GPTNeoX(config, seed=0).eval().requires_grad_(False).to(device)
    ids = torch.randint(0, 100, (150,))
    cache = Cache(START, 40)
    want = torch.from_numpy(stream_nll(model, ids.numpy(), cache))
    engine = Engine(model, cache, block=16)
    got = torch.stack([-engine.step(int(a)).log_softmax(-1)[b] for a, b in itertools.pairwise(ids)]).cpu()
    difference = float((got - want).abs().max())
    assert difference < 1e-3, f"the engine differs from the evaluator by {difference} nats"
    return difference


# --- showing ------------------------------------------------------------------------------------------------------


def _show(figure: dict[str, Any], ceiling: float) -> dict[str, Any]:
    rate = figure["flops_per_token"] / (figure["milliseconds"] / 1000)
    figure["share_of_matmul_rate"] = round(rate / ceiling, 4)
    print(
        f"{figure['model']:<12} {figure['strategy']:<20} {figure['cache']:>7}  {figure['drawing']:<12} "
        f"{figure['milliseconds']:>9.3f} ms/token  {figure['peak_memory_bytes'] / 2**30:6.2f} GiB  "
        f"{100 * figure['share_of_matmul_rate']:5.1f} % of a product's rate  "
        f"first token {figure['first_token_seconds']:.1f} s",
        flush=True,
    )
    return figure


def table(report: dict[str, Any]) -> str:
    """Figure 10 as a table in Markdown, the paper's numbers beside ours."""
    lines = [
        f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}, commit {report['commit']}",
        "",
        "| model | cache | recompute ms | streaming ms | ratio | paper's ms | paper's ratio | memory GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, length, found in pairs(report):
        again, stream = found.get("recompute"), found.get("streaming")
        paper = FIGURE_10.get(model, {}).get(length)
        ratio = f"{again['milliseconds'] / stream['milliseconds']:.1f}x" if again and stream else ""
        lines.append(
            f"| {model} | {length} | {_ms(again)} | {_ms(stream)} | {ratio} | "
            + (f"{paper[0]} / {paper[1]} | {paper[0] / paper[1]:.1f}x | " if paper else " | | ")
            + " / ".join(f"{f['peak_memory_bytes'] / 2**30:.1f}" for f in (again, stream) if f)
            + " |"
        )
    others = [f for f in report["figures"] if f["strategy"] == "streaming, compiled" or f["drawing"] != "temperature"]
    lines += [f"\n{f['model']}, {f['cache']}, {f['strategy']}, {f['drawing']}: {_ms(f)} ms" for f in others]
    lines += [f"\nleft out: {job}" for job in report["left_out"]]
    return "\n".join(lines)


def _ms(figure: dict[str, Any] | None) -> str:
    return "" if figure is None else f"{figure['milliseconds']:.3g}"


def pairs(report: dict[str, Any]) -> list[tuple[str, int, dict[str, dict[str, Any]]]]:
    """(model, length, figure by strategy), drawn at a temperature of 1, by model and size."""
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for figure in report["figures"]:
        if figure["drawing"] == "temperature":
            found.setdefault((figure["model"], figure["length"]), {})[figure["strategy"]] = figure
    order = list(SHAPES)
    return [
        (model, length, figures)
        for (model, length), figures in sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]
