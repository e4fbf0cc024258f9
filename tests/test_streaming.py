"""The blocked evaluator against the token loop, the loop against transformers and published numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, peaked

from sinkpretrain import banded, ops, scoring
from sinkpretrain.banded import BandedAttention
from sinkpretrain.cache import Cache
from sinkpretrain.config import SinkConfig
from sinkpretrain.errors import UserError
from sinkpretrain.language import LanguageModel
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.streaming import (
    dense_nll,
    recompute_nll,
    stream_nll,
    token_loop_nll,
)

ORACLE = Path(__file__).parent / "oracle"
CACHES = ["0+16", "1+15", "4+12", "2+40", "5+1"]


def text(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, length)


@pytest.fixture
def net(mechanism: SinkConfig) -> GPTNeoX:
    return peaked(GPTNeoX(TINY, mechanism, seed=4)).eval()


@pytest.mark.parametrize("cache", CACHES)
def test_blocks_equal_the_token_loop(net: GPTNeoX, cache: str) -> None:
    ids = text(90)
    want = token_loop_nll(net, ids, Cache.parse(cache))
    for block in (1, 7, 30, 64, 1024):
        if block == 1 and cache != "4+12":
            continue
        got = stream_nll(net, ids, Cache.parse(cache), block=block)
        assert np.abs(got - want).max() < 1e-4, block


WINDOW = replace(TINY, window=9, window_sinks=2)


@pytest.mark.parametrize("cache", CACHES)
def test_a_model_trained_in_a_window_streams(mechanism: SinkConfig, cache: str) -> None:
    """Its window applies to slots in the cache, so that a far sink is near enough to be seen."""
    net = peaked(GPTNeoX(WINDOW, mechanism, seed=4)).eval()
    ids = text(90)
    want = token_loop_nll(net, ids, Cache.parse(cache))
    for block in (7, 64):
        assert np.abs(stream_nll(net, ids, Cache.parse(cache), block=block) - want).max() < 1e-4


def test_a_window_is_part_of_the_model(mechanism: SinkConfig) -> None:
    net = peaked(GPTNeoX(WINDOW, mechanism, seed=4)).eval()
    ids = text(60)
    sequence = torch.tensor([[*net.prefix_ids, *ids]])
    logits = net(sequence)[0, len(net.prefix_ids) : -1]
    want = F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none").detach().numpy()
    assert np.abs(dense_nll(net, ids, block=17) - want).max() < 1e-4
    full = peaked(GPTNeoX(TINY, mechanism, seed=4)).eval()
    assert np.abs(dense_nll(full, ids, block=17) - want).max() > 1e-2


def test_dropped_column(mechanism: SinkConfig) -> None:
    """Leaving the +1 out at test time is another model for the zero sink and the same one for the others."""
    net = peaked(GPTNeoX(TINY, mechanism, seed=4)).eval()
    ids, cache = text(100), Cache(0, 16)
    kept = stream_nll(net, ids, cache, block=32)
    dropped = stream_nll(net, ids, cache, block=32, drop_column=True)
    assert np.abs(dropped - token_loop_nll(net, ids, cache, drop_column=True)).max() < 1e-4
    assert (np.abs(kept - dropped).max() > 1e-2) == net.adds_column


def test_everything_cached_is_a_plain_forward(net: GPTNeoX) -> None:
    ids = text(60)
    sequence = torch.tensor([[*net.prefix_ids, *ids]])
    logits = net(sequence)[0, len(net.prefix_ids) : -1]
    want = F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none").detach().numpy()
    assert np.abs(dense_nll(net, ids, block=17) - want).max() < 1e-4
    assert np.abs(stream_nll(net, ids, Cache(4, 200), block=17) - want).max() < 1e-4


def test_recompute_is_a_fresh_forward_per_token(net: GPTNeoX) -> None:
    ids, window = text(60), 16
    got = recompute_nll(net, ids, window, block=5 * window)
    n = len(net.prefix_ids)
    for i in (0, 3, window - n - 1, window - n, 30, 58):
        recent = ids[max(0, i + 1 - (window - n)) : i + 1]
        logits = net(torch.tensor([[*net.prefix_ids, *recent]]))[0, -1]
        want = F.cross_entropy(logits, torch.tensor(ids[i + 1])).item()
        assert got[i] == pytest.approx(want, abs=1e-4)


def test_what_is_evicted_matters() -> None:
    """Negative control: the settings that the tests above compare do give different numbers."""
    net = peaked(GPTNeoX(TINY, seed=4)).eval()
    ids = text(150)
    results = [stream_nll(net, ids, Cache.parse(c)) for c in CACHES]
    for i, a in enumerate(results):
        for b in results[:i]:
            assert np.abs(a - b).max() > 0.05


def test_far_positions_stay_exact() -> None:
    """Beyond any training length the band's angles are still exact: text shifted by blocks gives the same scores."""
    net = peaked(GPTNeoX(TINY, seed=4)).eval()
    ids = np.tile(text(64), 400)
    nll = stream_nll(net, ids, Cache(0, 16), block=512)
    period = 64
    late = nll[390 * period : 391 * period]
    assert np.abs(late - nll[20 * period : 21 * period]).max() < 1e-4


def test_memory_does_not_grow_with_the_text() -> None:
    net = GPTNeoX(TINY, seed=4).eval()
    seen = []
    attend = BandedAttention(net, Cache(2, 30))
    for first in range(0, 64 * 20, 64):
        net.hidden(torch.zeros(1, 64, dtype=torch.int64), attend.block(first, 64))
        layer = attend.layers[0]
        seen.append((layer.start_k.shape[2], layer.band_k.shape[2]))
    assert set(seen) == {(2, 30)}


# --- as on a GPU, where what lies between the products is compiled ---------------------------------------------------


def compile_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "HAVE_TRITON", True)
    for module in (banded, scoring):
        monkeypatch.setattr(module, "can_compile", lambda _, rows=None: ops.can_compile(torch.device("cuda"), rows))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Streams compile as they do on a GPU, as far as a graph; the list has every graph."""
    found: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ops.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    compile_as_on_a_gpu(monkeypatch)
    yield found
    torch._dynamo.reset()
    ops.compiled.cache_clear()


@pytest.mark.filterwarnings("error:.*is not compiled")
def test_settings_and_models_share_compiled_code(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph costs seconds on a GPU. Here: rotation of queries and of keys, the first keys' merge, the loss."""
    nets = [peaked(GPTNeoX(TINY, seed=seed)).eval() for seed in (4, 5)]
    caches = [Cache(x, 40 - x) for x in (0, 1, 2, 4)]
    for length, block in ((600, 256), (300, 90), (271, 90)):  # the last block is shorter, or of one token
        got = [stream_nll(net, text(length), cache, block=block) for net in nets for cache in caches]
        assert 3 <= len(graphs) <= 4, [graph.code for graph in graphs]
        with monkeypatch.context() as plain:
            for module in (banded, scoring):
                plain.setattr(module, "can_compile", lambda device, rows=None: False)
            want = [stream_nll(net, text(length), cache, block=block) for net in nets for cache in caches]
        for a, b in zip(got, want, strict=True):
            assert np.abs(a - b).max() < 1e-5
    for x in (3, 5, 8, 7, 16, 11, 17, 30):  # three more merges: of 8 and of 16 keys, and of any number
        stream_nll(nets[0], text(300), Cache(x, 40 - x), block=90)
        stream_nll(nets[0], text(300), Cache(x, 30), block=50)
    assert len(graphs) <= 7


@pytest.mark.parametrize("sink", ["vanilla", "zero_sink", "softpick"])
@pytest.mark.parametrize("cache", ["0+16", "1+15", "4+12", "5+1", "17+3"])
def test_fused_equals_plain(sink: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of operations that is compiled on a GPU, here without a compiler."""
    net, ids, kept = peaked(GPTNeoX(TINY, SinkConfig(sink), seed=4)).eval(), text(90), Cache.parse(cache)
    parts = [slice(0, 40), slice(40, 71), slice(71, 73), slice(73, 90)]
    ways: list[dict[str, Any]] = [{"block": b} for b in (1, 7, 64)] + [{"block": 44}, {"block": 64, "parts": parts}]
    want = [stream_nll(net, ids, kept, **way) for way in ways]
    compile_as_on_a_gpu(monkeypatch)
    for module in (banded, scoring):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    for way, plain in zip(ways, want, strict=True):
        np.testing.assert_allclose(stream_nll(net, ids, kept, **way), plain, atol=2e-5, rtol=0)


@pytest.mark.parametrize("bad", ["4", "4+", "+4", "4+0", "a+b", "-1+4", "4,1020"])
def test_bad_caches_are_refused(bad: str) -> None:
    with pytest.raises(UserError, match="x\\+y"):
        Cache.parse(bad)


def short_of_memory(net: GPTNeoX, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Forwards of more than ``most`` tokens fail in the last layer, when the first has added to its cache; returns how
    many tokens each was of."""
    tried: list[int] = []
    last = net.blocks[-1]
    forward = last.forward

    def limited(x_BTC: torch.Tensor, attend: Any) -> torch.Tensor:
        tried.append(x_BTC.shape[0] * x_BTC.shape[1])
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(x_BTC, attend)

    monkeypatch.setattr(last, "forward", limited)
    return tried


@pytest.mark.parametrize("length", [300, 1000])
def test_memory_that_is_short_halves_the_blocks_and_no_loss_is_another(
    mechanism: SinkConfig, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tokens that did not fit, also where the text is shorter than a block."""
    net = peaked(GPTNeoX(TINY, mechanism, seed=4)).eval()
    ids, cache = text(length), Cache(2, 40)
    want = stream_nll(net, ids, cache, block=64)
    tried = short_of_memory(net, monkeypatch, most=160)
    with pytest.warns(scoring.MemoryShort, match="going on with"):
        got = stream_nll(net, ids, cache, block=512)
    assert np.abs(got - want).max() < 1e-5
    assert len([n for n in tried if n > 160]) == (1 if length == 300 else 2)
    assert 120 < tried[2] <= 160


def test_windows_that_no_memory_holds_are_told_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    net = peaked(GPTNeoX(TINY, seed=4)).eval()
    ids = text(400)
    want = recompute_nll(net, ids, 100, stride=50)
    short_of_memory(net, monkeypatch, most=150)
    with pytest.warns(scoring.MemoryShort):
        got = recompute_nll(net, ids, 100, stride=50, block=500)
    assert np.abs(got - want).max() < 1e-5
    tried = short_of_memory(net, monkeypatch, most=90)
    with pytest.warns(scoring.MemoryShort), pytest.raises(UserError, match="and a forward of 100 tokens; use"):
        recompute_nll(net, ids, 100, stride=50, block=500)
    assert tried == [500, 200, 100]


def test_non_finite_predictions_are_reported() -> None:
    net = GPTNeoX(TINY, seed=4).eval()
    with torch.no_grad():
        net.embed.weight[5] = float("nan")
    ids = np.array([1, 2, 3, 5, 4, 4])
    with pytest.raises(UserError, match="near token 3;"):
        stream_nll(net, ids, Cache(0, 1), block=2)
    with pytest.raises(UserError, match="near token 4;"):
        token_loop_nll(net, ids, Cache(0, 1))


# --- the numbers of the authors' own evaluator ---------------------------------------------------------------------


Oracle = tuple[LanguageModel, np.ndarray, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    with np.load(ORACLE / f"{request.param}.npz") as file:
        numbers = dict(file)
    return load_model(ORACLE / request.param).model, np.load(ORACLE / "token_ids.npy"), numbers


SETTINGS = [(0, 64), (1, 63), (4, 60), (4, 28), (4, 124)]


@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize(("start", "recent"), SETTINGS)
def test_reference_evaluator(start: int, recent: int, block: int, oracle: Oracle) -> None:
    """Also where a block is many caches long, whose angles would round differently."""
    net, ids, numbers = oracle
    got = stream_nll(net, ids, Cache(start, recent), block=block)
    difference = got - numbers[f"nll_start{start}_recent{recent}"]
    assert np.abs(difference).max() < 1e-4
    assert abs(difference.mean()) < 1e-5


def test_reference_dense_and_recompute(oracle: Oracle) -> None:
    net, ids, numbers = oracle
    for got, name in ((dense_nll(net, ids), "nll_dense"), (recompute_nll(net, ids, 64, block=4096), "nll_recompute64")):
        assert np.abs(got - numbers[name]).max() < 1e-4
        assert abs((got - numbers[name]).mean()) < 1e-5


@pytest.mark.parametrize("positions", ["in-cache", "absolute"])
def test_reference_without_position_shift_is_another_answer(positions, oracle: Oracle) -> None:
    """Negative control: eviction without in-cache positions is far outside the tolerance."""
    net, ids, numbers = oracle
    got = stream_nll(net, ids, Cache(4, 60), positions=positions)
    assert np.abs(got - numbers["nll_start4_recent60_noshift"]).max() > 0.1


@pytest.mark.parametrize(("start", "recent"), SETTINGS)
def test_reference_token_loop(start: int, recent: int, oracle: Oracle) -> None:
    net, ids, numbers = oracle
    length = 2 * (start + recent) + 20
    difference = token_loop_nll(net, ids[:length], Cache(start, recent))
    difference -= numbers[f"nll_start{start}_recent{recent}"][: length - 1]
    assert np.abs(difference).max() < 1e-4
    assert abs(difference.mean()) < 1e-5
