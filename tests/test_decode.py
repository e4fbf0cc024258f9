"""The decoding engine against the evaluator, across eviction and laps of the ring; nothing is allocated as it goes."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, peaked
from family_factory import MODELS, build, save
from numpy.typing import NDArray

from sinkpretrain.cache import Cache
from sinkpretrain.config import SinkConfig
from sinkpretrain.decode import Engine, TokenStream
from sinkpretrain.errors import UserError
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.ring import Layout, Places
from sinkpretrain.sampling import Sampler, Sampling
from sinkpretrain.streaming import stream_nll, token_loop_nll

Ids = NDArray[np.int64]


def text(length: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, 96, length)


def nll(engine: Engine, ids: Ids) -> NDArray[np.float32]:
    """Losses of a text that the engine reads one token at a time."""
    return np.array(
        [F.cross_entropy(engine.step(int(a)).cpu(), torch.tensor(b)).item() for a, b in itertools.pairwise(ids)],
        dtype=np.float32,
    )


def sampler(net: GPTNeoX, sampling: Sampling | None = None, seed: int = 0) -> Sampler:
    forbidden = torch.arange(net.config.vocab_size) >= net.config.tokenizer_size
    return Sampler(sampling or Sampling(), forbidden, torch.Generator().manual_seed(seed))


@pytest.fixture
def net(mechanism: SinkConfig) -> GPTNeoX:
    return peaked(GPTNeoX(TINY, mechanism, seed=4)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: save(build(name), root / name) for name in MODELS}


@pytest.fixture
def vanilla() -> GPTNeoX:
    return peaked(GPTNeoX(TINY, seed=4)).eval()


@pytest.mark.parametrize(("cache", "block"), [("0+16", 1), ("1+15", 5), ("4+12", 3), ("5+1", 2)])
def test_steps_equal_the_evaluator(net: GPTNeoX, cache: str, block: int) -> None:
    ids, c = text(90), Cache.parse(cache)
    assert np.abs(nll(Engine(net, c, block=block), ids) - stream_nll(net, ids, c)).max() < 1e-4


def test_steps_equal_the_token_loop(net: GPTNeoX) -> None:
    ids, c = text(40), Cache(2, 9)
    assert np.abs(nll(Engine(net, c, block=4), ids) - token_loop_nll(net, ids, c)).max() < 1e-4


@pytest.mark.parametrize("cache", ["0+16", "4+12", "1+6"])
def test_a_window_of_the_model_is_respected(cache: str) -> None:
    net = peaked(GPTNeoX(dataclasses.replace(TINY, window=9, window_sinks=2), SinkConfig("stable_mask"), seed=4)).eval()
    ids, c = text(60), Cache.parse(cache)
    assert np.abs(nll(Engine(net, c, block=3), ids) - stream_nll(net, ids, c)).max() < 1e-4


def test_dropped_column() -> None:
    net, ids, c = peaked(GPTNeoX(TINY, SinkConfig("zero_sink"), seed=4)).eval(), text(60), Cache(0, 16)
    want = stream_nll(net, ids, c, drop_column=True)
    assert np.abs(nll(Engine(net, c, drop_column=True), ids) - want).max() < 1e-4
    assert np.abs(nll(Engine(net, c), ids) - want).max() > 1e-2


@pytest.mark.parametrize("lengths", [(1, 50, 1, 30), (64, 1, 1, 20), (3, 100, 40)])
def test_texts_in_blocks_and_tokens_one_by_one_mix(net: GPTNeoX, lengths: tuple[int, ...]) -> None:
    """A prompt, an answer, another prompt: the same stream, however it comes in."""
    ids, c = text(200), Cache(3, 14)
    want = stream_nll(net, ids, c)
    engine, at = Engine(net, c, block=16), 0
    for length in lengths:
        logits = engine.read(ids[at : at + length].tolist()) if length > 1 else engine.step(int(ids[at]))
        at += length
        assert F.cross_entropy(logits, torch.tensor(ids[at])).item() == pytest.approx(want[at - 1], abs=1e-4)


@pytest.mark.parametrize("wrong", ["4+13", "3+12", "4+11"])
def test_another_cache_is_another_answer(vanilla: GPTNeoX, wrong: str) -> None:
    """Negative control: one key more or less is far outside of the tolerance."""
    ids = text(90)
    want = stream_nll(vanilla, ids, Cache(4, 12))
    assert np.abs(nll(Engine(vanilla, Cache.parse(wrong)), ids) - want).max() > 1e-2


@pytest.mark.parametrize("broken", ["older", "place", "index", "key", "slot", "visible"])
def test_every_place_matters(vanilla: GPTNeoX, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: each of the places, off by one, is far outside of the tolerance."""
    made = Places.__init__

    def off(self: Places, layout: Layout, position: torch.Tensor) -> None:
        made(self, layout, position)
        value = getattr(self, broken)
        by_one = value.roll(1, dims=-1) if value.dtype == torch.bool else (value + 1).clamp(max=layout.ring - 1)
        setattr(self, broken, by_one)

    monkeypatch.setattr(Places, "__init__", off)
    ids, c = text(90), Cache(4, 12)
    difference = np.abs(nll(Engine(vanilla, c, block=2), ids) - stream_nll(vanilla, ids, c)).max()
    assert not difference < 1e-2  # or no number at all


def test_nothing_grows_and_nothing_moves(net: GPTNeoX) -> None:
    """Many times the cache, at random: every buffer is where it was, and the stream goes on."""
    engine = Engine(net, Cache(4, 12), block=8)
    engine.read([1, 2, 3])
    tensors = [t for b in engine.rings.buffers.values() for t in (b.k, b.v)] + [engine.logits_V, engine.token_1]
    before, size = [t.data_ptr() for t in tensors], engine.rings.memory_bytes()
    tokens = list(itertools.islice(TokenStream(engine, sampler(net)), 300))
    assert max(tokens) < 96
    assert len(set(tokens)) > 10
    after = [t for b in engine.rings.buffers.values() for t in (b.k, b.v)] + [engine.logits_V, engine.token_1]
    assert [t.data_ptr() for t in after] == before
    assert engine.rings.memory_bytes() == size
    assert engine.count == len(net.prefix_ids) + 3 + 300


def test_a_trillion_tokens_later_it_is_as_exact(vanilla: GPTNeoX) -> None:
    """Only places in the ring matter, and no angle grows: whole laps more change not a bit."""
    ids = text(60)
    young, old = Engine(vanilla, Cache(4, 12)), Engine(vanilla, Cache(4, 12))
    for engine in (young, old):
        engine.read(ids[:40].tolist())
    with torch.inference_mode():
        old.rings.count_1.add_(old.rings.layout.ring * 10**10)
    for token in ids[40:]:
        assert torch.equal(young.step(int(token)), old.step(int(token)))


def test_what_is_drawn_is_what_is_read(vanilla: GPTNeoX) -> None:
    """Wherever a reader stops, the tokens that it has seen are the stream: reading them anew gives the same logits."""
    engine = Engine(vanilla, Cache(4, 12))
    engine.read([5, 6])
    drawn = list(itertools.islice(TokenStream(engine, sampler(vanilla)), 40))
    again = Engine(vanilla, Cache(4, 12))
    assert (engine.logits_V - again.read([5, 6, *drawn])).abs().max() < 1e-4
    engine.read([7])
    assert (engine.logits_V - again.read([7])).abs().max() < 1e-4


def test_the_repetition_penalty_knows_the_cache_and_no_more(vanilla: GPTNeoX) -> None:
    engine = Engine(vanilla, Cache(2, 5), block=4)
    ids = list(range(10, 40))
    engine.read(ids)
    assert sorted(i for i in engine.cached_S.tolist() if i >= 0) == [10, 11, *range(34, 40)]
    logits = [engine.logits_V.clone(), engine.cached_S.clone()]
    assert int(sampler(vanilla, Sampling(temperature=0, repetition_penalty=1e9))(*logits)) not in [10, 11, 38, 39]


def test_predictions_that_are_no_numbers_are_reported() -> None:
    net = GPTNeoX(TINY, seed=4).eval()
    with torch.no_grad():
        net.embed.weight[5] = float("nan")
    engine = Engine(net, Cache(0, 3))
    engine.read([1, 2, 5])
    with pytest.raises(UserError, match="not finite after 3 tokens"):
        next(iter(TokenStream(engine, sampler(net))))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("cache", ["0+12", "4+8"])
def test_every_family(name: str, cache: str, folders: dict[str, Path]) -> None:
    """Grouped heads, ALiBi, learned positions, sliding windows, scaled angles: as the evaluator."""
    net, ids, c = load_model(folders[name]).model, text(50), Cache.parse(cache)
    engine = Engine(net, c, block=6)
    assert np.abs(nll(engine, ids) - stream_nll(net, ids, c)).max() < 1e-4
    again = Engine(net, c, block=6)
    again.read(ids[:-1].tolist())
    assert (engine.logits_V - again.logits_V).abs().max() < 1e-3
