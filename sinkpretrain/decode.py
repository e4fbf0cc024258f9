"""Token after token at constant memory: an engine that reads, and a stream of tokens that it draws and reads.

The cache is a ring that is written in place (``sinkpretrain.ring``). All state of a step lives in tensors on the
device, the count of tokens included, so that a step is a fixed sequence of kernels: on a GPU it is captured once in a
CUDA graph and replayed, the drawing of the next token with it, and the host only looks at the tokens as they come out.

Letters of the axes: B batch, T tokens, S slots, C width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sinkpretrain.cache import Cache
from sinkpretrain.errors import UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.ring import Layout, Places
from sinkpretrain.ring_attention import RingAttention, Rings
from sinkpretrain.sampling import NOT_FINITE, Sampler

BLOCK = 128
"""Most tokens per forward; longer texts are read in several."""

WARM_UP = 2
"""Calls before one is captured: kernels are compiled and workspaces allocated in the first."""


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
        self._products: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if device.type == "cuda":
            from sinkpretrain.one_row import OneRow  # Triton comes with torch for GPUs

            self._products = OneRow()
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
        """Let torch.compile fuse what a step does; takes up to a minute when the first is taken.

        Raises:
            UserError: the model's forward is not known to allow it.
        """
        if not self.model.replayable:
            raise UserError("a model that transformers' code runs is not compiled; leave --compile out.")
        self._trunk = torch.compile(self._last_logits, fullgraph=True, dynamic=False)

    @property
    def count(self) -> int:
        """Tokens read, the model's prefix included."""
        return int(self.rings.count_1)

    def _forward(self, tokens_T: Tensor) -> None:
        one = len(tokens_T) == 1
        self.logits_V.copy_(self._trunk(tokens_T) if one else self._last_logits(tokens_T))
        if self.tracks_ids or not one:
            places = Places(self.rings.layout, self.rings.positions(len(tokens_T)))
            self._ids_S.index_copy_(0, places.slot, tokens_T)
            self.cached_S.copy_(torch.where(places.visible[-1], self._ids_S, -1))
        self.rings.count_1.add_(len(tokens_T))

    def _last_logits(self, tokens_T: Tensor) -> Tensor:
        length = len(tokens_T)
        places = None
        if self.model.placed:  # in-cache positions, as everywhere
            places = self.rings.positions(length).clamp(max=self.cache.size)
        with self._products if length == 1 else contextlib.nullcontext():
            hidden_BTC = self.model.hidden(tokens_T[None], RingAttention(self.rings, length), places)
            logits: Tensor = self.model.head(hidden_BTC[0, -1])
        return logits


class Replayed:
    """A function that always does the same on the same tensors; on a GPU, captured in a CUDA graph and replayed.

    Args:
        function: without arguments or result.
        generator: what it draws from.
        captures: whether it may be captured.
    """

    def __init__(self, function: Callable[[], None], generator: torch.Generator, captures: bool = True) -> None:
        self.function, self.generator = function, generator
        self._captures = captures and generator.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._graph is None and self._captures and self._calls > WARM_UP:
            self._graph = torch.cuda.CUDAGraph()
            self._graph.register_generator_state(self.generator)
            with torch.cuda.graph(self._graph):
                self.function()
        if self._graph is None:
            self.function()
        else:
            self._graph.replay()


class TokenStream:
    """Endless tokens, each drawn from the logits and read by the engine before it is given out.

    On a GPU one step ahead of the host: while a token is looked at, the next one is being computed, so that every token
    that was given out is part of the stream, wherever its reader stops.
    """

    def __init__(self, engine: Engine, sampler: Sampler) -> None:
        assert engine.tracks_ids or not sampler.reads_cached
        self.engine, self.sampler = engine, sampler
        self._drawn_1 = torch.zeros_like(engine.token_1)
        self._advance = Replayed(self._step_and_draw, sampler.generator, engine.model.replayable)
        self._outbox = Outbox(engine.device)

    def __iter__(self) -> Iterator[int]:
        """Draw from what was read last; raises UserError where the model's predictions are not finite."""
        self._draw()
        while True:
            look = self._outbox.send(self._drawn_1)
            self._advance()
            token = look()
            if token == NOT_FINITE:
                raise UserError(
                    f"the model's predictions are not finite after {self.engine.count - 1:,} tokens of the stream; "
                    "use --dtype float32, or check the weights."
                )
            yield token

    @torch.inference_mode()
    def _draw(self) -> None:
        drawn_1 = self.sampler(self.engine.logits_V, self.engine.cached_S)
        self._drawn_1.copy_(drawn_1)
        self.engine.token_1.copy_(drawn_1.clamp(min=0))  # for what is no number, some token

    def _step_and_draw(self) -> None:
        self.engine.step()
        self._draw()


class Outbox:
    """Brings numbers from the device to the host without waiting for what the device was told to do after them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._places = [torch.zeros(1, dtype=torch.int64, pin_memory=self._on_gpu) for _ in range(2)]

    def send(self, number_1: Tensor) -> Callable[[], int]:
        """Returns the function that waits for the number; it must be called before the next but one is sent."""
        if not self._on_gpu:
            number = int(number_1)
            return lambda: number
        place = self._places[0]
        self._places.reverse()
        place.copy_(number_1, non_blocking=True)
        sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        sent.record()

        def look() -> int:
            sent.synchronize()
            return int(place)

        return look
