"""Exported folders as a user of transformers alone meets them, and every way an export must fail cleanly."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MECHANISMS, TINY
from run_factory import CONFIG, SIZE, make_run
from tokenizers import Tokenizer, processors

from sinkpretrain import export as export_module
from sinkpretrain import export_tokenizer, exporters, hf, seeded_slot, sinks
from sinkpretrain.attention import causal_attention
from sinkpretrain.config import ModelConfig, RunConfig, SinkConfig, load_yaml
from sinkpretrain.errors import UserError
from sinkpretrain.export import TOLERANCE, Exported, export
from sinkpretrain.export_tokenizer import VerificationError
from sinkpretrain.exporters import natural_form
from sinkpretrain.load import load_model
from sinkpretrain.model import GPTNeoX

PLAIN = [name for name, sink in MECHANISMS.items() if natural_form(sink, TINY) == "stock"]
SEEDED = [name for name, sink in MECHANISMS.items() if natural_form(sink, TINY) == "seeded"]
PREFIX = {
    "vanilla": [],
    "sink_tokens_1": [300],
    "sink_tokens_2": [300, 301],
    "sink_tokens_4": [300, 301, 302, 303],
    "fixed_first_token": [3],
}
TEXT = "def  main(): return the answer"


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


def test_an_export_keeps_its_runs_seeds(exports) -> None:
    """By which ``compare`` knows that the two are not two seeds of one recipe."""
    run, exported = exports["vanilla"]
    assert load_model(exported.folder).seeds == load_model(run).seeds == {"training": 1234, "data": 1234}


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


@pytest.mark.parametrize("name", [n for n, sink in MECHANISMS.items() if natural_form(sink, TINY) == "own"])
def test_what_stock_weights_cannot_say_is_refused(name: str, tmp_path: Path, tokenizer_file: Path) -> None:
    run = make_run(tmp_path / "run", MECHANISMS[name], tokenizer_file)
    able = "vanilla, sink_tokens, fixed_first_token, zero_sink, key_bias, key_value_bias"
    with pytest.raises(UserError, match=rf"cannot compute {MECHANISMS[name].mechanism}; .* \(stock: {able}\)\."):
        export(run, tmp_path / "hf", architecture="stock")
    assert left_over(tmp_path) == []


def test_a_window_is_nothing_that_stock_weights_can_say(tmp_path: Path, tokenizer_file: Path) -> None:
    run = make_run(tmp_path / "run", SinkConfig(), tokenizer_file, dataclasses.replace(CONFIG, window=8))
    with pytest.raises(UserError, match="cannot compute a window of 8 tokens"):
        export(run, tmp_path / "hf", architecture="stock")
    assert export(run, tmp_path / "hf").form == "own"


@pytest.mark.parametrize("size", [310, 290])
def test_a_tokenizer_of_another_size_is_refused(size: int, tmp_path: Path, tokenizer_file: Path) -> None:
    """Too small a tokenizer would leave a gap below the sinks, too large a one would collide with them."""
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
    template = export_tokenizer._template
    monkeypatch.setattr(export_tokenizer, "_template", lambda tokens, ids: template([], []))
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


# --- every mechanism ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def all_exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> dict[str, tuple[Path, Exported]]:
    """For each mechanism, with and without a window in our own class: the run and what exporting it gave."""
    root = tmp_path_factory.mktemp("all")
    made = {}
    for name, sink in MECHANISMS.items():
        run = make_run(root / name, sink, tokenizer_file)
        made[name] = (run, export(run, root / f"{name}-hf", architecture="own"))
    for name in SEEDED:
        run = root / name
        made[f"{name}/seeded"] = (run, export(run, root / f"{name}-seeded"))
    shape = dataclasses.replace(CONFIG, window=9, window_sinks=2)
    run = make_run(root / "window", MECHANISMS["sink_tokens_2"], tokenizer_file, shape)
    made["window"] = (run, export(run, root / "window-hf"))
    return made


EVERY = [*MECHANISMS, "window"]


def greedy(net: GPTNeoX, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The most likely continuation among the ids of text, by one plain forward per token."""
    for _ in range(count):
        ids = torch.cat((ids, net(ids)[:, -1:, :SIZE].argmax(-1)), dim=1)
    return ids


def own_class(folder: Path):
    from transformers import AutoModelForCausalLM

    import sinkpretrain.hf_model  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", EVERY)
def test_own_class_generates_what_the_model_would(name: str, all_exports) -> None:
    """With transformers' cache, token by token, as one forward over everything would."""
    run, exported = all_exports[name]
    assert exported.form == "own"
    ours, theirs = load_model(run).model, own_class(exported.folder)
    ids = torch.randint(1, SIZE, (3, 20))
    assert theirs(ids).logits.sub(ours(ids)).abs().max() < 1e-5
    made = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=[]
    )
    assert torch.equal(made, greedy(ours, ids, 12))


@pytest.mark.parametrize("name", EVERY)
def test_own_class_takes_padding_on_the_left(name: str, all_exports) -> None:
    """Texts of different lengths in one batch continue as each would alone; on the right, logits are the same too."""
    run, exported = all_exports[name]
    ours, theirs = load_model(run).model, own_class(exported.folder)
    texts = [torch.randint(1, SIZE, (1, n)) for n in (5, 17, 11)]
    ids, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 17 - text.shape[1] :], mask[row, 17 - text.shape[1] :] = text, 1
    made = theirs.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=[])
    for row, text in enumerate(texts):
        assert torch.equal(made[row, 17 - text.shape[1] :], greedy(ours, text, 9)[0])
    left = theirs(ids, attention_mask=mask).logits
    ids = torch.stack([torch.roll(row, text.shape[1]) for row, text in zip(ids, texts, strict=True)])
    right = theirs(ids, attention_mask=mask.flip(1)).logits
    for row, text in enumerate(texts):
        want = ours(text)[0]
        assert (left[row, 17 - text.shape[1] :] - want).abs().max() < 1e-5
        assert (right[row, : text.shape[1]] - want).abs().max() < 1e-5


def test_padding_that_is_not_masked_is_another_answer(all_exports) -> None:
    """Negative control for the test above."""
    run, exported = all_exports["zero_sink"]
    ours, theirs = load_model(run).model, own_class(exported.folder)
    text = torch.randint(1, SIZE, (1, 7))
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), text), dim=1)
    assert (theirs(padded).logits[:, 5:] - ours(text)).abs().max() > 1e-2


@pytest.mark.parametrize("name", EVERY)
def test_own_class_saved_again_is_the_same(name: str, all_exports, tmp_path: Path) -> None:
    run, exported = all_exports[name]
    theirs = own_class(exported.folder)
    theirs.save_pretrained(tmp_path / "again")
    again, first, back = own_class(tmp_path / "again"), load_model(run), load_model(tmp_path / "again")
    ids = torch.randint(1, SIZE, (2, 20))
    assert torch.equal(theirs(ids).logits, again(ids).logits)
    assert (back.model.config, back.label) == (first.model.config, first.label)
    assert all(torch.equal(v, back.model.state_dict()[k]) for k, v in first.model.state_dict().items())


def test_own_class_learns_exactly(all_exports) -> None:
    """Loss and gradients through transformers' interface are those of training."""
    run, exported = all_exports["key_value_bias"]
    ours, theirs = load_model(run).trained.requires_grad_(True), own_class(exported.folder)
    ids = torch.randint(1, SIZE, (2, 20))
    loss = theirs(ids, labels=ids).loss
    loss.backward()
    want = torch.nn.functional.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-5
    for (name, p), q in zip(ours.named_parameters(), theirs.model.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max().clamp_min(1e-3), name


def test_own_class_without_an_import(all_exports, tmp_path: Path) -> None:
    """A process that never imports this package: trust_remote_code finds the installed class."""
    _, exported = all_exports["sink_logit"]
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(m).__name__, float(m(torch.arange(1, 9)[None]).logits.double().sum()))"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported.folder)], capture_output=True, text=True, env=environment, check=True
    )
    kind, total = done.stdout.split()
    assert kind == "SinkPretrainForCausalLM"
    assert float(total) == pytest.approx(
        own_class(exported.folder)(torch.arange(1, 9)[None]).logits.double().sum().item()
    )


# --- the seeded slot ------------------------------------------------------------------------------------------------


def helper(folder: Path):
    """The folder's own file, as a user without this package has it."""
    spec = importlib.util.spec_from_file_location("slot_of_the_folder", folder / "seeded_slot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SEEDED)
def test_a_seeded_slot_is_the_mechanism(name: str, all_exports) -> None:
    run, exported = all_exports[f"{name}/seeded"]
    assert exported.form == "seeded"
    ours, (theirs, tokenizer) = load_model(run).model, reloaded(exported.folder)
    slot = helper(exported.folder)
    texts = [TEXT, " other", "a much longer line of text than the others are, so that they are padded"]
    tokenizer.padding_side = "left"
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    logits = theirs(**slot.forward_inputs(theirs, **inputs)).logits
    made = theirs.generate(
        **slot.generate_inputs(theirs, **inputs), max_new_tokens=8, do_sample=False, eos_token_id=[]
    )[:, 1:]
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text).input_ids])
        n = ids.shape[1]
        assert (logits[row, -n:] - ours(ids)[0]).abs().max() < 1e-4
        assert torch.equal(made[row, -n - 8 :], greedy(ours, ids, 8)[0])
        # Negative control: the same weights without the slot are another model.
        assert (theirs(ids).logits - ours(ids)).abs().max() > 1e-2


def test_slots_are_their_columns(mechanism: SinkConfig) -> None:
    """What ``slot`` says in front of a sequence computes what ``column`` adds to the softmax."""
    sink = exporters.sinks.build(mechanism, TINY)
    for p in sink.parameters():
        torch.nn.init.normal_(p)
    slot = sink.slot()
    if slot is None:
        return
    q, k, v = torch.randn(3, 1, TINY.n_head, 10, TINY.head_dim)
    got = causal_attention(q, k, v, sink.column(q, torch.arange(1, 11)))
    key, value = (x[None, :, None] for x in slot)
    front = (torch.cat((a, b), dim=2) for a, b in ((torch.zeros_like(key), q), (key, k), (value, v)))
    assert (got - causal_attention(*front, None)[:, :, 1:]).abs().max() < 1e-5


@pytest.mark.parametrize("name", [*EVERY, *(f"{n}/seeded" for n in SEEDED)])
def test_every_export_comes_back(name: str, all_exports) -> None:
    run, exported = all_exports[name]
    first, back = load_model(run), load_model(exported.folder)
    assert (back.label, back.step, back.name) == (first.label, 12, "small")
    assert back.model.config == first.model.config
    assert all(torch.equal(v, back.model.state_dict()[k]) for k, v in first.model.state_dict().items())


def test_a_lost_slot_is_noticed(all_exports, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(all_exports["key_bias/seeded"][1].folder, folder)
    (folder / "seeded_slot.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*seeded_slot\.safetensors"):
        load_model(folder)


def test_a_wrong_slot_is_noticed(tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that was not turned on by a position: the difference that verification is for."""
    run = make_run(tmp_path / "run", MECHANISMS["key_bias"], tokenizer_file)
    monkeypatch.setattr(seeded_slot, "_turned", lambda key, base, share: key)
    with pytest.raises(VerificationError, match="logits differ"):
        export(run, tmp_path / "hf")
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slot_of_other_state_takes_our_class(
    dtype: str, tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a slot holds keys and values, from which no parameter of another name or meaning comes back."""

    class FixedValue(sinks.KeyBias):
        name = "fixed_value"

        def __init__(self, model: ModelConfig) -> None:
            super().__init__(model)
            self.register_buffer("fixed", torch.full((model.n_head, model.head_dim), 0.3))

        def slot(self):
            return self.key.float(), self.fixed.float()

        def column(self, q_BHTD, seen):
            return super().column(q_BHTD, seen)._replace(value=self.fixed.float())

    monkeypatch.setitem(sinks.REGISTRY, "fixed_value", FixedValue)
    run = make_run(tmp_path / "run", SinkConfig("fixed_value"), tokenizer_file)
    with pytest.raises(UserError, match="cannot compute fixed_value"):
        export(run, tmp_path / "hf", architecture="stock")
    assert left_over(tmp_path) == []
    assert export(run, tmp_path / "hf", dtype=dtype).form == "own"
    again = load_model(tmp_path / "hf").trained
    assert again.blocks[1].attn.sink.fixed[0, 0] == torch.tensor(0.3).to(getattr(torch, dtype))


def test_cards_say_how_to_load(all_exports) -> None:
    def card(name: str) -> str:
        return (all_exports[name][1].folder / "README.md").read_text(encoding="utf-8")

    assert "import sinkpretrain.hf_model" in card("softpick")
    assert "generate_inputs(model" in card("zero_sink/seeded")
    assert "9 tokens before each, and the first 2" in card("window")


def test_a_card_tells_of_the_run(tmp_path: Path) -> None:
    from data_factory import make_data
    from test_train import config, train

    run = tmp_path / "run"
    train(dataclasses.replace(config(make_data(tmp_path / "data"), run), sink=SinkConfig("softpick")))
    (run / "tokenizer.json").unlink()  # the made one is no tokenizer
    (weights,) = (run / "weights").glob("step-*08.safetensors")
    export(weights, tmp_path / "hf", note="Trained on a made text.\n")
    card = (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    for fact in (
        "\n\nTrained on a made text.\n\n| | |",
        "8 samples of 64 tokens",
        "peak learning rate 0.003",
        "validation loss",
        "train_sha256",
        "Sink_1",
        "tokens read | 4,096,",
        f"torch {torch.__version__}",
    ):
        assert fact in card, fact
    assert str(tmp_path) not in card
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(card.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    told, trained = load_yaml(RunConfig, recipe), load_yaml(RunConfig, run / "config.yaml")
    data = dataclasses.replace(trained.data, path="", validation_path="")
    assert told == dataclasses.replace(trained, out="", name="", log=told.log, data=data)
