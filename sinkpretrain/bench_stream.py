"""``sinkpretrain bench stream``: how fast a text is streamed, beside the loops that it replaces, in one run.

Random weights and tokens: what they are does not change the time. Stages come in the order of their importance; each
figure is printed and written at once, so that a run that ends early has what it got to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sinkpretrain.band import FOLD, KERNELS, Kernel, masked
from sinkpretrain.bench_decode import SHAPES, build
from sinkpretrain.cache import Cache
from sinkpretrain.device import choose_device, peak_memory
from sinkpretrain.errors import UserError
from sinkpretrain.files import write_json
from sinkpretrain.language import LanguageModel
from sinkpretrain.provenance import provenance
from sinkpretrain.scoring import BlockSize, Losses, token_nll
from sinkpretrain.streaming import stream_nll, token_loop_nll
from sinkpretrain.timing import matmul_rate, start_clean

TRIAL = 0.125
"""Share of the tokens over which kernels and block sizes compete."""

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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> dict[str, Any]:
    """Tokens per second of streaming, beside the token loop, the reference's loop, and a plain dense forward.

    Args:
        out: JSON file for the figures.
        models: shapes, with random weights: 160m, llama-2-7b, llama-2-13b, toy; separated by commas.
        cache: initial and recent positions, x+y.
        tokens: length of the text; by default 4,194,304 for the first model on a GPU, 262,144 for the others, 8,192 on
            a CPU.
        kernels: of the band, to compete: masked, folded, flash, flex; by default those that suit the device.
        blocks: tokens per forward, to compete; separated by commas.
        loop: tokens of the loops that are measured, once their cache is full.
        dtype: of weights and activations; auto is bfloat16 on a GPU and float32 elsewhere.
        device: where to compute.

    Returns:
        What is in the file: figures with device, versions and commit.

    Raises:
        UserError: an unknown model or kernel, or a cache that is none.
    """
    where = choose_device(device)
    gpu = where.type == "cuda"
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.bfloat16 if gpu else torch.float32)
    names = _known(models, SHAPES, "model")
    competing = _known(kernels or ("flash,flex" if gpu else "folded"), KERNELS, "kernel")
    sizes = [int(b) for b in (blocks or ("16384,32768,8192" if gpu else "1024,2048")).split(",")]
    bench = Bench(
        Path(out),
        where,
        kind,
        Cache.parse(cache),
        {
            "what": "stream",
            **provenance(where),
            "dtype": str(kind).removeprefix("torch."),
            "cache": cache,
            "matmul_flops_per_second": matmul_rate(),
            "figures": [],
            "failed": [],
        },
    )
    for name in competing:
        bench.attempt(f"{name} against the definition", partial(bench.check, name))
    for number, name in enumerate(names):
        length = tokens or ((4 << 20 if number == 0 else 1 << 18) if gpu else 8192)
        bench.measure_model(name, length, competing, sizes, loop)
    return bench.report


@dataclass
class Bench:
    """Where figures go, and what all of them have in common."""

    out: Path
    device: torch.device
    dtype: torch.dtype
    cache: Cache
    report: dict[str, Any] = field(default_factory=dict)

    def attempt(self, title: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A figure, printed and written; one that fails is written as such and does not cost the others."""
        started = time.perf_counter()
        try:
            figure = {"name": title, **measure(), "wall_seconds": round(time.perf_counter() - started, 1)}
            self.report["figures"].append(figure)
            print(
                "  ".join(f"{k}: {v:,}" if isinstance(v, int | float) else str(v) for k, v in figure.items()),
                flush=True,
            )
        except Exception as error:
            figure = {}
            self.report["failed"].append(f"{title}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            print(self.report["failed"][-1], flush=True)
        write_json(self.out, self.report)
        return figure

    def check(self, name: str) -> dict[str, Any]:
        """The largest difference of a kernel to the definition in fp32, on the model's dtype and device."""
        torch.manual_seed(0)
        T, S, reach = 4 * FOLD + 13, 12 * FOLD + 5, 8 * FOLD - 3
        q, k, v = (torch.randn(1, h, n, 64, device=self.device).to(self.dtype) for h, n in ((4, T), (2, S), (2, S)))
        out, lse = KERNELS[name](2 * q, k, v, reach, None)
        want, want_lse = masked(2 * q.float(), k.float(), v.float(), reach, None)
        return {
            "largest_difference": float((out.float() - want).abs().max()),
            "of_logsumexp": float((lse - want_lse).abs().max()),
        }

    def measure_model(self, name: str, tokens: int, kernels: list[str], blocks: list[int], loop: int) -> None:
        """All figures of one model, the important ones first."""
        start_clean()
        model = build(name, self.device, self.dtype)
        ids = np.random.default_rng(0).integers(0, model.config.tokenizer_size, tokens)
        trials: list[tuple[float, str, int]] = []
        trial = max(self.cache.size + 2, int(tokens * TRIAL))
        for kernel in kernels:
            for block in blocks if kernel == kernels[0] else blocks[:1]:
                figure = self.attempt(
                    f"{name} streaming, trial: {kernel}, block {block}",
                    partial(self.stream, model, ids[:trial], KERNELS[kernel], block),
                )
                trials.append((figure.get("tokens_per_second", 0.0), kernel, block))
        _, kernel, block = max(trials)
        whole = self.attempt(
            f"{name} streaming: {kernel}, block {block}", lambda: self.stream(model, ids, KERNELS[kernel], block)
        )
        # The ratios are to what stands in the same report.
        speed = whole.get("tokens_per_second", 0.0)
        if name != "160m":
            self.attempt(f"{name} dense forward, context {DENSE}", lambda: self.dense(model, ids, speed))
            longer = Cache(self.cache.start, DENSE - self.cache.start)
            self.attempt(f"{name} streaming {longer}", lambda: self.stream(model, ids, KERNELS[kernel], block, longer))
        self.attempt(f"{name} token loop", lambda: self.token_loop(model, ids, loop, speed))
        if tokens > 1 << 16:
            self.attempt(
                f"{name} streaming, 65,536 tokens", lambda: self.stream(model, ids[: 1 << 16], KERNELS[kernel], block)
            )
        if name == "160m":
            self.attempt(f"{name} reference's loop (transformers)", lambda: self.reference_loop(loop, speed))

    def stream(
        self, model: LanguageModel, ids: Any, kernel: Kernel, block: int, cache: Cache | None = None
    ) -> dict[str, Any]:
        """``stream_nll`` over a text, once for compiling and once for the clock."""
        cache = cache or self.cache

        def once(text: Any) -> Losses:
            return stream_nll(model, text, cache, block=BlockSize(block), kernel=kernel)

        once(ids[: min(len(ids), 2 * max(block, cache.size) + 7)])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        nll = once(ids)
        seconds = time.perf_counter() - started
        return {
            "tokens": len(ids),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(ids) / seconds, 1),
            "peak_memory_bytes": peak_memory(self.device),
            "mean_nll": round(float(nll.mean(dtype=np.float64)), 5),
        }

    @torch.inference_mode()
    def dense(self, model: LanguageModel, ids: Any, speed: float) -> dict[str, Any]:
        """A plain forward over samples of ``DENSE`` tokens, scored in the same way."""
        batch = 8 if self.device.type == "cuda" else 1
        tokens = torch.from_numpy(ids[: batch * DENSE].reshape(batch, DENSE)).to(self.device)

        def once() -> Tensor:
            return token_nll(model, model.hidden(tokens).flatten(0, 1), tokens.flatten())

        once()
        started = time.perf_counter()
        for _ in range(5):
            losses = once()
        losses.cpu()
        rate = 5 * tokens.numel() / (time.perf_counter() - started)
        return {"tokens_per_second": round(rate, 1), "streaming_over_dense": round(speed / rate, 3)}

    def token_loop(self, model: LanguageModel, ids: Any, count: int, speed: float) -> dict[str, Any]:
        """``--strategy token-loop`` once its cache is full."""
        size = self.cache.size
        clock: list[float] = []

        def tick(done: int) -> None:
            if done in (size, size + count):
                clock.append(time.perf_counter())

        token_loop_nll(model, ids[: size + count + 2], self.cache, advance=tick)
        return _ratio(count, clock[1] - clock[0], speed)

    @torch.inference_mode()
    def reference_loop(self, count: int, speed: float) -> dict[str, Any]:
        """The loop as the reference writes it: a token through transformers' model, the cache cut and concatenated.

        Without its re-rotation of the cache in every step, which would need the model to be patched: a lower bound.
        """
        from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

        net = GPTNeoXForCausalLM(GPTNeoXConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=50304,
        )).to(self.device, self.dtype).eval()  # fmt: skip
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


def _known(text: str, known: Any, what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(f"unknown {what} {unknown[0] if unknown else ''!r}; known: {', '.join(known)}.")
    return names
