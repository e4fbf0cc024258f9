"""``sinkpretrain bench train``: how fast training is, measured as a user would meet it, with peers in the same run."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkpretrain import hf, metrics
from sinkpretrain.config import LogConfig, RunConfig, load_yaml, recipe_path, sink_recipe
from sinkpretrain.data import Samples, Stream, open_data, training_order
from sinkpretrain.errors import UserError
from sinkpretrain.files import write_json
from sinkpretrain.lit import PretrainModule
from sinkpretrain.model import GPTNeoX
from sinkpretrain.provenance import provenance
from sinkpretrain.tokens import TokenWriter
from sinkpretrain.train import resolve, train

FLUSH = 5
"""Steps between two readings of the clock; reading it waits for the GPU."""

SYNTHETIC_TOKENS = 20_000_000


def bench(
    out: str,
    model: str = "pythia-160m",
    sinks: str = "vanilla",
    context: int = 2048,
    micro_batch: int = 32,
    steps: int = 40,
    compile: bool = True,
    fused: bool = True,
    bare: bool = False,
    peers: str = "",
) -> dict[str, Any]:
    """Tokens per second of training, through the real trainer and data path, on random tokens.

    Args:
        out: JSON file for the figures.
        model: recipe of the model.
        sinks: recipes of sink mechanisms, separated by commas.
        context: tokens per sample.
        micro_batch: samples per optimizer step, in one pass on one device.
        steps: optimizer steps; the first third is warm-up.
        compile: run the model through torch.compile.
        fused: use the fused kernels.
        bare: also run the same step without Lightning, data and logging.
        peers: other implementations of the same model to run beside it, separated by commas: hf, hf-compiled,
            litgpt-compiled.

    Returns:
        What is in the file: figures with device, versions and commit.

    Raises:
        UserError: an unknown peer or recipe, or a peer that is not installed.
    """
    wanted = [p for p in peers.split(",") if p]
    for peer in wanted:
        if peer not in PEERS:
            raise UserError(f"unknown peer {peer!r}; known: {', '.join(PEERS)}.")
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {"what": "train", **provenance("cuda" if cuda else "cpu"), "figures": []}
    report["matmul_flops_per_second"] = ceiling = matmul_rate()
    with tempfile.TemporaryDirectory() as folder:
        base = load_yaml(RunConfig, recipe_path(model))
        ids = synthetic(Path(folder) / "tokens", base.model.tokenizer_size)
        base = dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, context=context),
            data=dataclasses.replace(base.data, path=str(ids), batch_size=micro_batch),
            training=dataclasses.replace(
                base.training,
                steps=steps,
                micro_batch=micro_batch,
                devices=1,
                compile=compile,
                fused=fused,
                precision="bf16-mixed" if cuda else "32-true",
            ),
            # Nothing but training and its record; weights are kept at the start and end, outside the clock.
            log=LogConfig(
                every=FLUSH, validate_every=0, probe_every=0, checkpoint_every=0, weights_every=0, progress=False
            ),
        )
        for sink in sinks.split(","):
            config = dataclasses.replace(base, out=f"{folder}/{sink}", sink=sink_recipe(sink), name=sink)
            report["figures"].append(_show(ours(config), ceiling))
            if bare:
                report["figures"].append(_show(bare_loop(config), ceiling))
        for peer in wanted:
            report["figures"].append(_show(peer_loop(peer, base), ceiling))
    write_json(Path(out), report)
    return report


def _show(figure: dict[str, Any], ceiling: float) -> dict[str, Any]:
    figure["share_of_matmul_rate"] = round(figure["model_flops_per_second"] / ceiling, 4)
    print(
        f"{figure['name']:<28} {figure['tokens_per_second']:>12,.0f} tokens/s  {figure['milliseconds']:8.2f} ms/step  "
        f"{100 * figure['share_of_matmul_rate']:5.1f} % of a bf16 product  "
        f"{figure['peak_memory_bytes'] / 2**30:5.1f} GiB  first step {figure['first_step_seconds']:.1f} s",
        flush=True,
    )
    return figure


# --- ours ---------------------------------------------------------------------------------------------------------


def ours(config: RunConfig) -> dict[str, Any]:
    """``sinkpretrain train`` itself; the rate is the median over flushes of its own record."""
    _clean()
    started = time.perf_counter()
    first: list[float] = []
    flush = PretrainModule._flush

    def noting(self: PretrainModule) -> None:
        flush(self)
        first.append(time.perf_counter())

    PretrainModule._flush = noting  # type: ignore[method-assign]
    try:
        train(config)
    finally:
        PretrainModule._flush = flush  # type: ignore[method-assign]
    rates = [line["tokens_per_second"] for line in metrics.read(Path(config.out)) if "tokens_per_second" in line]
    kept = rates[len(rates) // 3 :]
    rate = statistics.median(kept)
    flops = _flops(resolve(config, open_data(config.data)))
    tokens = config.data.batch_size * config.model.context
    return _figure(f"ours: {config.name}", rate, tokens, flops, first[0] - started, spread=max(kept) / min(kept) - 1)


def bare_loop(config: RunConfig) -> dict[str, Any]:
    """The same module's loss, optimizer and clipping in a loop of its own, on one batch that never changes."""
    _clean()
    config = resolve(config, open_data(config.data))
    module = PretrainModule(config).to(_device())
    optimizer = module.configure_optimizers()
    ids, labels = _one_batch(config, module.model.prefix_ids)
    rate, first = _loop(lambda: module.loss(ids, labels), module.model, optimizer, ids.numel(), config.training.steps)
    return _figure(f"bare loop: {config.name}", rate, ids.numel(), module.model.flops_per_token(), first)


# --- peers --------------------------------------------------------------------------------------------------------


def peer_loop(peer: str, config: RunConfig) -> dict[str, Any]:
    """Another implementation of the same model in a bare loop: same tokens, precision, optimizer and clipping."""
    _clean()
    config = resolve(config, open_data(config.data))
    net, loss = PEERS[peer](config)
    net.to(_device())
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids, labels = _one_batch(config, ())
    rate, first = _loop(lambda: loss(ids, labels), net, optimizer, ids.numel(), config.training.steps)
    return _figure(peer, rate, ids.numel(), _flops(config), first)


def _transformers(config: RunConfig, compiled: bool) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    net = GPTNeoXForCausalLM(GPTNeoXConfig(**hf.hf_config(config.model), attn_implementation="sdpa"))

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(ids, use_cache=False).logits.float().flatten(0, 1), labels.flatten())

    return net, torch.compile(loss) if compiled else loss


def _litgpt(config: RunConfig) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """litgpt's own model; its loss, like its pretraining script's, is taken on bf16 logits."""
    try:
        from litgpt import GPT, Config  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"the peer litgpt cannot be imported ({error}); `pip install --no-deps litgpt psutil` adds it, since its "
            "pins exclude our versions."
        ) from error
    m = config.model
    settings = Config.from_name(
        "pythia-160m",
        n_layer=m.n_layer,
        n_head=m.n_head,
        n_embd=m.d_model,
        intermediate_size=m.d_ff,
        block_size=m.context,
        padded_vocab_size=m.vocab_size,
    )
    net = GPT(settings)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(ids).flatten(0, 1), labels.flatten())

    return net, torch.compile(loss)


PEERS: dict[str, Callable[[RunConfig], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]]] = {
    "hf": lambda config: _transformers(config, compiled=False),
    "hf-compiled": lambda config: _transformers(config, compiled=True),
    "litgpt-compiled": _litgpt,
}


# --- measuring ----------------------------------------------------------------------------------------------------


def _loop(
    loss: Callable[[], Tensor], net: nn.Module, optimizer: torch.optim.Optimizer, tokens: int, steps: int
) -> tuple[float, float]:
    """(tokens per second, seconds of the first step) of a plain training loop; the median over groups of steps."""
    device = next(net.parameters()).device
    times: list[float] = []
    started = clock = time.perf_counter()
    first = 0.0
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        if step == 0:
            value.item()
            first = time.perf_counter() - started
        if step % FLUSH == FLUSH - 1:
            value.item()
            times.append(time.perf_counter() - clock)
            clock = time.perf_counter()
    return tokens * FLUSH / statistics.median(times[len(times) // 3 :]), first


def _figure(
    name: str, rate: float, tokens: int, flops: float, first: float, spread: float | None = None
) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "name": name,
        "tokens_per_second": round(rate, 1),
        "milliseconds": round(1000 * tokens / rate, 3),
        "tokens_per_step": tokens,
        "model_flops_per_second": rate * flops,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "first_step_seconds": round(first, 2),
        "spread": None if spread is None else round(spread, 4),
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _one_batch(config: RunConfig, prefix: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and labels of the first step, on the device."""
    samples = Samples(open_data(config.data).train, config.model, prefix)
    batch = next(iter(Stream(samples, training_order(config.data, samples), config.training.micro_batch)))
    return batch.ids.to(_device()), batch.labels.to(_device())


def _flops(config: RunConfig) -> float:
    """Of training on one token; counted on a model without weights."""
    with torch.device("meta"):
        return GPTNeoX(config.model, config.sink, seed=None).flops_per_token()


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations per second of a large bf16 product (fp32 and smaller on a CPU), on random data."""
    cuda = torch.cuda.is_available()
    n, dtype = (size, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(n, n, device="cuda" if cuda else "cpu", dtype=dtype) for _ in range(2))
    times = []
    for _ in range(12):
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / 5)
    return 2 * n**3 / statistics.median(times[3:])


def synthetic(prefix: Path, tokenizer_size: int) -> Path:
    """A token file of random ids."""
    generator = np.random.default_rng(0)
    with TokenWriter(prefix, tokenizer_size) as writer:
        for _ in range(20):
            writer.add_document(generator.integers(0, tokenizer_size, SYNTHETIC_TOKENS // 20))
    return prefix


def _clean() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
