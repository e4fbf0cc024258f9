"""Attention over a band of recent keys: one meaning, several kernels.

A band kernel takes q [B, H, T, D] and k, v [B, Hkv, S, D], rotated; query i stands at key i + S - T (the last query at
the last key) and sees the keys less than ``reach`` before it, itself included. It returns the output [B, H, T, D] and
the fp32 logsumexp of the logits [B, H, T], 0 and -inf for a query that sees nothing. ALiBi's ``slopes`` are fp32 [H] or
None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sinkpretrain.attention import distance_bias, masked_attention, spread_heads
from sinkpretrain.ops import raise_recompile_limit

Kernel = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]

FOLD = 128
"""Queries of a window: each reads ``reach`` + this many keys. Measured on two CPU cores: docs/speed.md."""


def band_bias(distance_TS: Tensor, slopes_H: Tensor | None, reach: int) -> Tensor:
    """``distance_bias`` where a query sees itself and what is less than ``reach`` before it."""
    return distance_bias(distance_TS, slopes_H, (distance_TS >= 0) & (distance_TS < reach))


def masked(q: Tensor, k: Tensor, v: Tensor, reach: int, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition: all keys under a mask."""
    T, S = q.shape[2], k.shape[2]
    i, j = torch.arange(T, device=q.device), torch.arange(S, device=q.device)
    return masked_attention(q, k, v, band_bias(i[:, None] + (S - T) - j, slopes, reach))


def folded(q: Tensor, k: Tensor, v: Tensor, reach: int, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Windows of ``FOLD`` queries side by side in the batch, each with the keys that it can see.

    On a CPU the windows of keys are views of each other; nothing is copied.
    """
    B, H, T, _ = q.shape
    S = k.shape[2]
    reach = min(reach, S)
    n = -(-T // FOLD)
    width = FOLD + reach - 1
    # Queries are padded in front to whole windows, keys to the first window's first key; what lies before it is unseen.
    q = _padded(q, n * FOLD - T)
    front = n * FOLD + reach - 1 - S
    k, v = (
        _padded(spread_heads(x, H), front).unfold(2, width, FOLD).permute(0, 2, 1, 4, 3).flatten(0, 1) for x in (k, v)
    )
    i, j = torch.arange(FOLD, device=q.device), torch.arange(width, device=q.device)
    bias = band_bias(i[:, None] + reach - 1 - j, slopes, reach)  # [FOLD, width] or [H, FOLD, width]
    if front > 0:
        real = torch.arange(n, device=q.device)[:, None] * FOLD + j >= front
        bias = bias.masked_fill(~real[:, None, None, :], float("-inf")).repeat(B, 1, 1, 1)
    q = q.reshape(B, H, n, FOLD, -1).transpose(1, 2).flatten(0, 1)
    out, lse = masked_attention(q, k, v, bias)
    out = out.reshape(B, n, H, FOLD, -1).transpose(1, 2).flatten(2, 3)
    lse = lse.reshape(B, n, H, FOLD).transpose(1, 2).flatten(2, 3)
    return _unpadded(out, n * FOLD - T), _unpadded(lse, n * FOLD - T)


def flash(q: Tensor, k: Tensor, v: Tensor, reach: int, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """The stock flash kernel with a window to the left; a GPU and 16 bits, no ALiBi."""
    assert slopes is None
    T, S = q.shape[2], k.shape[2]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (q, k, v)), None, None, T, S, 0.0, True, False,
        window_size_left=min(reach - 1, S), window_size_right=0,
    )  # fmt: skip
    if T > S:  # of a query that sees nothing the kernel says +inf
        lse = torch.where(lse == float("inf"), float("-inf"), lse)
    return out.transpose(1, 2), lse


def _padded(x_BHSD: Tensor, front: int) -> Tensor:
    """With so many rows in front, or so many fewer; torch's own padding copies even for none."""
    return F.pad(x_BHSD, (0, 0, front, 0)) if front else x_BHSD


def _unpadded(x: Tensor, front: int) -> Tensor:
    """Without so many rows in front; copied, so that code is compiled once for these and for what was not padded."""
    return x[:, :, front:].clone() if front else x


def flex(q: Tensor, k: Tensor, v: Tensor, reach: int, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """FlexAttention with a block mask, compiled where there is a GPU.

    Compiled anew for every shape: queries and keys are padded in front to powers of two, so that there are few.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    T, S = q.shape[2], k.shape[2]
    rows, width = (max(TILE, 1 << (n - 1).bit_length()) for n in (T, max(T, S)))
    mask = _block_mask(rows, width, min(reach, width), width - S, q.device)
    score = None if slopes is None else _alibi(slopes, width - rows)
    out, aux = _flex(q.device.type)(
        _padded(q, rows - T), _padded(k, width - S), _padded(v, width - S),
        score_mod=score, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return _unpadded(out, rows - T), _unpadded(aux.lse, rows - T)


KERNELS: dict[str, Kernel] = {"masked": masked, "folded": folded, "flash": flash, "flex": flex}


def choose(q: Tensor, slopes: Tensor | None) -> Kernel:
    """The fastest kernel for these queries: see docs/speed.md."""
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8:
        return folded
    return flash if slopes is None else flex


TILE = 128
"""Side of the blocks of FlexAttention's mask."""


@lru_cache(maxsize=8)
def _block_mask(T: int, S: int, reach: int, front: int, device: torch.device) -> Any:
    """The band of T queries at the end of S keys, of which the first ``front`` are padding.

    From arithmetic over tiles: made from the mask itself, it would take all of its T x S entries.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # As tensors, for which compiled code is not made anew.
    reach_, front_ = (torch.tensor(n, device=device) for n in (reach, front))

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = i + (S - T) - j
        return (distance >= 0) & (distance < reach_) & (j >= front_)

    query = torch.arange(S - T, S, TILE)[:, None]  # a tile's first
    key = torch.arange(0, S, TILE)
    query_end, key_end = query + TILE - 1, key + TILE - 1
    some = (key <= query_end) & (key_end > query - reach) & (key_end >= front)
    all_ = (key_end <= query) & (key > query_end - reach) & (key >= front)
    return BlockMask.from_kv_blocks(*_listed(some & ~all_, device), *_listed(all_, device), TILE, visible, (T, S))


def _listed(tiles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many tiles are set in each row, int32 [1, 1, rows], and their numbers first in [1, 1, rows, columns]."""
    order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return tiles.sum(-1)[None, None].int().to(device), order[None, None].int().to(device)


def _alibi(slopes: Tensor, offset: int) -> Any:
    def score(logit: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return logit - slopes[h] * (i + offset - j)

    return score


@lru_cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cuda":
        return flex_attention
    raise_recompile_limit()  # no memory holds the logits of the plain definition
    return torch.compile(flex_attention, dynamic=False)
