"""``sinkpretrain stream``: its files, its settings, what it refuses."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import family_factory
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import MECHANISMS, TINY, peaked
from data_factory import make_data
from matplotlib.image import imread
from run_factory import save_weights
from test_train import config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from data_prep.prepare import PrepareConfig, prepare
from data_prep.tokenizer import load_tokenizer
from sinkpretrain.cache import Cache
from sinkpretrain.cli import main
from sinkpretrain.config import RunConfig, SinkConfig, save_yaml
from sinkpretrain.errors import UserError
from sinkpretrain.evaluate import changed_configuration, one_token, perplexity, stream, table
from sinkpretrain.export import export
from sinkpretrain.files import write_atomically
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX
from sinkpretrain.setting import Setting, Wanted, settings_for
from sinkpretrain.streaming import dense_nll, documents, recompute_nll, stream_nll, token_loop_nll
from sinkpretrain.texts import TextCodec
from sinkpretrain.train import train


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


def test_two_commands_for_one_folder_keep_both_their_settings(
    run: Path, tokens: Path, tmp_path: Path, monkeypatch
) -> None:
    import sinkpretrain.evaluate as module

    where = {"tokens": str(tokens), "out": str(tmp_path / "o"), "progress": False}
    evaluate = module._evaluate

    def and_another(*arguments: object) -> object:
        monkeypatch.setattr(module, "_evaluate", evaluate)
        stream(str(run), cache="0+16", **where)
        return evaluate(*arguments)

    monkeypatch.setattr(module, "_evaluate", and_another)
    results = stream(str(run), cache="4+12", **where)
    assert json.loads((tmp_path / "o" / "results.json").read_text())["settings"].keys() == results["settings"].keys()
    assert {"0+16", "4+12"} <= results["settings"].keys()
    assert any(d["setting"] == "0+16" and d["against"] == "4+12" for d in results["differences"])


@pytest.mark.parametrize("count", [2100, 4000])
def test_losses_are_whole_or_the_disk_is_full(count: int, tmp_path: Path) -> None:
    """numpy's own buffer takes the end of an array, and nobody hears that it could not be written."""
    import sinkpretrain.evaluate as module

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match="the disk is full"):
            write_atomically(tmp_path / "nll.npy", lambda p: module._save_npy(p, np.zeros(count, np.float32)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [None, 0, 50, -4])
def test_losses_that_are_not_whole_are_computed_again(
    length: int | None, run: Path, tokens: Path, tmp_path: Path
) -> None:
    where = {"tokens": str(tokens), "cache": "0+16,4+12", "out": str(tmp_path / "o"), "progress": False}
    stream(str(run), **where)
    file = tmp_path / "o" / "0+16" / "nll.npy"
    whole = file.read_bytes()
    file.unlink() if length is None else file.write_bytes(whole[:length])
    stream(str(run), **where)
    assert file.read_bytes() == whole


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


def test_another_configuration_of_the_same_weights_is_another_model(tokens: Path, tmp_path: Path) -> None:
    """Positions scaled in config.json: the weights' hash does not change, every loss does."""
    folder = family_factory.save(family_factory.build("llama"), tmp_path / "llama")
    where = {"tokens": str(tokens), "cache": "4+12", "progress": False}
    first = stream(str(folder), out=str(tmp_path / "o"), **where)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"same weights under another configuration \(positions .* then, .* now\)"):
        stream(str(folder), out=str(tmp_path / "o"), **where)
    second = stream(str(folder), out=str(tmp_path / "p"), **where)
    assert second["model"]["sha256"] == first["model"]["sha256"]
    assert second["settings"]["4+12"]["nll"] != first["settings"]["4+12"]["nll"]


def test_a_results_file_of_something_else_is_refused(run: Path, tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="is not of this release of sinkpretrain stream"):
        stream(str(run), tokens=str(tokens), cache="4+12", out=str(tmp_path), progress=False)


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


@pytest.mark.parametrize("by", ["tokenizer_config.json", "--eod-token"])
def test_the_end_of_a_document_is_that_of_the_training_data(by: str, tmp_path: Path) -> None:
    """Which the tokenizer.json that goes with the data, the run and the exported folder does not say."""
    (tmp_path / "tokenizer").mkdir()
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "<end>": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    ends = ["<end>"] if by == "tokenizer_config.json" else ["<end>", "<|endoftext|>"]
    tokenizer.add_special_tokens(ends)
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    if by == "tokenizer_config.json":
        (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "a b b a " * n}) + "\n" for n in range(1, 30)))
    how: dict[str, Any] = {"eod_token": "<end>"} if by == "--eod-token" else {}
    how |= {"validation_fraction": 0, "workers": 1}
    prepare(PrepareConfig([str(text)], tmp_path / "data", str(tmp_path / "tokenizer"), **how))
    assert train(config(tmp_path / "data", tmp_path / "run", steps=2)).finished
    export(tmp_path / "run", tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "again")

    where = {"cache": "1+20", "progress": False}
    known = stream(str(tmp_path / "run"), tokens=str(tmp_path / "data"), out=str(tmp_path / "o"), **where)
    for name in ("run", "hf", "again"):
        model = tmp_path / name
        found = stream(str(model), text=str(text), out=str(tmp_path / f"o-{name}"), **where)
        assert found["tokens"]["sha256"] == known["tokens"]["sha256"]
        assert TextCodec(str(model)).end_ids == (1,)
        assert load_tokenizer(str(model / "tokenizer.json")).eod_id() == 1
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"] == "<end>"
    more = PrepareConfig([str(text)], tmp_path / "more", str(tmp_path / "data"), **how | {"eod_token": None})
    assert prepare(more).eod_id == 1
    (tmp_path / "run" / "run.json").write_text("{")  # damaged, which does not keep a model from being streamed
    assert stream(str(tmp_path / "run"), tokens=str(tmp_path / "data"), out=str(tmp_path / "p"), **where)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "far": 96}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = make_run(tmp_path / "run", MECHANISMS["vanilla"], tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("far and " * 20)
    with pytest.raises(UserError, match=r"tokenizer of run gives the id 96, but its weights know the ids 0 \.\. 95"):
        stream(str(ours), text=str(tmp_path / "a.txt"), cache="1+3", out=str(tmp_path / "o"), progress=False)


def test_the_end_of_a_document_is_what_the_tokenizers_folder_says(tmp_path: Path) -> None:
    """Llama's tokenizer.json has no word for it, tokenizer_config.json beside it does; half a surrogate pair, which
    JSON can hold, is a character that cannot be read."""
    folder = family_factory.save(family_factory.build("llama"), tmp_path / "llama")
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (tmp_path / "text.jsonl").write_text('{"text": "a b a b"}\n{"text": "b \\ud83d a b"}\n')
    where = {"text": str(tmp_path / "text.jsonl"), "cache": "1+2", "out": str(tmp_path / "o"), "progress": False}
    with pytest.raises(UserError, match="does not say which token ends a document"):
        stream(str(folder), **where)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    results = stream(str(folder), **where)
    np.save(tmp_path / "same.npy", np.array([1, 3, 4, 3, 4, 2, 1, 4, 0, 3, 4, 2]))
    same = stream(str(folder), tokens=str(tmp_path / "same.npy"), cache="1+2", out=str(tmp_path / "p"), progress=False)
    assert results["tokens"]["sha256"] == same["tokens"]["sha256"]
    # Of bare ids nobody knows that <s> opened a document: they are read behind the </s> before it, not taken for these.
    where |= {"documents": "reset", "out": str(tmp_path / "q")}
    apart = stream(str(folder), **where)
    behind = stream(str(folder), **where | {"text": "", "tokens": str(tmp_path / "same.npy")})
    assert [r["settings"]["1+2-documents"]["scored"] for r in (apart, behind)] == [10, 11]


def test_float64_is_the_same_in_blocks_and_token_by_token(mechanism: SinkConfig, tokens: Path, tmp_path: Path) -> None:
    ours, out = make_run(tmp_path / "run", mechanism), tmp_path / "o"
    kwargs = {"tokens": str(tokens), "cache": "4+12", "max_tokens": 60, "dtype": "float64", "progress": False}
    stream(str(ours), strategy="streaming,token-loop", out=str(out), **kwargs)
    blocks, loop = (np.load(out / name / "nll.npy") for name in ("4+12", "4+12-token-loop"))
    assert np.abs(blocks - loop).max() < 2e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_stay_close_and_are_scored_in_fp32(dtype: str, run: Path, tokens: Path, tmp_path: Path) -> None:
    kwargs = {"tokens": str(tokens), "cache": "4+12", "progress": False}
    exact = stream(str(run), out=str(tmp_path / "a"), **kwargs)["settings"]["4+12"]
    rough = stream(str(run), out=str(tmp_path / "b"), dtype=dtype, **kwargs)["settings"]["4+12"]
    assert rough["nll"] == pytest.approx(exact["nll"], rel=0.02)
    assert rough["nll"] != exact["nll"]


def test_strategies_and_their_settings() -> None:
    net = GPTNeoX(TINY)
    every = "streaming,window,dense,recompute,token-loop"
    names = [s.name for s in settings_for(net, Wanted("4+12,0+16,4+12", every))]
    assert names == ["4+12", "0+16", "dense", "recompute-16", "4+12-token-loop", "0+16-token-loop"]
    assert [s.name for s in settings_for(net, Wanted(strategy="dense,recompute"))] == ["dense", "recompute-64"]


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
        ({"block": -1}, "--block -1 is negative"),
        ({"stride": 0}, "--stride 0 is too small"),
        ({"stride": 17, "strategy": "recompute"}, "no room for 17 scored tokens"),
        ({"sample": 1, "strategy": "recompute"}, "too few for an error bar"),
        ({"window": -3}, "--window -3 is negative"),
        ({"max_tokens": -1}, "--max-tokens -1 is negative"),
        ({"documents": "reset"}, "needs to know where documents end"),
        ({"documents": "reset", "replace_initial": "3"}, "leave --documents reset out"),
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
    np.savez(tmp_path / "ids.npz", ids=np.zeros(40, np.int64))
    with pytest.raises(UserError, match="is an archive of arrays; save the one with the token ids"):
        stream(str(run), tokens=str(tmp_path / "ids.npz"), cache="1+2", out=str(tmp_path / "o"), progress=False)
    (tmp_path / "text.txt").write_text("some words")
    with pytest.raises(UserError, match=r"not a whole \.npy file; give .* or text with --text") as caught:
        stream(str(run), tokens=str(tmp_path / "text.txt"), cache="1+2", out=str(tmp_path / "o"), progress=False)
    assert "pickle" not in str(caught.value)


def test_perplexity_of_huge_losses_is_finite() -> None:
    assert perplexity(np.full(3, 1000, dtype=np.float32)) < float("inf")


# --- positions, documents, windows ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: family_factory.save(family_factory.build(name), folder / name) for name in ("llama", "mpt", "gpt2")}


@pytest.mark.parametrize("name", ["llama", "mpt", "gpt2"])
def test_positions_of_rotary_alibi_and_learned_models(name: str, families, tokens: Path, tmp_path: Path) -> None:
    """Both kinds against the token loop, in one results file."""
    common = {"tokens": str(tokens), "out": str(tmp_path / "o"), "max_tokens": 60, "progress": False}
    for positions in ("in-cache", "absolute"):
        results = stream(
            str(families[name]), cache="3+10", strategy="streaming,token-loop", positions=positions, **common
        )
    names = ["3+10", "3+10-token-loop", "3+10-absolute", "3+10-absolute-token-loop"]
    assert list(results["settings"]) == names
    nll = {n: np.load(tmp_path / "o" / n / "nll.npy") for n in names}
    for n in ("3+10", "3+10-absolute"):
        assert np.abs(nll[n] - nll[f"{n}-token-loop"]).max() < 1e-4
        assert results["settings"][n]["positions"] == ("absolute" if "absolute" in n else "in-cache")
    assert np.abs(nll["3+10"] - nll["3+10-absolute"]).max() > 1e-3
    assert [(d["setting"], d["against"]) for d in results["differences"]] == [(n, "3+10") for n in names[1:]]
    assert abs(results["differences"][0]["nats"]) < 1e-5


def test_learned_positions_end(families, tokens: Path, tmp_path: Path) -> None:
    """64 of them: a longer text needs positions in a cache that leaves one for the query."""
    common = {"tokens": str(tokens), "out": str(tmp_path / "o"), "progress": False}
    gpt2 = str(families["gpt2"])
    assert stream(gpt2, cache="3+60", **common)["settings"]["3+60"]["scored"] == 299
    for options in ({"positions": "absolute"}, {"strategy": "dense"}, {"cache": "4+60"}):
        with pytest.raises(UserError, match=r"needs the position \d+, but this model has learned 64 of them"):
            stream(gpt2, **{"cache": "3+60"} | options, **common)
    with pytest.warns(UserWarning, match="4\\+100: positions beyond the 64 that the model was trained with"):
        stream(str(families["llama"]), cache="4+100", **common | {"out": str(tmp_path / "p")})


def test_a_window_is_respected_and_said(tokens: Path, tmp_path: Path) -> None:
    mistral = family_factory.save(family_factory.build("mistral"), tmp_path / "mistral")
    common = {"tokens": str(tokens), "out": str(tmp_path / "o"), "progress": False, "max_tokens": 60}
    with pytest.warns(UserWarning, match="within a window of 9 positions in 3 of 3 layers"):
        stream(str(mistral), cache="2+30", **common)


WORDS = {"<|endoftext|>": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 96)}}


def make_tokenizer(file: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file))
    return file


LENGTHS = [5, 40, 41, 1, 70, 12, 39]


@pytest.mark.parametrize("sink", ["vanilla", "sink_tokens_2"])
def test_documents_are_streams_of_their_own(sink: str, tmp_path: Path) -> None:
    """As if each had been streamed alone, behind the token that ended the one before; the same for a folder of files,
    token ids and text."""
    run = make_run(tmp_path / "run", MECHANISMS[sink], make_tokenizer(tmp_path / "tokenizer.json"))
    generator = np.random.default_rng(1)
    texts = [generator.integers(2, 96, n) for n in LENGTHS]
    ids = np.concatenate([np.append(t, 0) for t in texts])
    np.save(tmp_path / "ids.npy", ids)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(f"w{i}" for i in t)}) + "\n" for t in texts)
    )
    common = {"cache": "3+10", "strategy": "streaming,token-loop,dense,recompute", "documents": "reset"}
    common |= {"window": 16, "progress": False}
    results = stream(str(run), tokens=str(tmp_path / "ids.npy"), out=str(tmp_path / "o"), **common)
    names = ["3+10-documents", "3+10-documents-token-loop", "dense-documents", "recompute-16-documents"]
    assert list(results["settings"]) == names
    assert {s["documents"] for s in results["settings"].values()} == {len(LENGTHS)}
    net = peaked(GPTNeoX(TINY, MECHANISMS[sink], seed=4)).eval()
    for name, alone in (
        (names[0], lambda part: token_loop_nll(net, part, Cache(3, 10))),
        (names[1], lambda part: stream_nll(net, part, Cache(3, 10))),
        (names[2], lambda part: dense_nll(net, part)),
        (names[3], lambda part: recompute_nll(net, part, 16)),
    ):
        want = [alone(np.array([*before, *t, 0])) for before, t in zip([[], *[[0]] * 6], texts, strict=True)]
        got = np.load(tmp_path / "o" / name / "nll.npy")
        assert np.abs(got - np.concatenate(want)).max() < 1e-4, name
    beyond = np.concatenate([w[13:] for w in want])
    assert results["settings"][names[3]]["ppl_beyond_cache"] is not None
    whole = stream_nll(net, ids, Cache(3, 10))
    assert np.abs(np.load(tmp_path / "o" / names[0] / "nll.npy") - whole).max() > 0.1
    assert 0 < len(beyond) < len(ids)
    again = stream(str(run), text=str(tmp_path / "text.jsonl"), out=str(tmp_path / "p"), **common)
    assert again["tokens"]["sha256"] == results["tokens"]["sha256"]
    assert again["settings"][names[0]]["nll"] == results["settings"][names[0]]["nll"]


def test_documents_of_a_prepared_folder(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    run = make_run(tmp_path / "run", MECHANISMS["vanilla"], data / "tokenizer.json")
    common = {"tokens": str(data), "cache": "2+40", "progress": False, "out": str(tmp_path / "o"), "max_tokens": 650}
    entry = stream(str(run), documents="reset", **common)["settings"]["2+40-documents"]
    assert entry["documents"] == 3
    assert entry["scored"] == 649
    nll = np.load(tmp_path / "o" / "2+40-documents" / "nll.npy")
    # 301 tokens a document; each after the first is read from the 0 in front of it.
    places = np.concatenate([np.arange(300), np.arange(301), np.arange(48)])
    assert entry["ppl_beyond_cache"] == pytest.approx(np.exp(nll[places >= 42].astype(np.float64).mean()))
    with pytest.warns(UserWarning, match="no document has more than 302 tokens, so nothing is ever evicted"):
        stream(str(run), documents="reset", **common | {"cache": "4+400"})


def test_where_nothing_ends_a_document_its_first_token_is_not_scored() -> None:
    bounds = np.array([0, 4, 9, 12])
    assert documents(np.arange(1, 13), bounds, 0) == [slice(0, 4), slice(4, 9), slice(9, 12)]
    assert documents(np.array([1, 2, 3, 0, 5, 6, 7, 8, 0, 9, 9, 0]), bounds, 0) == [
        slice(0, 4), slice(3, 9), slice(8, 12)
    ]  # fmt: skip
    net = peaked(GPTNeoX(TINY, seed=4)).eval()
    nll = stream_nll(net, np.arange(1, 13), Cache(1, 2), parts=documents(np.arange(1, 13), bounds, None))
    assert np.flatnonzero(np.isnan(nll)).tolist() == [3, 8]


@pytest.mark.parametrize("sink", ["vanilla", "sink_tokens_2"])
@pytest.mark.parametrize("stride", [3, 8, 14])
def test_recompute_with_a_stride(sink: str, stride: int) -> None:
    """Window by window, by the definition: a forward over the 16 positions before the last scored token."""
    net = peaked(GPTNeoX(TINY, MECHANISMS[sink], seed=4)).eval()
    ids, n = np.random.default_rng(2).integers(0, 96, 90), len(net.prefix_ids)
    text = 16 - n
    want = np.full(89, np.nan, dtype=np.float32)
    for end in [*range(text, 89, stride), 89]:
        begin = max(0, end - text)
        with torch.no_grad():
            logits = net(torch.tensor([[*net.prefix_ids, *ids[begin:end]]]))[0, n:]
        losses = F.cross_entropy(logits, torch.from_numpy(ids[begin + 1 : end + 1]), reduction="none").numpy()
        new = np.isnan(want[begin:end])
        want[begin:end][new] = losses[new]
    for block in (16, 100, 4096):
        assert np.abs(recompute_nll(net, ids, 16, stride=stride, block=block) - want).max() < 1e-4
    assert np.abs(recompute_nll(net, ids, 16) - want).max() > 1e-2


def test_some_windows_stand_for_all(run: Path, tokens: Path, tmp_path: Path) -> None:
    common = {"tokens": str(tokens), "cache": "4+12", "strategy": "streaming,recompute", "out": str(tmp_path / "o")}
    full = stream(str(run), stride=2, progress=False, **common)
    results = stream(str(run), stride=2, sample=40, progress=False, **common)
    entry = results["settings"]["recompute-16-stride-2-sample-40"]
    nll, every = (np.load(tmp_path / "o" / f"recompute-16-stride-2{s}" / "nll.npy") for s in ("-sample-40", ""))
    there = np.isfinite(nll)
    assert there.sum() == entry["scored"] == 80
    assert not there[:16].any()
    assert np.abs(nll[there] - every[there]).max() < 1e-4
    means = nll[there].reshape(40, 2).mean(1, dtype=np.float64)
    assert entry["standard_error"] == pytest.approx(means.std(ddof=1) / 40**0.5)
    low, high = np.log(entry["interval"])
    assert low < full["settings"]["recompute-16-stride-2"]["nll"] < high
    assert entry["ppl"] == entry["ppl_beyond_cache"]
    pair = next(d for d in results["differences"] if d["setting"] == "recompute-16-stride-2-sample-40")
    streamed = np.load(tmp_path / "o" / "4+12" / "nll.npy").astype(np.float64)
    assert pair["nats"] == pytest.approx((nll[there] - streamed[there]).mean(), abs=1e-9)
    assert pair["interval"][0] < pair["nats"] < pair["interval"][1]


@pytest.mark.parametrize("parts", [None, [slice(0, 40), slice(39, 50), slice(49, 90)]])
def test_models_with_and_without_sinks_are_sampled_at_the_same_tokens(parts: list[slice] | None) -> None:
    """Or their perplexities would differ by the chance of the draw."""
    ids = np.random.default_rng(2).integers(0, 96, 90)
    scored = []
    for sink in ("vanilla", "sink_tokens_2"):
        net = GPTNeoX(TINY, MECHANISMS[sink], seed=4).eval()
        nll = recompute_nll(net, ids, 16, sample=20, parts=parts)
        scored.append(np.flatnonzero(np.isfinite(nll)))
        shifted = recompute_nll(net, ids, 16, stride=4, sample=5, parts=parts)
        there = np.isfinite(shifted)
        assert 16 <= there.sum() <= 20
        scored.append(np.flatnonzero(there) + len(net.prefix_ids))
    assert len(scored[0]) == 20
    assert np.array_equal(scored[0], scored[2])
    assert len(np.intersect1d(scored[1], scored[3])) >= 16


# --- results --------------------------------------------------------------------------------------------------------


def test_differences_are_against_the_most_initial_positions(run: Path, tokens: Path, tmp_path: Path) -> None:
    results = stream(
        str(run), tokens=str(tokens), cache="0+16,4+12,2+14,4+60", strategy="streaming,dense", out=str(tmp_path / "o"),
        progress=False,
    )  # fmt: skip
    pairs = {d["setting"]: d["against"] for d in results["differences"]}
    assert pairs == {"0+16": "4+12", "0+16-nocolumn": "4+12", "2+14": "4+12", "dense": "4+60"}
    nll = {n: np.load(tmp_path / "o" / n / "nll.npy").astype(np.float64) for n in ("0+16", "4+12")}
    first = results["differences"][0]
    assert first["nats"] == pytest.approx((nll["0+16"] - nll["4+12"]).mean())
    assert first["interval"][0] < first["nats"] < first["interval"][1]
    head, rows, note = table(results)
    assert head[4] == "change"
    assert note == "change: of the perplexity against 4+12 or 4+60, the one of the same size, over the same tokens"
    by_name = {row[0]: row[4] for row in rows}
    assert by_name["0+16"].endswith(")")
    assert by_name["4+12"] == ""
    assert by_name["dense"].endswith(") against 4+60")  # its size says nothing
    assert imread(tmp_path / "o" / "stream.png").shape[0] > 300
    entry = results["settings"]["4+12"]
    assert entry.keys() >= {"positions", "documents", "dtype", "device", "commit", "block"}
    assert entry["block"] == 1024


def test_an_interrupted_stream_keeps_what_is_finished(
    run: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, hurry = Setting.run, {"stop": True}

    def interrupted(self: Setting, model, ids, parts, block, advance):
        def tell(done: int) -> None:
            advance(done)
            if self.name == "2+14" and done >= 128 and hurry["stop"]:
                raise KeyboardInterrupt

        return original(self, model, ids, parts, block, tell)

    monkeypatch.setattr(Setting, "run", interrupted)
    out = tmp_path / "o"
    command = ["stream", str(run), "--tokens", str(tokens), "--cache", "4+12,2+14,1+15", "--block", "64"]
    assert main([*command, "--out", str(out)]) == 130
    told = capsys.readouterr().err
    assert f"stopped in 2+14 after 128 of 299 tokens; the settings before it are in {out}" in told
    assert list(json.loads((out / "results.json").read_text())["settings"]) == ["4+12"]
    assert not (out / "2+14").exists()
    hurry["stop"] = False
    before = (out / "4+12" / "nll.npy").stat().st_mtime_ns
    assert main([*command, "--out", str(out)]) == 0
    assert (out / "4+12" / "nll.npy").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert "perplexity against 4+12" in " ".join(shown.split())
    assert all(name in shown for name in ("4+12", "2+14", "1+15"))


def test_where_nothing_can_be_written_nothing_is_computed(run: Path, tokens: Path, tmp_path: Path, capsys) -> None:
    command = ["stream", str(run), "--tokens", str(tokens), "--cache", "4+12"]
    for out in (tokens, tokens / "below", Path("/proc/nowhere")):
        assert main([*command, "--out", str(out)]) == 2
        told = capsys.readouterr().err
        assert f"cannot write to {out}: " in told
        assert "perplexity" not in told


def test_losses_that_are_gone_are_computed_again(run: Path, tokens: Path, tmp_path: Path) -> None:
    common = {"tokens": str(tokens), "cache": "4+12", "out": str(tmp_path / "o"), "progress": False}
    first = stream(str(run), **common)
    (tmp_path / "o" / "4+12" / "nll.npy").unlink()
    assert stream(str(run), **common)["settings"]["4+12"]["nll"] == first["settings"]["4+12"]["nll"]


def test_another_vocabulary_is_another_tokenizer(tmp_path: Path) -> None:
    """Files may differ as long as ids mean the same."""
    data = make_data(tmp_path / "data")
    tokenizer = Tokenizer.from_file(str(make_tokenizer(tmp_path / "tokenizer.json")))
    run = make_run(tmp_path / "run", MECHANISMS["vanilla"], tmp_path / "tokenizer.json")
    common = {"tokens": str(data), "cache": "4+12", "out": str(tmp_path / "o"), "max_tokens": 60, "progress": False}
    (data / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    stream(str(run), **common)
    (data / "tokenizer.json").write_text(tokenizer.to_str().replace('"w5":5,"w6":6', '"w5":6,"w6":5'))
    with pytest.raises(UserError, match="another tokenizer than run has"):
        stream(str(run), **common)


# --- the authors' evaluator, from the command line ------------------------------------------------------------------

ORACLE = Path(__file__).parent / "oracle"
REFERENCE = {"0+64": (0, 64), "1+63": (1, 63), "4+60": (4, 60), "4+28": (4, 28), "4+124": (4, 124)}


def differs(got: np.ndarray, want: np.ndarray) -> str:
    """What a comparison with the reference must not say: how far off, if more than 1e-4 a token or 1e-5 in the mean."""
    difference = got.astype(np.float64) - want[: len(got)]
    worst, mean = np.abs(difference).max(), abs(difference.mean())
    return f"{worst:.1e} at most, {mean:.1e} in the mean" if worst >= 1e-4 or mean >= 1e-5 else ""


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_the_authors_numbers_from_the_command_line(name: str, tmp_path: Path) -> None:
    out, caches = tmp_path / "out", ",".join(REFERENCE)
    command = ["stream", str(ORACLE / name), "--tokens", str(ORACLE / "token_ids.npy"), "--progress", "false"]
    assert main([*command, "--cache", caches, "--out", str(out)]) == 0
    assert main([*command, "--strategy", "dense,recompute", "--window", "64", "--out", str(out)]) == 0
    assert (
        main([*command, "--cache", caches, "--strategy", "token-loop", "--max-tokens", "300", "--out", str(out) + "2"])
        == 0
    )
    with np.load(ORACLE / f"{name}.npz") as file:
        want = dict(file)
    fast = {s: np.load(out / s / "nll.npy") for s in [*REFERENCE, "dense", "recompute-64"]}
    for setting, (start, recent) in REFERENCE.items():
        key = f"nll_start{start}_recent{recent}"
        assert not differs(fast[setting], want[key])
        assert not differs(np.load(tmp_path / "out2" / f"{setting}-token-loop" / "nll.npy"), want[key])
    assert not differs(fast["dense"], want["nll_dense"])
    assert not differs(fast["recompute-64"], want["nll_recompute64"])
    # Negative control: eviction without the shift of positions is a wrong answer, and is found to be one.
    assert differs(fast["4+60"], want["nll_start4_recent60_noshift"])
    assert differs(fast["4+60"], want["nll_start1_recent63"])


def test_angles_rounded_by_another_machine_are_no_other_configuration() -> None:
    def shape(angle: float) -> dict:
        return {"shape": {"positions": {"frequencies": [1.0, angle]}, "windows": [None, 9]}}

    assert changed_configuration(shape(0.1), shape(0.1 + 1e-9)) is None
    assert changed_configuration(shape(0.1), shape(0.1001)) is not None
    assert (
        changed_configuration(shape(0.1), {"shape": {"windows": [None, 8]}}) == "windows [None, 9] then, [None, 8] now"
    )
