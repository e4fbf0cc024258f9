"""A small model with the configuration's heads and mechanism: the device's kernels against the plain definition."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import rotate, sink_weights, visible_keys, weighted_values
from sinkpretrain.config import RunConfig, SinkConfig
from sinkpretrain.model import GPTNeoX

HOOKS = ("values", "column", "weigh", "output")
"""Where a mechanism can act on attention."""
LAYERS, SAMPLES, TOKENS, IDS = 2, 2, 256, 512
LIMITS = {"32-true": (1e-5, 1e-4), "64-true": (1e-5, 1e-4)}
ROUGH_LIMITS = (2e-2, 8e-2)
"""Relative errors allowed of the output and of the gradient; the latter for 16-bit arithmetic."""


@dataclass(frozen=True)
class SelfTest:
    """Relative errors against eager attention, whose weights and sums are fp32.

    without_mechanism: of the plain definition when the mechanism is left out, as if a kernel dropped it; None if all it
        does is to put tokens in front.
    leak: largest change before a changed token, relative; reach: the same from it on.
    """

    output: float
    gradient: float
    without_mechanism: float | None
    leak: float
    reach: float
    limits: tuple[float, float]


def self_test(config: RunConfig, device: str) -> SelfTest:
    """Run it on ``device`` in the configuration's precision; attention is made peaked, so that mistakes show."""
    precision = config.training.precision
    double = precision == "64-true"
    torch.set_float32_matmul_precision("highest" if precision == "32-true" else "high")
    exact = _model(config, config.sink).to(torch.float64 if double else torch.float32)
    ids = _ids(exact)
    weight = torch.randn(*ids.shape, exact.config.d_model, generator=torch.Generator().manual_seed(2))
    want = exact.hidden(ids, _plain(exact, ids.shape[1]))
    want_gradient = _gradient(exact, want, weight)

    real = _model(config, config.sink).to(
        device=device, dtype=want.dtype if precision != "bf16-true" else torch.bfloat16
    )
    # The kernels are what is looked at: with the configuration's compilation, if it has one.
    hidden: Any = torch.compile(real.hidden) if config.training.compile else real.hidden
    mixed = torch.autocast(device, torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()
    with mixed:
        got = hidden(ids.to(device))
        changed = ids.clone()
        middle = ids.shape[1] // 2
        changed[:, middle] = (changed[:, middle] + 1) % IDS
        after = hidden(changed.to(device))
    moved = (after - got).detach().float().abs() / got.detach().float().abs().mean()
    without = None
    if any(sinks.mechanism_class(config.sink).uses(hook) for hook in HOOKS):
        bare = _model(config, SinkConfig()).to(want.dtype)
        bare.load_state_dict(exact.state_dict(), strict=False)
        without = _distance(bare.hidden(ids, _plain(bare, ids.shape[1])), want)
    return SelfTest(
        output=_distance(got, want),
        gradient=_distance(_gradient(real, got, weight), want_gradient),
        without_mechanism=without,
        leak=float(moved[:, :middle].max()),
        reach=float(moved[:, middle:].max()),
        limits=LIMITS.get(precision, ROUGH_LIMITS),
    )


def _model(config: RunConfig, sink: SinkConfig) -> GPTNeoX:
    """Width and heads of the configuration, few layers and ids; attention peaked, sink parameters moved.

    A model at its initial weights hides mistakes.
    """
    context = min(config.model.context, TOKENS)
    shape = replace(config.model, n_layer=LAYERS, tokenizer_size=IDS, vocab_size=0, context=context).resolved()
    model = GPTNeoX(shape, sink, seed=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attn.qkv.weight"):
                parameter[: 2 * parameter.shape[1]] *= 10**0.5
            if ".sink." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def _ids(model: GPTNeoX) -> Tensor:
    length = model.config.context
    ids = torch.randint(0, IDS, (SAMPLES, length), generator=torch.Generator().manual_seed(3))
    prefix = model.prefix_ids
    if prefix:
        ids[:, : len(prefix)] = torch.tensor(prefix)
    return ids


def _plain(model: GPTNeoX, length: int) -> Any:
    """Attention as it is defined: all weights, one after the other."""
    positions = torch.arange(length)
    cos, sin = model.rope(positions)
    visible = visible_keys(positions[:, None], positions, model.windows[0], model.pinned)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        weights, mass = sink_weights(q, k, sink, visible)
        return weighted_values(weights, mass, v, sink.column(q, visible.sum(-1))).to(v.dtype)

    return attend


def _gradient(model: GPTNeoX, hidden: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a weighted sum of the output, with respect to queries, keys, values and sinks of all layers."""
    chosen = [p for n, p in model.named_parameters() if "attn.qkv" in n or ".sink." in n]
    loss = (hidden.float() * weight.to(hidden.device)).sum()
    return torch.cat([g.detach().double().cpu().flatten() for g in torch.autograd.grad(loss, chosen)])


def _distance(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm())
