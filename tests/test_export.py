"""Exported folders as a user of transformers alone meets them, and every way an export must fail cleanly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MECHANISMS, TINY, peaked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sinkpretrain import export as export_module
from sinkpretrain import hf
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.errors import UserError
from sinkpretrain.export import TOLERANCE, Exported, VerificationError, export
from sinkpretrain.load import load_model, save_weights
from sinkpretrain.model import GPTNeoX

SIZE = 300
CONFIG = ModelConfig(n_layer=2, d_model=32, n_head=2, vocab_size=384, tokenizer_size=SIZE, context=64)
PLAIN = [name for name, sink in MECHANISMS.items() if export_module._only_prepends(sink, TINY)]
COLUMNS = [name for name in MECHANISMS if name not in PLAIN]
PREFIX = {
    "vanilla": [],
    "sink_tokens_1": [300],
    "sink_tokens_2": [300, 301],
    "sink_tokens_4": [300, 301, 302, 303],
    "fixed_first_token": [3],
}
TEXT = "def  main(): return the answer"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 300 ids with an end-of-document token and no other special one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    assert tokenizer.get_vocab_size() == SIZE
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def make_run(folder: Path, sink: SinkConfig, tokenizer: Path | None, config: ModelConfig = CONFIG) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: small\n")
    save_weights(peaked(GPTNeoX(config, sink, seed=4)), folder / "weights/step-0000012.safetensors", 12, "small")
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, tuple[Path, Exported]]:
    """For each plain mechanism: the run and what exporting it gave."""
    root = tmp_path_factory.mktemp("exports")
    runs = {name: make_run(root / name, MECHANISMS[name], tokenizer_file) for name in PLAIN}
    return {name: (run, export(run, root / f"{name}-hf")) for name, run in runs.items()}


def reloaded(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("run", "tokenizer.json"))


@pytest.mark.parametrize("name", PLAIN)
def test_logits_are_ours(name: str, exports) -> None:
    run, exported = exports[name]
    theirs, tokenizer = reloaded(exported.folder)
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    ours = load_model(run).model(ids)
    assert exported.tokenizer
    assert exported.difference <= TOLERANCE
    torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-5, rtol=1e-5)
    assert theirs.config.vocab_size == theirs.get_input_embeddings().weight.shape[0] == 384
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == 0


@pytest.mark.parametrize("name", PLAIN)
def test_tokenizer_prepends_the_sinks_once(name: str, exports, tokenizer_file: Path) -> None:
    _, tokenizer = reloaded(exports[name][1].folder)
    plain, prefix = Tokenizer.from_file(str(tokenizer_file)), PREFIX[name]
    text, other = plain.encode(TEXT).ids, plain.encode(" other").ids
    assert tokenizer(TEXT).input_ids == prefix + text
    assert tokenizer(TEXT, " other").input_ids == prefix + text + other
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == text
    assert tokenizer("").input_ids == prefix
    assert tokenizer(TEXT, truncation=True, max_length=8).input_ids == (prefix + text)[:8]
    batch = tokenizer([" other", TEXT], padding=True)
    short, padding = len(prefix + other), len(text) - len(other)
    assert batch["input_ids"] == [prefix + other + [0] * padding, prefix + text]
    assert batch["attention_mask"][0] == [1] * short + [0] * padding
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "fixed_first_token"])
def test_decoding_drops_the_sinks(name: str, exports) -> None:
    _, tokenizer = reloaded(exports[name][1].folder)
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.decode(ids).startswith("<|sink_0|>" if PREFIX[name] else "def")


@pytest.mark.parametrize("name", ["vanilla", "sink_tokens_2"])
def test_generation_never_makes_a_spare_id(name: str, exports) -> None:
    model, tokenizer = reloaded(exports[name][1].folder)
    inputs = tokenizer([TEXT] * 8, return_tensors="pt")
    made = model.generate(**inputs, do_sample=True, top_k=0, min_new_tokens=32, max_new_tokens=32)
    new = made[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (8, 32)
    assert new.max() < SIZE  # unsuppressed, each of the 256 would be spare with a chance of about 84 / 384


@pytest.mark.parametrize("name", PLAIN)
def test_round_trip_keeps_the_mechanism(name: str, exports) -> None:
    run, exported = exports[name]
    first, back = load_model(run), load_model(exported.folder)
    assert (back.label, back.step, back.name) == (first.label, 12, "small")
    assert list(back.model.prefix_ids) == PREFIX[name]
    assert back.model.config == first.model.config
    assert all(torch.equal(v, back.model.state_dict()[k]) for k, v in first.model.state_dict().items())


def test_an_export_can_be_exported(exports, tmp_path: Path) -> None:
    _, exported = exports["sink_tokens_2"]
    export(exported.folder, tmp_path / "again")
    _, tokenizer = reloaded(tmp_path / "again")
    assert tokenizer("").input_ids == [300, 301]


def test_card_says_what_it_is(exports) -> None:
    run, exported = exports["sink_tokens_2"]
    card = (exported.folder / "README.md").read_text(encoding="utf-8")
    for fact in ("sink_tokens(n=2)", "[300, 301]", load_model(run).provenance()["sha256"], "| 12 |", "2+30"):
        assert fact in card
    assert str(run.parent) not in card


def test_weights_are_as_readable_as_the_other_files(exports) -> None:
    folder = exports["vanilla"][1].folder
    assert len({p.stat().st_mode for p in folder.iterdir()}) == 1


def test_bfloat16(tmp_path: Path, tokenizer_file: Path) -> None:
    run = make_run(tmp_path / "run", MECHANISMS["sink_tokens_1"], tokenizer_file)
    assert export(run, tmp_path / "hf", dtype="bfloat16").difference <= TOLERANCE
    state = hf.from_hf(hf.load_weights(tmp_path / "hf"), CONFIG)
    assert all(torch.equal(state[k], v.bfloat16().float()) for k, v in load_model(run).model.state_dict().items())
    assert reloaded(tmp_path / "hf")[0].dtype == torch.bfloat16


def test_without_a_tokenizer_only_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", MECHANISMS["sink_tokens_1"], None)
    exported = export(run, tmp_path / "hf")
    assert not exported.tokenizer
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert "weights only" in (tmp_path / "hf/README.md").read_text()
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] is None


def test_a_tokenizer_of_its_own_start_token_is_overruled(tmp_path: Path, tokenizer_file: Path) -> None:
    """Training packs bare text, so a BOS that the tokenizer adds has no place after the sinks."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    run = make_run(tmp_path / "run", MECHANISMS["sink_tokens_1"], tmp_path / "tokenizer.json")
    export(run, tmp_path / "hf")
    assert reloaded(tmp_path / "hf")[1]("a").input_ids == [300, *tokenizer.encode("a").ids[1:]]


@pytest.mark.parametrize("piece", ["$", ":"])
def test_first_tokens_that_look_like_template_syntax(piece: str, tmp_path: Path, tokenizer_file: Path) -> None:
    first = Tokenizer.from_file(str(tokenizer_file)).token_to_id(piece)
    sink = SinkConfig("fixed_first_token", {"id": first})
    export(make_run(tmp_path / "run", sink, tokenizer_file), tmp_path / "hf")
    assert reloaded(tmp_path / "hf")[1]("").input_ids == [first]


@pytest.mark.parametrize("name", COLUMNS)
def test_what_changes_attention_is_refused(name: str, tmp_path: Path, tokenizer_file: Path) -> None:
    run = make_run(tmp_path / "run", MECHANISMS[name], tokenizer_file)
    with pytest.raises(
        UserError, match=rf"{MECHANISMS[name].mechanism} changes .* vanilla, sink_tokens, fixed_first_token\."
    ):
        export(run, tmp_path / "hf")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("size", [310, 290])
def test_a_tokenizer_of_another_size_is_refused(size: int, tmp_path: Path, tokenizer_file: Path) -> None:
    """Too small a tokenizer would leave a gap below the sinks, too large a one would collide with them."""
    import dataclasses

    config = dataclasses.replace(CONFIG, tokenizer_size=size)
    run = make_run(tmp_path / "run", MECHANISMS["sink_tokens_1"], tokenizer_file, config)
    with pytest.raises(UserError, match="cannot put"):
        export(run, tmp_path / "hf")
    assert left_over(tmp_path) == []


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    config = ModelConfig(n_layer=1, d_model=32, n_head=2, vocab_size=256, tokenizer_size=256, context=64)
    run = make_run(tmp_path / "run", SinkConfig(), tokenizer_file, config)
    with pytest.raises(UserError, match=r"ids up to 299 .* ends at 255"):
        export(run, tmp_path / "hf")


def test_a_wrong_conversion_is_noticed(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", MECHANISMS["sink_tokens_1"], tokenizer_file)
    right = hf.to_hf

    def swapped(state, config, head=hf.HEADS[0]):
        q_and_k = {k: torch.cat([v.chunk(3)[i] for i in (1, 0, 2)]) for k, v in state.items() if ".qkv." in k}
        return right({**state, **q_and_k}, config, head)

    monkeypatch.setattr(hf, "to_hf", swapped)
    with pytest.raises(VerificationError, match="logits differ"):
        export(run, tmp_path / "hf")
    assert left_over(tmp_path) == []


def test_a_forgetful_tokenizer_is_noticed(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", MECHANISMS["sink_tokens_1"], tokenizer_file)
    template = export_module._template
    monkeypatch.setattr(export_module, "_template", lambda tokens, ids: template([], []))
    with pytest.raises(VerificationError, match="tokenizer encodes"):
        export(run, tmp_path / "hf")
    assert left_over(tmp_path) == []


def test_overwriting_only_when_asked_and_only_exports(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run(tmp_path / "run", MECHANISMS["sink_tokens_1"], tokenizer_file), tmp_path / "hf"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(run, out)
    with pytest.raises(UserError, match="not a Hugging Face folder"):
        export(run, out, overwrite=True)
    (out / "config.json").write_text("{}")
    with monkeypatch.context() as broken:
        broken.setattr(export_module, "TOLERANCE", -1.0)
        with pytest.raises(VerificationError):
            export(run, out, overwrite=True)
    assert (out / "diary.txt").read_text() == "mine"
    export(run, out, overwrite=True)
    assert not (out / "diary.txt").exists()
    assert left_over(tmp_path) == ["hf"]
    assert load_model(out).label == "sink_tokens(n=1)"
