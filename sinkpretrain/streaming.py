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

import itertools
from collections.abc import Callable, Iterator
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
    end: int | None = None,
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
        end: the id at the end of a document, where the stream is to begin anew; None: one stream over everything.
        kernel: of ``sinkpretrain.band``; by default the fastest one.
    """
    size = block if isinstance(block, BlockSize) else BlockSize(block)
    nll = np.empty(len(ids) - 1, dtype=np.float32)
    done = 0
    for group in batches(documents(ids, end), size.tokens):
        banded = BandedAttention(model, cache, drop_column, positions, kernel)
        for places, losses in _read_together(model, [ids[d] for d in group], banded, size):
            starts = np.array([d.start for d in group])
            where = starts[places[:, 0]] + places[:, 1]
            nll[where] = finite(losses, where + 1)
            done += len(where)
            if advance:
                advance(done)
    return nll


def documents(ids: Ids, end: int | None) -> list[slice]:
    """Where documents lie: from the end-of-document token before one, its first context, up to its own.

    Neighbours share that token, so every token but the very first is scored once.
    """
    if end is None:
        return [slice(0, len(ids))]
    bounds = np.unique(np.concatenate(([0], np.flatnonzero(np.asarray(ids) == end), [len(ids) - 1])))
    return [slice(int(a), int(b) + 1) for a, b in itertools.pairwise(bounds)]


def batches(found: list[slice], tokens: int) -> Iterator[list[slice]]:
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

        losses = size.attempt(forward)
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
    end: int | None = None,
    advance: Advance | None = None,
) -> Losses:
    """The definition of streaming, one forward per token: what ``stream_nll`` must equal.

    Keys are cached without rotation; in each step the cache and the new key get the slots 0, 1, ... (or their places
    in the text), the query the last one; then the key after the first x is evicted if there are more than x + y.
    """
    if end is not None:
        parts = [ids[d] for d in documents(ids, end)]
        return np.concatenate(
            [token_loop_nll(model, part, cache, drop_column=drop_column, positions=positions) for part in parts]
        )
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
    return finite(nll, np.arange(1, len(ids)))


# --- the other strategies -----------------------------------------------------------------------------------------


def dense_nll(
    model: LanguageModel, ids: Ids, *, block: int | BlockSize = 1024, advance: Advance | None = None
) -> Losses:
    """Every query sees every earlier token, at its place in the text; memory grows with the text."""
    return stream_nll(model, ids, Cache(0, len(ids) + len(model.prefix_ids)), block=block, advance=advance)


@torch.inference_mode()
def recompute_nll(
    model: LanguageModel,
    ids: Ids,
    window: int,
    *,
    stride: int = 1,
    sample: int = 0,
    block: int | BlockSize = 8192,
    advance: Advance | None = None,
) -> Losses:
    """Sliding window with re-computation: a fresh forward over the last ``window`` tokens for every token.

    The sinks stand at the front of every window and count into it. Costs ``window`` times the dense forward, windows
    side by side in a forward of about ``block`` tokens.

    Args:
        stride: tokens from one window to the next; each window scores its last ``stride`` tokens.
        sample: draw so many of the windows behind the first one, at random but always the same; the tokens that no
            drawn window scores have the loss NaN. 0: all windows.
    """
    size = block if isinstance(block, BlockSize) else BlockSize(block)
    n_prefix = len(model.prefix_ids)
    text = window - n_prefix
    if text < stride:
        raise UserError(
            f"a window of {window} has no room for {stride} scored tokens behind {n_prefix} sink tokens; "
            "enlarge --window or lower --stride."
        )
    # A window ends at (and does not include) a token; causality lets the first one score all of its tokens.
    ends = np.append(np.arange(text, len(ids) - 1, stride), len(ids) - 1)
    counts = np.diff(ends, prepend=0)
    if sample and sample < len(ends) - 1:
        drawn = 1 + np.sort(np.random.default_rng(0).choice(len(ends) - 1, sample, replace=False))
        ends, counts = ends[drawn], counts[drawn]
    nll = np.full(len(ids) - 1, np.nan, dtype=np.float32)
    done = 0
    while done < len(ends):
        n = 1 if counts[done] > stride else max(1, size.tokens // window)
        tokens, targets = _windows(model.prefix_ids, ids, text, ends[done : done + n], counts[done : done + n])

        def forward(tokens: Any = tokens, targets: Any = targets) -> Tensor:
            hidden = model.hidden(upload(tokens, model.embed.weight.device))
            return scored(model, hidden[:, -targets.shape[1] :], targets)

        losses = size.attempt(forward)
        if losses is None:
            continue
        where = np.concatenate(
            [np.arange(e - c, e) for e, c in zip(ends[done : done + n], counts[done : done + n], strict=True)]
        )
        nll[where] = finite(losses.cpu().numpy(), where + 1)
        done += len(tokens)
        if advance:
            advance(int(ends[done - 1]))
    return nll


def _windows(
    prefix: tuple[int, ...], ids: Ids, text: int, ends: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens [windows, length] of the windows with these ends, and the targets of their last tokens."""
    length = min(text, int(ends.min()))
    places = ends[:, None] + np.arange(-length, 0)
    own = np.broadcast_to(np.array(prefix, dtype=np.int64), (len(ends), len(prefix)))
    tokens = np.concatenate((own, _take(ids, places)), axis=1)
    widest = int(counts.max())
    late = np.arange(-widest, 0)
    targets = np.where(late >= -counts[:, None], _take(ids, ends[:, None] + late + 1), NO_TARGET)
    return tokens, targets


def _take(ids: Ids, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """``ids[places]``, reading no more of a file than it must."""
    low = int(places.min())
    return np.asarray(ids[low : int(places.max()) + 1], dtype=np.int64)[places - low]
