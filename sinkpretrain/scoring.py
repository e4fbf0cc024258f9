"""From hidden states to losses: a part of the logits at a time, in fp32; and how many tokens a forward takes.

Letters of the axes: B batch, T tokens, N rows, C width of the residual stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sinkpretrain.device import upload
from sinkpretrain.errors import UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.ops import can_compile, compiled

Losses = NDArray[np.float32]
Result = TypeVar("Result")

LOGIT_BYTES = {"cpu": 100 << 20, "cuda": 1 << 29}
"""Logits that exist at a time."""

NO_TARGET = -1


def token_nll(model: LanguageModel, hidden_NC: Tensor, targets_N: Tensor) -> Tensor:
    """-log p(target), nats, fp32 [N], whatever the dtype of the model; a part of the rows at a time."""
    device = hidden_NC.device
    fuse = can_compile(device, len(hidden_NC))
    loss = compiled(_nll) if fuse else _nll if device.type == "cuda" else _nll_by_parts
    width = model.head.weight.shape[0] * (4 if device.type == "cpu" else hidden_NC.element_size())
    rows = max(64, LOGIT_BYTES[device.type] // width)
    pairs = zip(torch.split(hidden_NC, rows), torch.split(targets_N, rows), strict=True)
    return torch.cat([loss(model.head(h), t) for h, t in pairs])


def _nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    logits = logits_NV.float()
    return torch.logsumexp(logits, dim=-1) - logits.gather(1, targets_N[:, None])[:, 0]


CACHED_ROWS = 64
"""Rows of logits that a CPU's cache holds: their loss takes a fifth of the time that all rows together take."""


def _nll_by_parts(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    pairs = zip(torch.split(logits_NV, CACHED_ROWS), torch.split(targets_N, CACHED_ROWS), strict=True)
    return torch.cat([F.cross_entropy(logits.float(), t, reduction="none") for logits, t in pairs])


def scored(model: LanguageModel, hidden_BTC: Tensor, targets_BT: NDArray[np.int64]) -> Tensor:
    """The losses of the targets that are there, fp32 on the device, in order; ``NO_TARGET`` where there is none."""
    device = hidden_BTC.device
    hidden_NC, targets_N = hidden_BTC.flatten(0, 1), targets_BT.reshape(-1)
    there = np.flatnonzero(targets_N != NO_TARGET)
    if len(there) < len(targets_N):
        hidden_NC, targets_N = hidden_NC[upload(there, device)], targets_N[there]
    return token_nll(model, hidden_NC, upload(targets_N, device))


def finite(nll: Losses, places: NDArray[np.integer]) -> Losses:
    """The losses, unless one is not a number; ``places`` are the numbers of the tokens they score.

    A NaN spreads to the other tokens of its forward, so the token named can be a block too early.
    """
    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
        raise UserError(
            f"the model's predictions are not finite near token {places[bad[0]]}; evaluate in float32, "
            "or check the weights."
        )
    return nll


class MemoryShort(UserWarning):
    """A GPU's memory did not hold a forward; it is done again with fewer tokens."""


class BlockSize:
    """Tokens per forward. Any number gives the same losses; one too large for the GPU's memory is halved, and said."""

    SMALLEST = 64

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    @classmethod
    def default(cls, device: torch.device) -> BlockSize:
        """Enough to keep the device busy: docs/speed.md has the measurements."""
        return cls(16384 if device.type == "cuda" else 1024)

    def attempt(self, forward: Callable[[], Result], tokens: int, least: int = SMALLEST) -> Result | None:
        """What ``forward`` returns, or None if memory was short; from then on there are fewer tokens per forward.

        Args:
            tokens: of this forward, which may be fewer than a block's.
            least: of a forward that cannot be made smaller.

        Raises:
            UserError: there is no memory for the smallest forward either.
        """
        try:
            return forward()
        except torch.OutOfMemoryError:
            pass  # not here: the exception holds on to the tensors of the forward
        if tokens <= least:
            raise UserError(
                f"the GPU's memory does not hold the model and a forward of {tokens:,} tokens; "
                "use --dtype bfloat16, a smaller cache or --device cpu."
            )
        self.tokens = max(least, tokens // 2)
        warnings.warn(
            f"GPU memory is short: going on with {self.tokens:,} tokens per forward.", MemoryShort, stacklevel=2
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
