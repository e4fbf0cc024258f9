"""Perplexity of a text far longer than the model's window: exact, in blocks, and token by token as the proof.

Words: with a *cache x+y* a query sees the first x positions of the sequence (sink tokens included, they are the first)
and the y before it, and itself in addition: eviction happens after the forward, so a full cache means x + y + 1 keys.
Positions are slots in the cache, not places in the text: key slots are 0 .. x + y - 1 and the query stands at
min(t, x + y). (Xiao et al. 2023, arXiv 2309.17453, section 3.2, and its published evaluator.)

Why blocks are exact: a token's key and value are computed once, when it is read. Streaming is therefore one banded
forward. Among recent keys slots differ as places in the text do, so there RoPE depends on the true distance; towards
the first x keys the query behaves as if it stood at slot min(t, x + y). Two rotations of the query, one softmax.

Letters of the axes: B batch, H heads, T queries of a block, S keys, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import (
    attention_weights,
    distance_bias,
    masked_attention,
    merge_column,
    merge_keys,
    rotate,
    scaled_logits,
    visible_keys,
    weighed_keys,
    weighted_values,
)
from sinkpretrain.errors import UserError
from sinkpretrain.language import Attend, LanguageModel

Positions = Literal["in-cache", "absolute"]
"""Slots in the cache, as in the paper, or places in the text."""

Advance = Callable[[int], None]
"""Told how many tokens have been scored so far."""

HEAD_ROWS = 512
"""Rows whose logits exist at a time; 512 x 50,304 fp32 are 100 MB."""


@dataclass(frozen=True)
class Cache:
    """x initial positions and y recent ones."""

    start: int
    recent: int

    @property
    def size(self) -> int:
        return self.start + self.recent

    def __str__(self) -> str:
        return f"{self.start}+{self.recent}"

    @classmethod
    def parse(cls, text: str) -> Cache:
        """``4+1020`` as a cache; raises UserError."""
        start, plus, recent = text.strip().partition("+")
        if not (plus and start.isdigit() and recent.isdigit() and int(recent) > 0):
            raise UserError(f"{text!r} is not a cache; write x+y, for example 4+1020, with y at least 1.")
        return cls(int(start), int(recent))


# --- exact and fast -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def stream_nll(
    model: LanguageModel,
    ids: NDArray[np.integer],
    cache: Cache,
    *,
    block: int = 1024,
    drop_column: bool = False,
    positions: Positions = "in-cache",
    advance: Advance | None = None,
) -> NDArray[np.float32]:
    """Negative log-likelihoods, nats, float32 [len(ids) - 1]: entry i scores token i + 1 of the text.

    The model's prefix (sink tokens) is put in front once and counts into ``cache.start``. Memory depends on the cache
    and the block, not on the text. With ``cache.recent >= len(ids)`` this is dense attention.

    Args:
        model: in evaluation mode, on the device and in the dtype to compute in.
        ids: token ids [tokens].
        block: tokens per forward; any value gives the same numbers.
        drop_column: leave the mechanism's softmax column out ("drop the +1 at test time").
        positions: where the query stands towards the first x keys.
    """
    device = model.embed.weight.device
    prefix = len(model.prefix_ids)
    nll = np.empty(len(ids) - 1, dtype=np.float32)
    banded = BandedAttention(model, cache, drop_column, positions)
    for first, tokens in _blocks(model.prefix_ids, ids, block):
        attend, places = banded.block(first, len(tokens)), banded.places(first, len(tokens))
        hidden = model.hidden(torch.from_numpy(tokens).to(device)[None], attend, places)[0]
        # Row r of this block is position first + r of the sequence, token first + r - prefix of the text, and scores
        # the token after it.
        text = np.arange(first, first + len(tokens)) - prefix
        scored = (text >= 0) & (text < len(ids) - 1)
        if scored.any():
            rows = hidden[torch.from_numpy(scored).to(device)]
            targets = np.array(ids[text[scored][0] + 1 : text[scored][-1] + 2], dtype=np.int64)
            losses = token_nll(model, rows, torch.from_numpy(targets).to(device)).cpu().numpy()
            nll[text[scored]] = _finite(losses, int(text[scored][0]) + 1)
        if advance:
            advance(int(max(0, text[-1])))
    return nll


def _blocks(prefix: tuple[int, ...], ids: NDArray[np.integer], block: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(position of the first token, int64 tokens) of each block of the sequence prefix + ids."""
    total = len(prefix) + len(ids)
    for first in range(0, total, block):
        own = np.array(prefix[first : first + block], dtype=np.int64)
        start = max(0, first - len(prefix))
        stop = max(0, min(total, first + block) - len(prefix))
        yield first, np.concatenate((own, np.asarray(ids[start:stop], dtype=np.int64)))


class BandedAttention:
    """The attention of a stream: keeps each layer's first x and last y keys and values between blocks."""

    def __init__(
        self, model: LanguageModel, cache: Cache, drop_column: bool = False, positions: Positions = "in-cache"
    ) -> None:
        self.model, self.cache, self.drop_column, self.positions = model, cache, drop_column, positions
        self.layers: list[LayerCache | None] = [None] * model.config.n_layer

    def places(self, first: int, length: int) -> Tensor:
        """Where the queries first .. first + length - 1 of the sequence stand, int64 [length]."""
        t_T = torch.arange(first, first + length, device=self.model.embed.weight.device)
        return t_T.clamp(max=self.cache.size) if self.positions == "in-cache" else t_T

    def block(self, first: int, length: int) -> Attend:
        """The attention function for the positions first .. first + length - 1, which follow those seen so far."""
        x, y = self.cache.start, self.cache.recent
        device = self.model.embed.weight.device
        t_T = torch.arange(first, first + length, device=device)
        place_T = self.places(first, length)
        # The band's keys reach back y from the block's first query, but not into the first x. Angles are taken from
        # there, so that they stay small and exact however far the stream has come.
        low = max(x, first - y)
        band_S = torch.arange(low, max(low, first + length), device=device)
        start_S = torch.arange(min(x, first + length), device=device)
        rope_band_q, rope_band_k = self.model.rope(t_T - low), self.model.rope(band_S - low)
        rope_place_q = self.model.rope(place_T)
        new_start_S = t_T[t_T < x]
        rope_start_k = self.model.rope(new_start_S)
        n_new = len(new_start_S)
        # Where the band's keys stand for each query; among them, places differ as they do in the text.
        band_TS = band_S - (t_T - place_T)[:, None]
        recent_TS = t_T[:, None] - band_S <= y
        groups = {}
        for window in set(self.model.windows):
            band = Seen.of(self.model, window, place_T[:, None], band_TS, recent_TS)
            start = Seen.of(self.model, window, place_T[:, None], start_S)
            groups[window] = (band, start, band.visible.sum(-1) + start.visible.sum(-1))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            old = self.layers[layer] or LayerCache.empty(k)
            start_k = torch.cat((old.start_k, rotate(k[:, :, :n_new], *rope_start_k)), dim=2)
            start_v = torch.cat((old.start_v, v[:, :, :n_new]), dim=2)
            band_k = torch.cat((old.band_k, k[:, :, n_new:]), dim=2)
            band_v = torch.cat((old.band_v, v[:, :, n_new:]), dim=2)
            keep = max(0, band_k.shape[2] - y)
            self.layers[layer] = LayerCache(start_k, start_v, band_k[:, :, keep:].clone(), band_v[:, :, keep:].clone())
            band, start, seen_T = groups[self.model.windows[layer]]
            q_place, q_band = rotate(q, *rope_place_q), rotate(q, *rope_band_q)
            band_k = rotate(band_k, *rope_band_k)
            start_logits = scaled_logits(q_place, start_k)
            if sink.weigher is not None:
                logits = [start_logits, scaled_logits(q_band, band_k)]
                return weighed_keys(logits, [start.visible, band.visible], [start_v, band_v], sink.weigher)
            if band_k.shape[2]:
                out, lse = masked_attention(q_band, band_k, band_v, band.bias)
            else:
                out, lse = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), device=device)
            if start_k.shape[2]:
                out, lse = merge_keys(out, lse, start_logits + start.bias, start_v)
            return merge_column(out, lse, None if self.drop_column else sink.column(q_place, seen_T))

        return attend


class Seen(NamedTuple):
    """What queries see of some keys: bool [T, S], and the same as a bias on their logits, [T, S] or [H, T, S]."""

    visible: Tensor
    bias: Tensor

    @classmethod
    def of(
        cls, model: LanguageModel, window: int | None, query: Tensor, key: Tensor, allowed: Tensor | None = None
    ) -> Seen:
        """By the places of queries [T, 1] and keys ([S] or [T, S]) in a layer with this window, where ``allowed``."""
        visible = visible_keys(query, key, window, model.pinned)
        if allowed is not None:
            visible = visible & allowed
        return cls(visible, distance_bias(query - key, model.slopes, visible))


@dataclass
class LayerCache:
    """Keys and values that one layer keeps, each [B, H, S, D]: the first x (rotated to their slots for good) and the
    last y (not rotated, since their slots move)."""

    start_k: Tensor
    start_v: Tensor
    band_k: Tensor
    band_v: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> LayerCache:
        none = like[:, :, :0]
        return cls(none, none, none, none)


# --- token by token -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def token_loop_nll(
    model: LanguageModel,
    ids: NDArray[np.integer],
    cache: Cache,
    *,
    drop_column: bool = False,
    positions: Positions = "in-cache",
    advance: Advance | None = None,
) -> NDArray[np.float32]:
    """The definition of streaming, one forward per token: what ``stream_nll`` must equal.

    Keys are cached without rotation; in each step the cache and the new key get the slots 0, 1, ... (or their places
    in the text), the query the last one; then the key after the first x is evicted if there are more than x + y.
    """
    device = model.embed.weight.device
    kept: list[tuple[Tensor, Tensor] | None] = [None] * model.config.n_layer
    text_S = torch.zeros(0, dtype=torch.int64, device=device)  # places in the text of all keys, the query's last

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        old = kept[layer]
        if old is not None:
            k, v = torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2)
        slots = torch.arange(k.shape[2], device=device)
        places = slots if positions == "in-cache" else text_S
        q_place, k_place = rotate(q, *model.rope(places[-1:])), rotate(k, *model.rope(places))
        seen = Seen.of(model, model.windows[layer], places[-1:, None], places)
        column = None if drop_column else sink.column(q_place, seen.visible.sum(-1))
        weights, mass = attention_weights(q_place, k_place, column, seen.bias, sink.weigher)
        out = weighted_values(weights, mass, v, column)
        if k.shape[2] > cache.size:
            keep = torch.cat((slots[: cache.start], slots[cache.start + 1 :]))
            k, v = k[:, :, keep], v[:, :, keep]
        kept[layer] = (k, v)
        return out

    nll = np.empty(len(ids) - 1, dtype=np.float32)
    sequence = [*model.prefix_ids, *ids]
    for position, token in enumerate(sequence[:-1]):
        text_S = torch.cat((text_S, torch.tensor([position], device=device)))
        place = torch.tensor([min(position, cache.size) if positions == "in-cache" else position], device=device)
        hidden = model.hidden(torch.tensor([[int(token)]], device=device), attend, place)[0]
        if len(text_S) > cache.size:
            text_S = torch.cat((text_S[: cache.start], text_S[cache.start + 1 :]))
        text = position - len(model.prefix_ids)
        if text >= 0:
            target = torch.tensor([int(ids[text + 1])], device=device)
            nll[text] = float(token_nll(model, hidden, target))
        if advance:
            advance(max(0, text + 1))
    return _finite(nll, 1)


# --- the other strategies -----------------------------------------------------------------------------------------


def dense_nll(
    model: LanguageModel, ids: NDArray[np.integer], *, block: int = 1024, advance: Advance | None = None
) -> NDArray[np.float32]:
    """Every query sees every earlier token, at its place in the text; memory grows with the text."""
    return stream_nll(model, ids, Cache(0, len(ids) + len(model.prefix_ids)), block=block, advance=advance)


@torch.inference_mode()
def recompute_nll(
    model: LanguageModel,
    ids: NDArray[np.integer],
    window: int,
    *,
    batch: int = 8,
    advance: Advance | None = None,
) -> NDArray[np.float32]:
    """Sliding window with re-computation: a fresh forward over the last ``window`` tokens for every token.

    The sinks stand at the front of every window and count into it. Costs ``window`` times the dense forward.
    """
    device = model.embed.weight.device
    text = window - len(model.prefix_ids)
    if text < 1:
        raise UserError(f"a window of {window} has no room for text behind {len(model.prefix_ids)} sink tokens.")
    prefix = torch.tensor(model.prefix_ids, dtype=torch.int64)
    nll = np.empty(len(ids) - 1, dtype=np.float32)
    # Causality makes the first window's forward the fresh forward of each of its tokens.
    head = np.array(ids[: text + 1], dtype=np.int64)
    tokens = torch.cat((prefix, torch.from_numpy(head[:-1])))[None].to(device)
    hidden = model.hidden(tokens)[0, len(prefix) :]
    nll[: len(head) - 1] = token_nll(model, hidden, torch.from_numpy(head[1:]).to(device)).cpu().numpy()
    for first in range(1, len(ids) - text, batch):
        starts = np.arange(first, min(first + batch, len(ids) - text))
        windows = np.asarray(ids[starts[0] : starts[-1] + text + 1], dtype=np.int64)
        rows = torch.from_numpy(np.lib.stride_tricks.sliding_window_view(windows, text + 1).copy())
        tokens = torch.cat((prefix.expand(len(rows), -1), rows[:, :-1]), dim=1).to(device)
        hidden = model.hidden(tokens)[:, -1]
        nll[starts + text - 1] = token_nll(model, hidden, rows[:, -1].to(device)).cpu().numpy()
        if advance:
            advance(int(starts[-1] + text))
    return _finite(nll, 1)


# --- scoring ------------------------------------------------------------------------------------------------------


def token_nll(model: LanguageModel, hidden_TC: Tensor, targets_T: Tensor) -> Tensor:
    """-log p(target), fp32 [T], whatever the dtype of the model; a part of the rows at a time."""
    parts = [
        F.cross_entropy(model.head(h).float(), t, reduction="none")
        for h, t in zip(torch.split(hidden_TC, HEAD_ROWS), torch.split(targets_T, HEAD_ROWS), strict=True)
    ]
    return torch.cat(parts)


def _finite(nll: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """The losses of the tokens from number ``first`` on, unless one is not a number.

    A NaN spreads to the other tokens of its forward, so the token named can be a block too early.
    """
    bad = np.flatnonzero(~np.isfinite(nll))
    if len(bad):
        raise UserError(
            f"the model's predictions are not finite near token {first + bad[0]}; evaluate in float32, "
            "or check the weights."
        )
    return nll
