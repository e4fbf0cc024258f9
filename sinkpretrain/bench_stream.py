"""``sinkpretrain bench stream``: how fast a text is streamed, beside the loops that it replaces, in one run.

Random weights and tokens: what they are does not change the time. Stages come in the order of their importance; each
figure is printed and written at once, so that a run that ends early has what it got to.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sinkpretrain import sinks
from sinkpretrain.attention import grouped_attention, rotate
from sinkpretrain.band import FOLD, KERNELS, Kernel, masked
from sinkpretrain.bench_decode import SHAPES, build, known_names
from sinkpretrain.cache import Cache
from sinkpretrain.device import choose_device, choose_dtype, peak_memory
from sinkpretrain.errors import UserError, first_line
from sinkpretrain.files import write_json
from sinkpretrain.language import LanguageModel
from sinkpretrain.ops import can_compile, compiled
from sinkpretrain.provenance import provenance
from sinkpretrain.scoring import BlockSize, Losses, token_nll
from sinkpretrain.streaming import stream_nll, token_loop_nll
from sinkpretrain.timing import matmul_rate, product_weights, start_clean

SEVERAL = (0, 1, 2, 4)
"""Initial positions of the settings that are taken together, as in table 3 of StreamingLLM."""

DENSE = 2048
"""Context of the plain forward that streaming is compared with."""


def bench_stream(
    out: str = "stream.json",
    models: str = "160m,llama-2-7b",
    cache: str = "4+1020",
    tokens: int = 0,
    kernels: str = "",
    blocks: str = "",
    loop: int = 200,
    seconds: float = 0.0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, Any]:
    """Tokens per second of streaming, beside the token loop, the reference's loop, and a plain dense forward.

    Args:
        out: JSON file for the figures.
        models: shapes, with random weights: 160m, llama-2-7b, llama-2-13b, toy; separated by commas.
        cache: initial and recent positions, x+y.
        tokens: length of the text; by default 4,194,304 for the first model on a GPU, 131,072 for the others, 8,192 on
            a CPU.
        kernels: of the band: masked, folded, flash, flex; separated by commas. The first one that works is used, the
            others are measured behind everything else. By default those that suit the device.
        blocks: tokens per forward; the first is used, the others are measured likewise.
        loop: tokens of the loops that are measured, once their cache is full.
        seconds: what has not begun by then is left out; 0 is no limit.
        dtype: of weights and activations; auto is bfloat16 on a GPU and float32 elsewhere.
        device: where to compute.

    Returns:
        What is in the file: figures with device, versions and commit.

    Raises:
        UserError: an unknown model or kernel, a cache or block that is none, or a text too short for the loop.
    """
    where = choose_device(device)
    gpu = where.type == "cuda"
    kind = choose_dtype(dtype, where)
    names = known_names(models, SHAPES, "model")
    competing = known_names(kernels or ("flash,flex" if gpu else "folded"), KERNELS, "kernel")
    sizes = _sizes(blocks or ("16384,32768,8192" if gpu else "1024,2048"))
    kept = Cache.parse(cache)
    if loop < 1 or 0 < tokens < kept.size + loop + 2:
        raise UserError(
            f"--tokens must be above the cache and the --loop of at least 1: {kept.size + max(1, loop) + 2:,}."
        )
    report = {
        "what": "stream",
        **provenance(where),
        "dtype": str(kind).removeprefix("torch."),
        "cache": cache,
        "matmul_flops_per_second": matmul_rate(where),
        "figures": [],
        "failed": [],
        "left_out": [],
    }
    bench = Bench(Path(out), where, kind, kept, report, loop, time.monotonic() + (seconds or math.inf))
    exact = [k for k in competing[:1] if bench.attempt(f"{k} against the definition", partial(bench.check, k))]
    kernel = exact[0] if exact else competing[-1]
    lengths = [tokens or ((4 << 20 if n == 0 else 1 << 17) if gpu else 8192) for n in range(len(names))]
    for name, length in zip(names, lengths, strict=True):
        bench.first_figures(name, length, kernel, sizes[0])
    for name, length in zip(names[:1], lengths, strict=False):
        bench.other_figures(name, length, kernel, sizes, competing)
    return report


@dataclass
class Bench:
    """Where figures go, and what all of them have in common."""

    out: Path
    device: torch.device
    dtype: torch.dtype
    cache: Cache
    report: dict[str, Any]
    loop: int
    deadline: float

    def attempt(self, title: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A figure, printed and written; one that fails is written as such and does not cost the others."""
        started = time.perf_counter()
        figure: dict[str, Any] = {}
        if time.monotonic() > self.deadline:
            self.report["left_out"].append(title)
            print(f"{title}: left out, the time is up", flush=True)
            write_json(self.out, self.report)
            return figure
        try:
            figure = {"name": title, **measure(), "wall_seconds": round(time.perf_counter() - started, 1)}
            self.report["figures"].append(figure)
            print(
                "  ".join(f"{k}: {v:,}" if isinstance(v, int | float) else str(v) for k, v in figure.items()),
                flush=True,
            )
        except Exception as error:
            self.report["failed"].append(f"{title}: {type(error).__name__}: {first_line(error)}")
            print(self.report["failed"][-1], flush=True)
        write_json(self.out, self.report)
        return figure

    @torch.inference_mode()
    def check(self, name: str) -> dict[str, Any]:
        """A kernel's largest difference to the definition in fp32, on the model's dtype and device, all head sizes."""
        torch.manual_seed(0)
        T, S, reach = 4 * FOLD + 13, 12 * FOLD + 5, 8 * FOLD - 3
        worst: dict[str, Any] = {"largest_difference": 0.0, "of_logsumexp": 0.0}
        for heads, dim in ((4, 64), (2, 64), (2, 128)):
            q, k, v = (torch.randn(1, h, n, dim, device=self.device).to(self.dtype)
                       for h, n in ((4, T), (heads, S), (heads, S)))  # fmt: skip
            out, lse = KERNELS[name](2 * q, k, v, reach, None)
            want, want_lse = masked(2 * q.float(), k.float(), v.float(), reach, None)
            found = {
                "largest_difference": (out.float() - want).abs().max(),
                "of_logsumexp": (lse - want_lse).abs().max(),
            }
            worst = {key: max(worst[key], float(value)) for key, value in found.items()}
        # bf16 rounds a value near 4 by 0.016, and the weights on it likewise.
        if not max(worst.values()) < (0.05 if self.dtype == torch.bfloat16 else 1e-4):
            raise ValueError(f"differs by {worst}")
        return worst

    def first_figures(self, name: str, tokens: int, kernel: str, block: int) -> None:
        """What matters most about one model."""
        start_clean()
        model, ids = build(name, self.device, self.dtype), self.text(name, tokens)
        once = partial(self.stream, model, kernel=KERNELS[kernel], block=block)
        whole = self.attempt(f"{name} streaming: {kernel}, block {block}", lambda: once(ids))
        # The ratios are to what stands in the same report.
        speed = whole.get("tokens_per_second", 0.0)
        if tokens > 1 << 16:
            self.attempt(f"{name} streaming, 65,536 tokens", lambda: once(ids[: 1 << 16]))
        if name != "160m":
            self.attempt(f"{name} dense forward, context {DENSE}", lambda: self.dense(model, ids, speed))
            longer = Cache(self.cache.start, DENSE - self.cache.start)
            self.attempt(f"{name} streaming {longer}", lambda: once(ids, cache=longer))
        self.attempt(f"{name} token loop", lambda: self.token_loop(model, ids, speed))
        if name == "160m":
            self.attempt(f"{name} reference's loop (transformers)", lambda: self.reference_loop(speed))

    def other_figures(self, name: str, tokens: int, kernel: str, blocks: list[int], kernels: list[str]) -> None:
        """Several settings of one text, other block sizes, other kernels."""
        start_clean()
        model, ids = build(name, self.device, self.dtype), self.text(name, tokens)
        self.attempt(
            f"{name} streaming, one text at {len(SEVERAL)} settings",
            lambda: self.several(model, ids[: max(8192, tokens // 4)], KERNELS[kernel], blocks[0]),
        )
        for block in blocks[1:]:
            self.attempt(
                f"{name} streaming: {kernel}, block {block}",
                partial(self.stream, model, ids, KERNELS[kernel], block),
            )
        for other in kernels:
            if other != kernel and self.attempt(f"{other} against the definition", partial(self.check, other)):
                part = ids[: max(8192, tokens // 8)]
                self.attempt(
                    f"{name} streaming: {other}, block {blocks[0]}",
                    partial(self.stream, model, part, KERNELS[other], blocks[0]),
                )

    def text(self, name: str, tokens: int) -> Any:
        """Random ids of a model's vocabulary."""
        with torch.device("meta"):
            size = SHAPES[name]().config.tokenizer_size
        return np.random.default_rng(0).integers(0, size, tokens)

    def stream(
        self, model: LanguageModel, ids: Any, kernel: Kernel, block: int, cache: Cache | None = None
    ) -> dict[str, Any]:
        """``stream_nll`` over a text, once for compiling and once for the clock."""
        cache = cache or self.cache

        def once(text: Any) -> Losses:
            return stream_nll(model, text, cache, block=BlockSize(block), kernel=kernel)

        begun = time.perf_counter()
        once(ids[: min(len(ids), 2 * max(block, cache.size) + 7)])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started, busy = time.perf_counter(), time.process_time()
        nll = once(ids)
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        rate = len(ids) / seconds
        return {
            "tokens": len(ids),
            "seconds": round(seconds, 3),
            "cpu_seconds": round(busy, 3),
            "tokens_per_second": round(rate, 1),
            "model_flops_per_second": round(rate * flops_per_token(model, cache)),
            "first_seconds": round(started - begun, 1),
            "peak_memory_bytes": peak_memory(self.device),
            "mean_nll": round(float(nll.mean(dtype=np.float64)), 5),
        }

    def several(self, model: LanguageModel, ids: Any, kernel: Kernel, block: int) -> dict[str, Any]:
        """The settings of the paper's table 3 one after the other, as ``stream`` runs them: compiled code is shared."""
        found = {}
        for x in SEVERAL:
            cache = Cache(x, self.cache.size - x)
            started = time.perf_counter()
            stream_nll(model, ids, cache, block=BlockSize(block), kernel=kernel)
            found[f"seconds_{cache}"] = round(time.perf_counter() - started, 3)
        return {"tokens": len(ids), **found}

    @torch.inference_mode()
    def dense(self, model: LanguageModel, ids: Any, speed: float) -> dict[str, Any]:
        """A plain forward over samples of ``DENSE`` tokens, scored in the same way, its rotation fused as ours is."""
        batch = 8 if self.device.type == "cuda" else 1
        tokens = torch.from_numpy(ids[: batch * DENSE].reshape(batch, -1)).to(self.device)
        cos, sin = model.rope(torch.arange(tokens.shape[1], device=self.device))
        turn = compiled(rotate) if can_compile(self.device) else rotate

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            return grouped_attention(turn(q, cos, sin), turn(k, cos, sin), v, None)

        def once() -> Tensor:
            return token_nll(model, model.hidden(tokens, attend).flatten(0, 1), tokens.flatten())

        repeats = 5 if self.device.type == "cuda" else 1
        once().cpu()
        started = time.perf_counter()
        for _ in range(repeats):
            losses = once()
        losses.cpu()
        rate = repeats * tokens.numel() / (time.perf_counter() - started)
        return {"tokens_per_second": round(rate, 1), "streaming_over_dense": round(speed / rate, 3)}

    def token_loop(self, model: LanguageModel, ids: Any, speed: float) -> dict[str, Any]:
        """``--strategy token-loop`` once its cache is full."""
        size, count = self.cache.size, self.loop
        clock: list[tuple[float, float]] = []

        def tick(done: int) -> None:
            if done in (size, size + count):
                clock.append((time.perf_counter(), time.process_time()))

        token_loop_nll(model, ids[: size + count + 2], self.cache, advance=tick)
        (begun, idle), (ended, busy) = clock
        return _ratio(count, ended - begun, speed) | {"cpu_seconds": round(busy - idle, 3)}

    @torch.inference_mode()
    def reference_loop(self, speed: float) -> dict[str, Any]:
        """The loop as the reference writes it: a token through transformers' model, the cache cut and concatenated.

        Without its re-rotation of the cache in every step, which would need the model to be patched: a lower bound.
        """
        from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

        count = self.loop
        config = GPTNeoXConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=50304,
        )  # fmt: skip
        with self.device:
            net = GPTNeoXForCausalLM(config).to(self.dtype).eval()
        ids = torch.randint(50304, (1, self.cache.size + count + 1), device=self.device)
        past = DynamicCache(config=net.config)
        net(ids[:, : self.cache.size], past_key_values=past, use_cache=True, logits_to_keep=1)
        place = torch.tensor([[self.cache.size]], device=self.device)
        started = 0.0
        for step in range(count + 1):
            if step == 1:
                started = time.perf_counter()
            token = ids[:, self.cache.size + step, None]
            logits = net(token, past_key_values=past, use_cache=True, position_ids=place).logits[0].float()
            float(nn.functional.cross_entropy(logits, token[0]))
            evict(past, self.cache)
        return _ratio(count, time.perf_counter() - started, speed)


def flops_per_token(model: LanguageModel, cache: Cache) -> float:
    """Floating-point operations of streaming one token: 2 per weight of a matrix product, and x + y + 1 keys."""
    assert isinstance(model, nn.Module)
    c = model.config
    return 2.0 * product_weights(model) + 4.0 * c.n_layer * c.n_head * c.head_dim * (cache.size + 1)


def evict(past: Any, cache: Cache) -> None:
    """Cut a cache of transformers down to x + y tokens, as the reference evaluator does: by concatenation."""
    surplus = past.get_seq_length() - cache.size
    if surplus <= 0:
        return
    for layer in past.layers:
        for part in ("keys", "values"):
            x = getattr(layer, part)
            setattr(layer, part, torch.cat((x[:, :, : cache.start], x[:, :, cache.start + surplus :]), dim=2))


def _ratio(count: int, seconds: float, speed: float) -> dict[str, Any]:
    rate = count / seconds
    return {
        "tokens": count,
        "tokens_per_second": round(rate, 2),
        "milliseconds_per_token": round(1000 / rate, 3),
        "streaming_over_this": round(speed / rate, 1),
    }


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--blocks {text!r} must be numbers of tokens, for example 1024,2048.")
    return [int(part) for part in parts]
