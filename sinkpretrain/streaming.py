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

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import attention_weights, rotate, weighted_values
from sinkpretrain.band import Kernel
from sinkpretrain.banded import BandedAttention, Seen
from sinkpretrain.cache import Cache, Positions
from sinkpretrain.device import download, upload
from sinkpretrain.errors import UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.scoring import NO_TARGET, BlockSize, Losses, finite, scored, token_nll

Ids = NDArray[np.integer]

Advance = Callable[[int], None]
"""Told how many tokens have been scored so far."""

# --- exact and fast -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def stream_nll(
    model: LanguageModel,
    ids: Ids,
    cache: Cache,
    *,
    block: int | BlockSize = 1024,
    drop_column: bool = False,
    positions: Positions = "in-cache",
    parts: Sequence[slice] | None = None,
    kernel: Kernel | None = None,
    advance: Advance | None = None,
) -> Losses:
    """Negative log-likelihoods, nats, float32 [len(ids) - 1]: entry i scores token i + 1 of the text.

    The model's prefix (sink tokens) is put in front once and counts into ``cache.start``. Memory depends on the cache
    and the block, not on the text. With ``cache.recent >= len(ids)`` this is dense attention.

    Args:
        model: in evaluation mode, on the device and in the dtype to compute in.
        ids: token ids [tokens].
        block: tokens per forward; any value gives the same numbers.
        drop_column: leave the mechanism's softmax column out ("drop the +1 at test time").
        positions: where a query stands towards the first x keys.
        parts: of the text (``documents``), each read with an empty cache; None: one stream over everything. A token
            that is no part's second or later one has the loss NaN.
        kernel: of ``sinkpretrain.band``; by default the fastest one.
    """
    size = block if isinstance(block, BlockSize) else BlockSize(block)
    nll = np.full(len(ids) - 1, np.nan, dtype=np.float32)
    done = 0
    for group in batches(parts or [slice(0, len(ids))], size.tokens):
        banded = BandedAttention(model, cache, drop_column, positions, kernel)
        for places, losses in _read_together(model, [ids[d] for d in group], banded, size):
            starts = np.array([d.start for d in group])
            where = starts[places[:, 0]] + places[:, 1]
            nll[where] = finite(losses, where + 1)
            done += len(where)
            if advance:
                advance(done)
    return nll


def documents(ids: Ids, bounds: NDArray[np.int64], end: int | None) -> list[slice]:
    """The part of the text that is read for each document, ``[bounds[d], bounds[d + 1])``.

    It begins with the end-of-document token ``end`` before the document, where there is one: as in training, that is
    the context of the first token. Neighbours then share it, so that every token but the text's first is scored once.
    """
    before = np.maximum(bounds[:-1] - 1, 0)
    starts = np.where(np.asarray(ids[before]) == end, before, bounds[:-1])
    return [slice(int(a), int(b)) for a, b in zip(starts, bounds[1:], strict=True) if b - a > 1]


def batches(found: Sequence[slice], tokens: int) -> Iterator[list[slice]]:
    """Documents of about the same length together, as many as have room in a forward of ``tokens``."""
    group: list[slice] = []
    for document in sorted(found, key=lambda d: d.stop - d.start, reverse=True):
        longest = (group or [document])[0]
        if group and (len(group) + 1) * (longest.stop - longest.start) > tokens:
            yield group
            group = []
        group.append(document)
    yield group


def _read_together(
    model: LanguageModel, texts: list[Ids], banded: BandedAttention, size: BlockSize
) -> Iterator[tuple[NDArray[np.int64], Losses]]:
    """Streams that begin together, block by block: (text, place of the token before) [N, 2] and the losses [N]."""
    n_prefix = len(model.prefix_ids)
    total = n_prefix + max(map(len, texts))
    first, pending = 0, None
    while first < total:
        before, length = list(banded.layers), min(total - first, max(1, size.tokens // len(texts)))
        tokens, targets = _block(model.prefix_ids, texts, first, length)

        def forward(first: int = first, tokens: Any = tokens, targets: Any = targets) -> Tensor:
            attend, places = banded.block(first, tokens.shape[1]), banded.places(first, tokens.shape[1])
            hidden = model.hidden(upload(tokens, banded.device), attend, places)
            return scored(model, hidden, targets)

        losses = size.attempt(forward, tokens.size, max(size.SMALLEST, len(texts)))
        if losses is None:
            banded.layers = before
            continue
        # Read one block late, so that a GPU never waits for us.
        if pending is not None:
            yield pending[0], pending[1]()
        row, column = np.nonzero(targets != NO_TARGET)
        pending = np.stack((row, column + first - n_prefix), axis=1), download(losses)
        first += length
    assert pending is not None
    yield pending[0], pending[1]()


def _block(
    prefix: tuple[int, ...], texts: list[Ids], first: int, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and targets [texts, length] of the positions from ``first`` on; a short text is padded with id 0."""
    tokens = np.zeros((len(texts), length), dtype=np.int64)
    targets = np.full((len(texts), length), NO_TARGET, dtype=np.int64)
    own = prefix[first : first + length]
    low, high = max(0, first - len(prefix)), max(0, first + length - len(prefix))
    for row, text in enumerate(texts):
        tokens[row, : len(own)] = own
        part = np.asarray(text[low : high + 1], dtype=np.int64)
        tokens[row, len(own) :][: len(part)] = part[: length - len(own)]
        targets[row, len(own) :][: max(0, len(part) - 1)] = part[1:]
    return tokens, targets


# --- token by token -----------------------------------------------------------------------------------------------


@torch.inference_mode()
def token_loop_nll(
    model: LanguageModel,
    ids: Ids,
    cache: Cache,
    *,
    drop_column: bool = False,
    positions: Positions = "in-cache",
    parts: Sequence[slice] | None = None,
    advance: Advance | None = None,
) -> Losses:
    """The definition of streaming, one forward per token: what ``stream_nll`` must equal.

    Keys are cached without rotation; in each step the cache and the new key get the slots 0, 1, ... (or their places
    in the text), the query the last one; then the key after the first x is evicted if there are more than x + y.
    """
    if parts is not None:
        nll, done = np.full(len(ids) - 1, np.nan, dtype=np.float32), 0
        for part in parts:
            of_part = token_loop_nll(model, ids[part], cache, drop_column=drop_column, positions=positions)
            nll[part.start : part.stop - 1] = of_part
            done += len(of_part)
            if advance:
                advance(done)
        return nll
    device = model.embed.weight.device
    kept: list[tuple[Tensor, Tensor] | None] = [None] * model.config.n_layer
    text_S = torch.zeros(0, dtype=torch.int64, device=device)  # places in the text of all keys, the query's last

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        old = kept[layer]
        if old is not None:
            k, v = torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2)
        slots = torch.arange(k.shape[2], device=device)
        places = slots if positions == "in-cache" else text_S
        angles = places if positions == "in-cache" else places.double()  # places in a long text are large
        q_place, k_place = rotate(q, *model.rope(angles[-1:])), rotate(k, *model.rope(angles))
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
    return finite(nll, np.arange(1, len(ids)))


# --- the other strategies -----------------------------------------------------------------------------------------


def dense_nll(
    model: LanguageModel,
    ids: Ids,
    *,
    block: int | BlockSize = 1024,
    parts: Sequence[slice] | None = None,
    advance: Advance | None = None,
) -> Losses:
    """Every query sees every earlier token, at its place in the text; memory grows with the text."""
    everything = Cache(0, len(ids) + len(model.prefix_ids))
    return stream_nll(model, ids, everything, block=block, parts=parts, advance=advance)


@torch.inference_mode()
def recompute_nll(
    model: LanguageModel,
    ids: Ids,
    window: int,
    *,
    stride: int = 1,
    sample: int = 0,
    block: int | BlockSize = 8192,
    parts: Sequence[slice] | None = None,
    advance: Advance | None = None,
) -> Losses:
    """Sliding window with re-computation: a fresh forward over the last ``window`` tokens for every token.

    The sinks stand at the front of every window and count into it. Costs ``window / stride`` times the dense forward,
    windows side by side in a forward of about ``block`` tokens.

    Args:
        stride: tokens from one window to the next; each window scores its last ``stride`` tokens.
        sample: draw so many of the windows that are full (all but a stream's first), at random but always the same
            ones, with and without sinks, so that models can be compared; the tokens that no drawn window scores have
            the loss NaN. 0, or more than there are: all windows.
        parts: see ``stream_nll``; no window reaches beyond its part.
    """
    size = block if isinstance(block, BlockSize) else BlockSize(block)
    text = text_of_window(model, window, stride)
    n_prefix = len(model.prefix_ids)
    windows, number = _windows(parts or [slice(0, len(ids))], text, stride, n_prefix)
    full = np.flatnonzero(number >= 0)
    if 0 < sample < len(full):
        lot = np.random.default_rng(0).random(len(ids))[number[full]]
        windows = windows[np.sort(full[np.argsort(lot, kind="stable")[:sample]])]
    nll = np.full(len(ids) - 1, np.nan, dtype=np.float32)
    done = tokens_done = 0
    while done < len(windows):
        longest = int(windows[done, 1] - windows[done, 0])
        some = windows[done : done + max(1, size.tokens // (n_prefix + longest))]
        first, scores = some[:, 0], some[:, 2]
        tokens, targets = _block(model.prefix_ids, [ids[a : b + 1] for a, b, _ in some], 0, n_prefix + longest)
        targets[first[:, None] + np.arange(-n_prefix, longest) < scores[:, None]] = NO_TARGET

        def forward(tokens: Any = tokens, targets: Any = targets) -> Tensor:
            hidden = model.hidden(upload(tokens, model.embed.weight.device))
            return scored(model, hidden, targets)

        losses = size.attempt(forward, tokens.size, max(size.SMALLEST, tokens.shape[1]))
        if losses is None:
            continue
        row, column = np.nonzero(targets != NO_TARGET)
        where = first[row] + column - n_prefix
        nll[where] = finite(losses.cpu().numpy(), where + 1)
        done += len(some)
        tokens_done += len(where)
        if advance:
            advance(tokens_done)
    return nll


def text_of_window(model: LanguageModel, window: int, stride: int) -> int:
    """Tokens of the text in a window; raises UserError if they are fewer than are to be scored."""
    n_prefix = len(model.prefix_ids)
    if window - n_prefix < stride:
        raise UserError(
            f"a window of {window} has no room for {stride} scored tokens behind {n_prefix} sink tokens; "
            "enlarge --window or lower --stride."
        )
    return window - n_prefix


def _windows(
    parts: Sequence[slice], text: int, stride: int, n_prefix: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Windows of at most ``text`` tokens, int64 [windows, 3], the longest first; and the number [windows] of each.

    Of each window the first place that it reads, the place behind its last one, and the first whose next token it
    scores. As attention is causal, the first window of a part scores all of its tokens.

    Numbers are different for all windows, and do not change with the sinks in front: with stride 1, windows of one
    number score the same token, otherwise tokens ``n_prefix`` apart. -1: before a window without sinks would be full.
    """
    found, numbers = [], []
    for part in parts:
        ends = np.append(np.arange(part.start + text, part.stop - 1, stride), part.stop - 1)
        scores = np.append(part.start, ends[:-1])
        found.append(np.stack((np.maximum(part.start, ends - text), ends, scores), axis=1))
        steps = -((part.start + text + n_prefix - ends) // stride)
        numbers.append(np.where(steps > 0, part.start + steps - 1, -1))
    windows, number = np.concatenate(found), np.concatenate(numbers)
    order = np.argsort(windows[:, 0] - windows[:, 1], kind="stable")
    return windows[order], number[order]
