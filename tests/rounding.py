"""How much a path in 16 bits rounds, against another one: both are held against the same model in fp32."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from sinkpretrain.model import GPTNeoX

EXACT = 1e-3
"""Error, relative, that counts as none: a plain path that is nearly exact makes no other one a bad one."""


def excess_of_rounding(
    net: GPTNeoX, fast: Callable[..., Tensor], samples: int, batch: int, length: int
) -> dict[str, float]:
    """Error of ``fast`` over that of ``net.hidden``, both under bf16 autocast, for hidden states and every gradient.

    One sample says little: a gradient of few entries (a logit per head), or one that few tokens decide (a gate that is
    nearly closed), has errors that are half or twice another's by chance. So each ratio is the geometric mean over
    samples of ids and directions and over the parameters of that name in all blocks.
    """
    device = net.embed.weight.device
    attend = net.causal(length, device)
    parameters = {n: p for n, p in net.named_parameters() if n != "head.weight"}
    logs: dict[str, list[float]] = defaultdict(list)
    for sample in range(samples):
        generator = torch.Generator().manual_seed(sample)
        ids = torch.randint(0, net.config.tokenizer_size, (batch, length), generator=generator).to(device)
        direction = torch.randn(batch, length, net.config.d_model, generator=generator).to(device)

        def run(hidden: Callable[..., Tensor], narrow: bool, ids: Tensor = ids, d: Tensor = direction) -> list[Tensor]:
            with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
                out = hidden(ids, attend)
            return [out.detach(), *torch.autograd.grad((out * d).sum(), list(parameters.values()))]

        exact, plain, other = run(net.hidden, False), run(net.hidden, True), run(fast, True)
        for name, e, p, f in zip(["hidden", *parameters], exact, plain, other, strict=True):
            ratio = (f - e).norm() / ((p - e).norm() + EXACT * e.norm())
            logs[re.sub(r"^blocks\.\d+\.", "", name)].append(math.log(max(ratio.item(), 1e-9)))
    return {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
