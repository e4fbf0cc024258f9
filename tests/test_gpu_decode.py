"""Decoding on CUDA: the kernels for one token, and steps replayed from a graph."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, peaked
from family_factory import MODELS, build, save
from test_decode import nll, sampler, text
from test_foreign import MODELS as FOREIGN
from test_foreign import build as build_foreign

from sinkpretrain.cache import Cache
from sinkpretrain.config import SinkConfig
from sinkpretrain.decode import Engine, TokenStream
from sinkpretrain.language import LanguageModel
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.sampling import Sampler, Sampling
from sinkpretrain.streaming import stream_nll

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def agrees(net: LanguageModel, cache: Cache, ids: np.ndarray, block: int = 8) -> None:
    want = stream_nll(net, ids, cache)
    engine = Engine(net.to("cuda"), cache, block=block)
    assert engine.rings.one_token is not None
    assert np.abs(nll(engine, ids) - want).max() < 1e-4


@pytest.mark.parametrize("cache", ["4+12", "0+90"])
def test_steps_equal_the_evaluator(mechanism: SinkConfig, cache: str) -> None:
    agrees(peaked(GPTNeoX(TINY, mechanism, seed=4)).eval(), Cache.parse(cache), text(150))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_family(name: str, tmp_path: Path) -> None:
    agrees(load_model(save(build(name), tmp_path)).model, Cache(4, 8), text(60))


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", "gemma3_text", "opt", "phi"])
def test_kinds_that_transformers_runs(kind: str, tmp_path: Path) -> None:
    """No graph is made of their steps: what transformers' code does in them is not known."""
    ids, cache = text(60), Cache(4, 8)
    net = load_model(save(build_foreign(kind, **FOREIGN[kind]), tmp_path)).model
    want = stream_nll(net, ids, cache)
    net = net.to("cuda")
    assert np.abs(stream_nll(net, ids, cache) - want).max() < 1e-3
    engine = Engine(net, cache, block=8)
    assert np.abs(nll(engine, ids) - want).max() < 1e-3
    forbidden = torch.zeros(net.config.vocab_size, dtype=torch.bool, device="cuda")
    stream = TokenStream(engine, Sampler(Sampling(0.0), forbidden, torch.Generator("cuda")))
    assert len(list(itertools.islice(stream, 20))) == 20
    assert stream._advance._graph is None


def test_windows_and_pinned_sinks() -> None:
    config = dataclasses.replace(TINY, window=9, window_sinks=2)
    agrees(peaked(GPTNeoX(config, SinkConfig("stable_mask"), seed=4)).eval(), Cache(4, 12), text(60))


@pytest.mark.parametrize("sink", ["vanilla", "key_value_bias"])
def test_a_cache_of_several_tiles_per_program(sink: str) -> None:
    """Read in blocks to shortly before the ring is full, then across its end in steps."""
    net = peaked(GPTNeoX(TINY, SinkConfig(sink), seed=4)).eval()
    ids, cache, steps = text(2700), Cache(4, 2500), 150
    want = stream_nll(net, ids, cache)[-steps:]
    engine = Engine(net.cuda(), cache)
    engine.read(ids[: -steps - 1].tolist())
    assert np.abs(nll(engine, ids[-steps - 1 :]) - want).max() < 1e-4


def gpu_sampler(sampling: Sampling, seed: int = 0) -> Sampler:
    forbidden = torch.arange(TINY.vocab_size, device="cuda") >= TINY.tokenizer_size
    return Sampler(sampling, forbidden, torch.Generator("cuda").manual_seed(seed))


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_a_replayed_step_is_a_step(penalty: float) -> None:
    """Greedy, so that the CPU can say what must come; across laps of the ring and from turn to turn."""
    net = peaked(GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 2}), seed=4)).eval()
    greedy = Sampling(temperature=0.0, repetition_penalty=penalty)
    on_cpu = Engine(net, Cache(4, 12), block=8)
    streams = [TokenStream(on_cpu, sampler(net, greedy))]
    on_cpu.read([5, 6, 7])
    want = list(itertools.islice(streams[0], 60))
    on_cpu.read([8, 9])
    want += list(itertools.islice(streams[0], 30))
    on_gpu = Engine(net.cuda(), Cache(4, 12), block=8, tracks_ids=penalty != 1)
    stream = TokenStream(on_gpu, gpu_sampler(greedy))
    on_gpu.read([5, 6, 7])
    got = list(itertools.islice(stream, 60))
    on_gpu.read([8, 9])
    got += list(itertools.islice(stream, 30))
    assert got == want
    assert on_gpu.count == 2 + 3 + 60 + 2 + 30


def test_draws_in_a_graph_follow_the_seed_and_nothing_is_allocated() -> None:
    net = peaked(GPTNeoX(TINY, seed=4)).eval().cuda()

    def draws(seed: int) -> list[int]:
        engine = Engine(net, Cache(4, 12))
        engine.read([1, 2])
        stream = iter(TokenStream(engine, gpu_sampler(Sampling(temperature=2.0), seed)))
        first = list(itertools.islice(stream, 20))
        before = torch.cuda.memory_allocated()
        rest = list(itertools.islice(stream, 300))
        assert torch.cuda.memory_allocated() <= before + 4096  # events and the like
        assert len(set(rest)) > 20
        return first + rest

    assert draws(1) == draws(1) != draws(2)


def test_compiled_steps() -> None:
    net, ids, cache = peaked(GPTNeoX(TINY, SinkConfig("zero_sink"), seed=4)).eval(), text(60), Cache(4, 12)
    want = stream_nll(net, ids, cache)
    engine = Engine(net.cuda(), cache, block=8)
    engine.compile()
    assert np.abs(nll(engine, ids) - want).max() < 1e-4


def test_bf16_is_near() -> None:
    net, ids, cache = peaked(GPTNeoX(TINY, seed=4), factor=2.0).eval(), text(150), Cache(4, 40)
    want = stream_nll(net, ids, cache)
    assert abs((nll(Engine(net.bfloat16().cuda(), cache), ids) - want).mean()) < 0.05
