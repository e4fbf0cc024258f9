"""Token after token at constant memory: an engine that reads, and a stream of tokens that it draws and reads.

The cache is a ring that is written in place (``sinkpretrain.ring``). All state of a step lives in tensors on the
device, the count of tokens included, so that a step is a fixed sequence of kernels: on a GPU it is captured once in a
CUDA graph and replayed, the drawing of the next token with it, and the host only looks at the tokens as they come out.

Letters of the axes: B batch, T tokens, S slots, C width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sinkpretrain.errors import UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.ring import Layout
from sinkpretrain.ring_attention import RingAttention, Rings
from sinkpretrain.sampling import NOT_FINITE, Sampler
from sinkpretrain.streaming import Cache

BLOCK = 128
"""Most tokens per forward; longer texts are read in several."""

WARM_UP = 3
"""Steps before one is captured: kernels are compiled and workspaces allocated in the first."""


class Engine:
    """A stream through a model: what has been read is in the rings, what may come next in ``logits_V``.

    Reading a text gives the losses of ``sinkpretrain.streaming.stream_nll`` with the same cache. The model's prefix
    (sink tokens) is read first and counts into the x of the cache.

    Args:
        model: in evaluation mode, on the device and in the dtype to compute in.
        cache: x initial positions and y recent ones; the token being read is attended in addition.
        drop_column: leave the mechanism's softmax column out.
        block: most tokens per forward; does not change the numbers.
        tracks_ids: keep ``cached_S`` up to date while single tokens are read.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LanguageModel,
        cache: Cache,
        *,
        drop_column: bool = False,
        block: int = BLOCK,
        tracks_ids: bool = True,
    ) -> None:
        self.model, self.cache, self.tracks_ids = model, cache, tracks_ids
        self.rings = Rings(model, Layout(cache, block), drop_column)
        self.device = device = self.rings.device
        self.token_1 = torch.zeros(1, dtype=torch.int64, device=device)  # the next to be read
        self.logits_V = torch.zeros(model.head.weight.shape[0], dtype=torch.float32, device=device)
        # Ids of the tokens in the slots, and of those that the last query saw; -1 where there is none.
        self._ids_S = torch.full((self.rings.layout.slots,), -1, dtype=torch.int64, device=device)
        self.cached_S = self._ids_S.clone()
        self._trunk: Callable[[Tensor], Tensor] = self._last_logits
        if model.prefix_ids:
            self.read(model.prefix_ids)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], advance: Callable[[int], None] | None = None) -> Tensor:
        """Read tokens in blocks; returns the logits after the last, fp32 [V], in a buffer that is used again.

        ``advance`` is told after every block how many have been read.
        """
        assert len(ids), "nothing to read"
        block = self.rings.layout.block
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

    def compile(self) -> None:
        """Let torch.compile fuse what a step does; takes up to a minute when the first is taken."""
        self._trunk = torch.compile(self._last_logits, fullgraph=True, dynamic=False)

    @property
    def count(self) -> int:
        """Tokens read, the model's prefix included."""
        return int(self.rings.count_1)

    def _forward(self, tokens_T: Tensor) -> None:
        one = len(tokens_T) == 1
        self.logits_V.copy_(self._trunk(tokens_T) if one else self._last_logits(tokens_T))
        if self.tracks_ids or not one:
            places = self.rings.places(len(tokens_T))
            self._ids_S.index_copy_(0, places.slot, tokens_T)
            self.cached_S.copy_(torch.where(places.visible[-1], self._ids_S, -1))
        self.rings.count_1.add_(len(tokens_T))

    def _last_logits(self, tokens_T: Tensor) -> Tensor:
        places = self.rings.places(len(tokens_T))
        learned = None if self.model.learned_positions is None else places.place
        hidden_BTC = self.model.hidden(tokens_T[None], RingAttention(self.rings, places), learned)
        logits: Tensor = self.model.head(hidden_BTC[0, -1])
        return logits


class TokenStream:
    """Endless tokens, each drawn from the logits and read by the engine before it is given out.

    On a GPU one step ahead of the host: while a token is looked at, the next one is being computed, so that every token
    that was given out is part of the stream, wherever its reader stops.
    """

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        assert engine.tracks_ids or not sampler.reads_cached
        self.engine, self.sampler = engine, sampler
        self._drawn_1 = torch.zeros_like(engine.token_1)
        self._on_gpu = engine.device.type == "cuda"
        self._host = torch.zeros(2, dtype=torch.int64, pin_memory=self._on_gpu)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    def __iter__(self) -> Iterator[int]:
        """Draw from what was read last; raises UserError where the model's predictions are not finite."""
        self._draw()
        while True:
            look = self._fetch()
            self._advance()
            token = look()
            if token == NOT_FINITE:
                raise UserError(
                    f"the model's predictions are not finite after {self.engine.count - 1:,} tokens of the stream; "
                    "use --dtype float32, or check the weights."
                )
            yield token

    def _fetch(self) -> Callable[[], int]:
        """Send the drawn token to the host; the function returned waits for it and nothing else."""
        if not self._on_gpu:
            token = int(self._drawn_1)
            return lambda: token
        place = self._host[self._steps % 2]
        place.copy_(self._drawn_1[0], non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record()

        def look() -> int:
            sent.synchronize()
            return int(place)

        return look

    @torch.inference_mode()
    def _draw(self) -> None:
        drawn_1 = self.sampler(self.engine.logits_V, self.engine.cached_S)
        self._drawn_1.copy_(drawn_1)
        self.engine.token_1.copy_(drawn_1.clamp(min=0))  # for what is no number, some token

    def _advance(self) -> None:
        self._steps += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._on_gpu and self._steps > WARM_UP:
            self._graph = self._captured()
            self._graph.replay()
        else:
            self.engine.step()
            self._draw()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.sampler.generator)
        with torch.inference_mode(), torch.cuda.graph(graph):
            self.engine.step()
            self._draw()
        return graph
