"""``sinkpretrain stream``: its files, its settings, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MECHANISMS, TINY, peaked
from data_factory import make_data
from tokenizers import Tokenizer, models, pre_tokenizers

from sinkpretrain.cache import Cache
from sinkpretrain.config import RunConfig, SinkConfig, save_yaml
from sinkpretrain.errors import UserError
from sinkpretrain.evaluate import one_token, perplexity, settings_for, stream
from sinkpretrain.load import load_model, save_weights
from sinkpretrain.model import GPTNeoX
from sinkpretrain.streaming import stream_nll, token_loop_nll


def make_run(folder: Path, sink: SinkConfig, tokenizer: Path | None = None) -> Path:
    net = peaked(GPTNeoX(TINY, sink, seed=4)).eval()
    save_weights(net, folder / "weights" / "step-0000003.safetensors", 3, folder.name)
    save_yaml(RunConfig(), folder / "config.yaml")
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", MECHANISMS["zero_sink"])


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 96, 300).astype(np.uint16))
    return tmp_path / "ids.npy"


def test_files_and_numbers(run: Path, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    results = stream(
        str(run), tokens=str(tokens), cache="0+16,4+12", strategy="streaming,dense,recompute", out=str(out),
        window=20, progress=False,
    )  # fmt: skip
    assert list(results["settings"]) == ["0+16", "0+16-nocolumn", "4+12", "dense", "recompute-20"]
    assert json.loads((out / "results.json").read_text()) == results
    net = peaked(GPTNeoX(TINY, MECHANISMS["zero_sink"], seed=4)).eval()
    want = stream_nll(net, np.load(tokens), Cache(4, 12))
    got = np.load(out / "4+12" / "nll.npy")
    assert got.shape == (299,)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < 1e-5
    setting = results["settings"]["4+12"]
    assert setting["ppl"] == pytest.approx(np.exp(got.astype(np.float64).mean()))
    assert setting["ppl_beyond_cache"] == pytest.approx(np.exp(got[16:].astype(np.float64).mean()))
    assert setting["interval"][0] < setting["ppl"] < setting["interval"][1]
    assert results["settings"]["0+16"]["column"] == "kept"
    assert results["settings"]["0+16-nocolumn"]["ppl"] != results["settings"]["0+16"]["ppl"]
    assert results["model"]["mechanism"] == "zero_sink"
    assert results["model"]["step"] == 3
    assert results["tokens"]["count"] == 300


def test_initial_tokens_can_be_replaced(tmp_path: Path, tokens: Path) -> None:
    """Each cache with tokens of the text among its first x a second time; sink tokens are not the text's."""
    run = make_run(tmp_path / "sink", MECHANISMS["sink_tokens_2"])
    where = {"tokens": str(tokens), "out": str(tmp_path / "o"), "progress": False}
    results = stream(str(run), cache="0+16,2+14,4+12", replace_initial="7", **where)
    assert list(results["settings"]) == ["0+16", "2+14", "4+12", "4+12-initial-7"]
    assert results["settings"]["4+12-initial-7"]["initial"] == 7
    ids = np.load(tokens).astype(np.int64)
    ids[:2] = 7
    net = peaked(GPTNeoX(TINY, MECHANISMS["sink_tokens_2"], seed=4)).eval()
    got = np.load(tmp_path / "o" / "4+12-initial-7" / "nll.npy")
    assert np.abs(got - token_loop_nll(net, ids, Cache(4, 12))).max() < 1e-4
    assert np.abs(got - np.load(tmp_path / "o" / "4+12" / "nll.npy"))[30:].max() > 1e-3
    for cache, strategy in (("0+16,2+14", "streaming"), ("4+12", "dense")):
        with pytest.raises(UserError, match="needs a cache x"):
            stream(str(run), cache=cache, strategy=strategy, replace_initial="7", **where)


def test_the_token_that_replaces_can_be_given_as_text(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "\n": 1, "word": 2, **{f"w{i}": i for i in range(3, 96)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_model(make_run(tmp_path / "run", MECHANISMS["vanilla"], tmp_path / "tokenizer.json"))
    assert [one_token(text, loaded) for text in ("word", "5", "\n", "\\n")] == [2, 5, 1, 1]
    with pytest.raises(UserError, match=r"96 is not an id of run, which has 0 \.\. 95"):
        one_token("96", loaded)
    with pytest.raises(UserError, match="'w3 w4' is 2 tokens for run; give a text of one, or an id"):
        one_token("w3 w4", loaded)
    with pytest.raises(UserError, match="comes without a tokenizer; give --replace-initial a token id"):
        one_token("word", load_model(make_run(tmp_path / "bare", MECHANISMS["vanilla"])))


def test_settings_are_computed_once_and_added_to(run: Path, tokens: Path, tmp_path: Path, monkeypatch) -> None:
    first = stream(str(run), tokens=str(tokens), cache="4+12", out=str(tmp_path / "o"), progress=False)
    import sinkpretrain.evaluate as module

    computed = []
    original = module.Setting.run
    monkeypatch.setattr(module.Setting, "run", lambda self, *a: computed.append(self.name) or original(self, *a))
    second = stream(str(run), tokens=str(tokens), cache="4+12,2+14", out=str(tmp_path / "o"), progress=False)
    assert computed == ["2+14"]
    assert second["settings"]["4+12"] == first["settings"]["4+12"]


def test_another_model_or_text_is_refused(run: Path, tokens: Path, tmp_path: Path) -> None:
    stream(str(run), tokens=str(tokens), cache="4+12", out=str(tmp_path / "o"), progress=False)
    other = make_run(tmp_path / "other", MECHANISMS["vanilla"])
    with pytest.raises(UserError, match="another model or text"):
        stream(str(other), tokens=str(tokens), cache="4+12", out=str(tmp_path / "o"), progress=False)


def test_prepared_folder_and_its_tokenizer(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    ours = make_run(tmp_path / "run", MECHANISMS["vanilla"], data / "tokenizer.json")
    results = stream(str(ours), tokens=str(data), cache="4+12", out=str(tmp_path / "o"), max_tokens=500, progress=False)
    assert results["settings"]["4+12"]["scored"] == 499
    other = make_data(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="another tokenizer"):
        stream(str(ours), tokens=str(other), cache="4+12", out=str(tmp_path / "p"), progress=False)


def test_text_is_tokenized_with_the_models_tokenizer(tmp_path: Path) -> None:
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "[UNK]": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = make_run(tmp_path / "run", MECHANISMS["vanilla"], tmp_path / "tokenizer.json")
    (tmp_path / "text.jsonl").write_text('{"text": "a b c a b"}\n{"text": "c b a"}\n')
    results = stream(str(ours), text=str(tmp_path / "text.jsonl"), cache="1+2", out=str(tmp_path / "o"), progress=False)
    np.save(tmp_path / "same.npy", np.array([1, 2, 3, 1, 2, 0, 3, 2, 1, 0]))
    same = stream(str(ours), tokens=str(tmp_path / "same.npy"), cache="1+2", out=str(tmp_path / "p"), progress=False)
    assert results["tokens"]["sha256"] == same["tokens"]["sha256"]
    assert results["settings"]["1+2"]["ppl"] == same["settings"]["1+2"]["ppl"]


def test_bf16_stays_close_and_scores_in_fp32(run: Path, tokens: Path, tmp_path: Path) -> None:
    kwargs = {"tokens": str(tokens), "cache": "4+12", "progress": False}
    exact = stream(str(run), out=str(tmp_path / "a"), **kwargs)["settings"]["4+12"]
    rough = stream(str(run), out=str(tmp_path / "b"), dtype="bfloat16", **kwargs)["settings"]["4+12"]
    assert rough["nll"] == pytest.approx(exact["nll"], rel=0.02)
    assert rough["nll"] != exact["nll"]


def test_strategies_and_their_settings() -> None:
    net = GPTNeoX(TINY)
    names = [s.name for s in settings_for(net, "4+12,0+16,4+12", "streaming,window,dense,recompute,token-loop", None)]
    assert names == ["4+12", "0+16", "dense", "recompute-16", "4+12-token-loop", "0+16-token-loop"]
    assert [s.name for s in settings_for(net, "", "dense,recompute", None)] == ["dense", "recompute-64"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cache": "4+1020"}, "the text has 300 tokens, too few for 4\\+1020"),
        ({"cache": "four"}, "'four' is not a cache"),
        ({"strategy": "magic"}, "unknown strategy 'magic'"),
        ({"tokens": ""}, "give either --tokens"),
        ({"tokens": "/nowhere.npy"}, "cannot read token ids from /nowhere.npy"),
        ({"text": "x.txt"}, "give either --tokens"),
        ({"out": ""}, "--out is missing"),
        ({"block": 0}, "at least 1"),
        ({"device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_refusals(change: dict, sentence: str, run: Path, tokens: Path, tmp_path: Path) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        return
    kwargs = {"tokens": str(tokens), "cache": "4+12", "out": str(tmp_path / "o"), "progress": False} | change
    with pytest.raises(UserError, match=sentence):
        stream(str(run), **kwargs)
    assert not (tmp_path / "o").exists()


def test_ids_outside_the_vocabulary_are_refused(run: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([1, 2, 96] * 20))
    with pytest.raises(UserError, match=r"token id 96, but .* knows the ids 0 \.\. 95"):
        stream(str(run), tokens=str(tmp_path / "ids.npy"), cache="1+2", out=str(tmp_path / "o"), progress=False)
    np.save(tmp_path / "ids.npy", np.zeros((3, 4)))
    with pytest.raises(UserError, match="not a list of token ids"):
        stream(str(run), tokens=str(tmp_path / "ids.npy"), cache="1+2", out=str(tmp_path / "o"), progress=False)


def test_perplexity_of_huge_losses_is_finite() -> None:
    assert perplexity(np.full(3, 1000, dtype=np.float32)) < float("inf")
