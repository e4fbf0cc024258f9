"""Token after token at constant memory: an engine that reads, and a stream of tokens that it draws and reads.

The cache is a ring that is written in place (``sinkpretrain.ring``). All state of a step lives in tensors on the
device, the count of tokens included, so that a step is a fixed sequence of kernels: on a GPU it is captured once in a
CUDA graph and replayed, the drawing of the next token with it, and the host only looks at the tokens as they come out.

Letters of the axes: B batch, H heads, K heads of keys and values, T queries, S slots, D dimensions of a head,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sinkpretrain import sinks
from sinkpretrain.attention import merge_column, rotate
from sinkpretrain.errors import UserError
from sinkpretrain.language import Attend, LanguageModel
from sinkpretrain.ring import LayerBuffer, Layout, Places
from sinkpretrain.sampling import NOT_FINITE, Sampler
from sinkpretrain.streaming import Cache, Seen

BLOCK = 128
"""Most tokens per forward; longer texts are read in several."""


class Engine:
    """A stream through a model: what has been read is in the buffers, what may come next in ``logits_V``.

    Reading a text gives the losses of ``sinkpretrain.streaming.stream_nll`` with the same cache. The model's prefix
    (sink tokens) is read first and counts into the x of the cache.

    Args:
        model: in evaluation mode, on the device and in the dtype to compute in.
        cache: x initial positions and y recent ones; the token being read is attended in addition.
        drop_column: leave the mechanism's softmax column out.
        block: most tokens per forward; does not change the numbers.
    """

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, cache: Cache, *, drop_column: bool = False, block: int = BLOCK) -> None:
        self.model, self.cache, self.drop_column = model, cache, drop_column
        self.layout = Layout(cache, block)
        self.device = model.embed.weight.device
        self.buffers: dict[int, LayerBuffer] = {}
        self._rope = model.rope(torch.arange(self.layout.angles, device=self.device))
        self.count_1 = torch.zeros(1, dtype=torch.int64, device=self.device)  # tokens read
        self.token_1 = torch.zeros(1, dtype=torch.int64, device=self.device)  # the next to be read
        self.logits_V = torch.zeros(model.head.weight.shape[0], dtype=torch.float32, device=self.device)
        # Ids of the tokens in the slots, and of those that the last query saw; -1 where there is none.
        self._ids_S = torch.full((self.layout.slots,), -1, dtype=torch.int64, device=self.device)
        self.cached_S = self._ids_S.clone()
        if model.prefix_ids:
            self.read(model.prefix_ids)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], advance: Callable[[int], None] | None = None) -> Tensor:
        """Read tokens in blocks; returns the logits after the last, fp32 [V], in a buffer that is used again.

        ``advance`` is told after every block how many have been read.
        """
        assert len(ids), "nothing to read"
        block = self.layout.block
        for start in range(0, len(ids), block):
            self._forward(torch.tensor(ids[start : start + block], dtype=torch.int64).to(self.device))
            if advance:
                advance(min(len(ids), start + block))
        return self.logits_V

    @torch.inference_mode()
    def step(self, token: int | None = None) -> Tensor:
        """Read one token, the one in ``token_1`` unless another is given; returns the logits after it."""
        if token is not None:
            self.token_1.fill_(token)
        self._forward(self.token_1)
        return self.logits_V

    def memory_bytes(self) -> int:
        """Size of the cache, which does not change any more once something has been read."""
        return sum(t.numel() * t.element_size() for b in self.buffers.values() for t in (b.k, b.v))

    def _forward(self, tokens_T: Tensor) -> None:
        places = Places(self.layout, self.count_1, len(tokens_T))
        hidden_BTC = self.model.hidden(tokens_T[None], self._attend(places), places.place)
        self.logits_V.copy_(self.model.head(hidden_BTC[0, -1]))
        self._ids_S.index_copy_(0, places.slot, tokens_T)
        self.cached_S.copy_(torch.where(places.visible[-1], self._ids_S, -1))
        self.count_1.add_(len(tokens_T))

    def _attend(self, places: Places) -> Attend:
        """The attention function: ring attention as plain operations, for any number of tokens."""
        x, ring = self.cache.start, self.layout.ring
        rope_k, rope_place, rope_same, rope_before = (
            (self._rope[0][at], self._rope[1][at])
            for at in (places.key, places.place, places.index, places.index + ring)
        )
        query, key = places.place[:, None], places.place[:, None] - places.distance
        groups = {w: Seen.of(self.model, w, query, key, places.visible) for w in set(self.model.windows)}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            buffer, seen = self._buffer(layer, k, v), groups[self.model.windows[layer]]
            buffer.k.index_copy_(2, places.slot, rotate(k, *rope_k))
            buffer.v.index_copy_(2, places.slot, v)
            q_place = rotate(q, *rope_place)
            start_k, ring_k = buffer.k[:, :, :x], buffer.k[:, :, x:]
            from_start = grouped_logits(q_place, start_k)
            from_same = grouped_logits(rotate(q, *rope_same), ring_k)
            from_before = grouped_logits(rotate(q, *rope_before), ring_k)
            logits = torch.cat((from_start, torch.where(places.older, from_before, from_same)), dim=-1)
            if sink.weigher is not None:
                return grouped_values(sink.weigher(logits, seen.visible), buffer.v)
            logits = logits + seen.bias
            lse = torch.logsumexp(logits, dim=-1)
            out = grouped_values(torch.exp(logits - lse.unsqueeze(-1)), buffer.v)
            column = None if self.drop_column else sink.column(q_place, seen.visible.sum(-1))
            return merge_column(out, lse, column)

        return attend

    def _buffer(self, layer: int, k: Tensor, v: Tensor) -> LayerBuffer:
        if layer not in self.buffers:
            self.buffers[layer] = LayerBuffer.empty(k, v, self.layout.slots)
        return self.buffers[layer]


def grouped_logits(q_BHTD: Tensor, k_BKSD: Tensor) -> Tensor:
    """q . k / sqrt(D), fp32 [B, H, T, S]; H / K neighbouring heads of queries share one of keys."""
    scale: float = q_BHTD.shape[-1] ** -0.5
    return _shared(q_BHTD, k_BKSD.float().mT) * scale


def grouped_values(weights_BHTS: Tensor, v_BKSD: Tensor) -> Tensor:
    """Values under weights, fp32 [B, H, T, D]."""
    return _shared(weights_BHTS, v_BKSD.float())


def _shared(a_BHTM: Tensor, b_BKMN: Tensor) -> Tensor:
    B, H, T, M = a_BHTM.shape
    K, N = b_BKMN.shape[1], b_BKMN.shape[3]
    return (a_BHTM.float().reshape(B, K, H // K * T, M) @ b_BKMN).view(B, H, T, N)


# --- drawing and reading ------------------------------------------------------------------------------------------


class TokenStream:
    """Endless tokens, each drawn from the logits and read by the engine before it is given out.

    On a GPU one step ahead of the host: while a token is looked at, the next one is being computed, so that every token
    that was given out is part of the stream, wherever its reader stops.
    """

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        self.engine, self.sampler = engine, sampler
        self._drawn_1 = torch.zeros_like(engine.token_1)

    def __iter__(self) -> Iterator[int]:
        """Draw from what was read last; raises UserError where the model's predictions are not finite."""
        self._draw()
        while True:
            token = int(self._drawn_1)
            if token == NOT_FINITE:
                raise UserError(
                    f"the model's predictions are not finite after {int(self.engine.count_1):,} tokens of the stream; "
                    "use --dtype float32, or check the weights."
                )
            self._advance()
            yield token

    @torch.inference_mode()
    def _draw(self) -> None:
        drawn_1 = self.sampler(self.engine.logits_V, self.engine.cached_S)
        self._drawn_1.copy_(drawn_1)
        self.engine.token_1.copy_(drawn_1.clamp(min=0))  # of what is no number, some token

    def _advance(self) -> None:
        self.engine.step()
        self._draw()
