"""Models of kinds that are not known by name: against transformers' own forward, streamed, and those to be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_factory import evicting_loop, save, sharpened
from safetensors.torch import load_file, save_file

from sinkpretrain.cache import Cache
from sinkpretrain.cli import main
from sinkpretrain.decode import Engine
from sinkpretrain.decoder import Rotary
from sinkpretrain.errors import UserError
from sinkpretrain.foreign import Foreign, Turn
from sinkpretrain.load import load_model
from sinkpretrain.probe import distance, load_foreign
from sinkpretrain.streaming import dense_nll, recompute_nll, stream_nll, token_loop_nll

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MIXED = ["sliding_attention", "full_attention"] * 2
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1e5},
}

MODELS: dict[str, dict[str, Any]] = {
    "gpt_oss": EXPERTS | {"head_dim": 8, "sliding_window": 9},  # a learned logit, windows, yarn, experts
    "gemma3_text": {"head_dim": 16, "sliding_window": 9, "layer_types": MIXED, "rope_parameters": TWO_BASES},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 9,
        "query_pre_attn_scalar": 2,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },  # capped logits
    "olmo2": {},  # norms of all q and k, and behind attention
    "cohere2": {"sliding_window": 9, "layer_types": MIXED},  # neighbours rotated, or nothing; logits scaled
    "glm4": {"head_dim": 8},  # half of the dimensions rotated, neighbours
    "stablelm": {},  # a quarter of them, halves
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 3.0},
    "phi": {"num_key_value_heads": 4},  # a bias of the output matrix
    "mixtral": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_key_value_heads": None},  # learned positions
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 9,
        "layer_types": MIXED,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
    },  # heads of two sizes, keys and values of earlier layers, embeddings of the tokens in every layer
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 20,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },  # the last third of the dimensions rotated, neighbours, values larger than keys
    "gpt_neox": {
        "num_key_value_heads": None,
        "hidden_act": "gelu_fast",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5},
    },  # as GPT-NeoX-20B and others: nothing that is trained here
    "nanochat": {},  # rotated backwards; capped logits
    "ministral3": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 32.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
        },
    },  # queries scaled from position 8 on
    "mimo_v2_flash": EXPERTS
    | {
        "num_key_value_heads": 1,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "head_dim": 12,
        "swa_head_dim": 12,
        "v_head_dim": 8,
        "swa_v_head_dim": 8,
        "sliding_window": 9,
        "layer_types": MIXED,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    },  # a learned logit in the layers with windows alone, which have more keys
}

FACTORS = {"cohere2": 16.0, "granite": 3.0}
"""By which the output matrix is made larger where its logits are scaled down."""

Made = Callable[[str], tuple[torch.nn.Module, Path]]


def build(kind: str, **options: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{k: v for k, v in {**SHAPE, **options}.items() if v is not None})
    torch.manual_seed(sum(map(ord, kind)))
    model = sharpened(AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval())
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(FACTORS.get(kind, 1.0))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, cache = tmp_path_factory.mktemp("foreign"), {}

    def get(kind: str) -> tuple[torch.nn.Module, Path]:
        if kind not in cache:
            model = build(kind, **MODELS[kind])
            cache[kind] = model, save(model, folder / kind)
        return cache[kind]

    return get


@pytest.fixture(scope="module")
def taken_over(made: Made) -> Callable[[str], Foreign]:
    return cache(lambda kind: load_foreign(made(kind)[1])[0])


def ids_for(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 96, length)


@torch.no_grad()
def own_nll(theirs: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    logits = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
    return F.cross_entropy(logits.float(), torch.from_numpy(ids[1:]), reduction="none").numpy()


@pytest.mark.parametrize("kind", list(MODELS))
def test_parity_with_transformers(kind: str, made: Made, taken_over) -> None:
    theirs, _ = made(kind)
    ours, ids = taken_over(kind), ids_for(60)
    want = own_nll(theirs, ids)
    assert want.std() > 0.5
    assert np.abs(dense_nll(ours, ids, block=17) - want).max() < 5e-5
    assert np.abs(recompute_nll(ours, ids, 60)[:50] - want[:50]).max() < 5e-5


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("positions", ["in-cache", "absolute"])
def test_blocks_equal_the_token_loop(kind: str, positions, taken_over) -> None:
    ours, ids, cache = taken_over(kind), ids_for(40), Cache(2, 11)
    want = token_loop_nll(ours, ids, cache, positions=positions)
    for block in (7, 64):
        assert np.abs(stream_nll(ours, ids, cache, block=block, positions=positions) - want).max() < 1e-4, block
    assert np.abs(stream_nll(ours, ids, Cache(0, 13), positions=positions) - want).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "positions", "place"),
    [
        ("olmo2", "absolute", lambda t, size: t),
        ("glm4", "absolute", lambda t, size: t),
        ("granite", "absolute", lambda t, size: t),
        ("phi", "absolute", lambda t, size: t),
        ("deepseek_v3", "absolute", lambda t, size: t),
        ("nanochat", "absolute", lambda t, size: t),
        ("gpt_neox", "absolute", lambda t, size: t),
        ("ministral3", "absolute", lambda t, size: t),
        ("opt", "absolute", lambda t, size: t),
        ("opt", "in-cache", lambda t, size: min(t, size)),
    ],
)
def test_streaming_equals_transformers_with_an_evicting_cache(
    kind: str, positions, place, made: Made, taken_over
) -> None:
    theirs, _ = made(kind)
    ours, ids, cache = taken_over(kind), ids_for(60), Cache(3, 10)
    want = evicting_loop(theirs, ids, cache, place)
    assert np.abs(stream_nll(ours, ids, cache, positions=positions) - want).max() < 1e-4
    other = "absolute" if positions == "in-cache" else "in-cache"
    assert np.abs(stream_nll(ours, ids, cache, positions=other) - want).max() > 1e-3


def test_what_is_found_out(taken_over) -> None:
    specs = {kind: taken_over(kind).config for kind in MODELS}
    turns = {kind: spec.turns for kind, spec in specs.items()}
    assert specs["gpt_oss"].windows == (9, None, 9, None)
    assert [kind for kind in MODELS if specs[kind].sink_logits] == ["gpt_oss", "mimo_v2_flash"]
    assert [sink.adds_column for sink in taken_over("mimo_v2_flash").sinks] == [True, False] * 2
    assert [kind for kind in MODELS if specs[kind].scaled] == ["ministral3"]
    assert {turn.rotary.factor for turn in turns["gpt_oss"]} != {1.0}
    assert turns["gemma3_text"] == turns["gemma3_text"][:2] * 2
    assert len(set(turns["gemma3_text"])) == 2
    assert {kind: spec.head_dim for kind, spec in specs.items() if spec.head_dim != 8} == {
        "gemma3_text": 32, "cohere2": 16, "gemma4_text": 24, "deepseek_v3": 20, "mimo_v2_flash": 16,
    }  # fmt: skip
    assert [turn is None for turn in turns["cohere2"]] == [False, True] * 2
    assert [kind for kind in MODELS if turns[kind][0] and turns[kind][0].neighbours] == ["cohere2", "glm4"]
    assert (turns["glm4"][0].width, turns["stablelm"][0].width) == (4, 2)
    assert (turns["deepseek_v3"][0].first, turns["deepseek_v3"][0].width) == (8, 4)
    assert max(turns["nanochat"][0].rotary.frequencies) < 0
    assert specs["granite"].scales == (0.3,) * 4
    factors = {kind: spec.logit_factor for kind, spec in specs.items() if spec.logit_factor != 1.0}
    assert factors == {"cohere2": pytest.approx(0.0625), "granite": pytest.approx(1 / 3)}
    assert {kind for kind in MODELS if specs[kind].learned_positions} == {"opt"}
    assert not any(turns["opt"])


def slower(turn: Turn) -> Turn:
    return replace(turn, rotary=Rotary(tuple(f / 2 for f in turn.rotary.frequencies), turn.rotary.factor))


MUTATIONS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "other frequencies": ("olmo2", lambda s: {"ways": tuple(map(slower, s.ways))}),
    "one base for all": ("gemma3_text", lambda s: {"way_of": (0,) * 4}),
    "the first dimensions": ("deepseek_v3", lambda s: {"ways": (replace(s.ways[0], first=0),)}),
    "halves for neighbours": ("glm4", lambda s: {"ways": (replace(s.ways[0], neighbours=False),)}),
    "a rotation for all": ("cohere2", lambda s: {"way_of": (0,) * 4}),
    "windows of other layers": ("cohere2", lambda s: {"windows": s.windows[::-1]}),
    "window off by one": ("gpt_oss", lambda s: {"windows": (10, None, 10, None)}),
    "no cap": ("gemma2", lambda s: {"caps": (None,) * 4}),
    "no cap of the head": ("gemma2", lambda s: {"logit_cap": None}),
    "usual scale": ("granite", lambda s: {"scales": (8**-0.5,) * 4}),
    "scale of other positions": ("ministral3", lambda s: {"scaled": False}),
}


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_mutations_show(mutation: str, made: Made) -> None:
    kind, change = MUTATIONS[mutation]
    theirs, folder = made(kind)
    ours, ids = load_foreign(folder)[0], ids_for(60)
    logits = [getattr(sink, "s", None) for sink in ours.sinks]
    ours.head._forward_hooks.clear()  # what scales its logits
    right = Foreign(ours.theirs, ours.blocks, ours.config, logits)
    assert np.abs(dense_nll(right, ids) - own_nll(theirs, ids)).max() < 5e-5
    ours.head._forward_hooks.clear()
    wrong = Foreign(ours.theirs, ours.blocks, replace(ours.config, **change(ours.config)), logits)
    assert np.abs(dense_nll(wrong, ids, block=17) - own_nll(theirs, ids)).max() > 1e-3


def test_a_learned_logit_is_the_column_that_can_be_left_out(made: Made, taken_over) -> None:
    ours, ids = taken_over("gpt_oss"), ids_for(40)
    kept, dropped = (stream_nll(ours, ids, Cache(0, 12), drop_column=drop) for drop in (False, True))
    assert np.abs(kept - dropped).max() > 1e-3
    assert load_model(made("gpt_oss")[1]).label == "sink_logit"
    assert isinstance(load_model(made("gpt_neox")[1]).model, Foreign)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gpt_oss", torch.bfloat16), ("gpt_oss", torch.float16), ("gemma2", torch.bfloat16)]
)
def test_rounding_is_no_reason_to_refuse(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = save(build(kind, **MODELS[kind], num_hidden_layers=12).to(dtype), tmp_path / "m")
    ours, exact, ids = load_foreign(folder)[0], load_foreign(folder, torch.float32)[0], ids_for(60)
    plain, rounded = (
        own_nll(AutoModelForCausalLM.from_pretrained(folder, dtype=d, attn_implementation="eager"), ids)
        for d in (torch.float32, dtype)
    )
    assert np.abs(dense_nll(exact, ids) - plain).max() < 2e-4
    assert np.median(np.abs(dense_nll(ours, ids) - plain)) < 0.02 + 2 * np.median(np.abs(rounded - plain))


def test_weights_keep_their_dtype(made: Made, tmp_path: Path) -> None:
    theirs, _ = made("olmo2")
    folder = save(build("olmo2").bfloat16(), tmp_path / "m")
    ours, _ = load_foreign(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert distance(ours(torch.from_numpy(ids_for(30))[None]), theirs(torch.from_numpy(ids_for(30))[None]).logits) < 500
    assert {p.dtype for p in load_foreign(folder, torch.float32)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3", "mimo_v2_flash"])
def test_experts_in_double_precision(kind: str, made: Made, taken_over, tmp_path: Path) -> None:
    """For which torch has no grouped product: read so, as by ``stream``, or brought there later, as by ``inspect``."""
    folder, ids = made(kind)[1], ids_for(60)
    want = dense_nll(taken_over(kind), ids)
    exact = load_foreign(folder, torch.float64)[0]
    later = load_foreign(folder, torch.float32)[0].to(torch.float64)
    for model in (exact, later):
        assert np.abs(dense_nll(model, ids) - want).max() < 5e-5
    np.save(tmp_path / "ids.npy", ids_for(300))
    words = ["--tokens", str(tmp_path / "ids.npy"), "--dtype", "float64", "--progress", "false"]
    assert main(["inspect", str(folder), *words, "--samples", "4", "--out", str(tmp_path / "i")]) == 0
    assert main(["stream", str(folder), *words, "--cache", "0+16", "--out", str(tmp_path / "s")]) == 0


def test_tokens_are_read_as_one_by_one(taken_over) -> None:
    for kind in ("gpt_oss", "gemma4_text", "deepseek_v3", "opt", "ministral3", "mimo_v2_flash"):
        ours, ids = taken_over(kind), ids_for(40)
        engine = Engine(ours, Cache(2, 11))
        nll = [F.cross_entropy(engine.step(int(a))[None], torch.tensor([int(b)])) for a, b in pairwise(ids)]
        assert np.abs(torch.stack(nll).numpy() - token_loop_nll(ours, ids, Cache(2, 11))).max() < 1e-4
        with pytest.raises(UserError, match="leave --compile out"):
            engine.compile()


def test_commands_take_them(made: Made, tmp_path: Path) -> None:
    _, folder = made("gpt_oss")
    np.save(tmp_path / "ids.npy", ids_for(300))
    out = tmp_path / "out"
    words = ["--tokens", str(tmp_path / "ids.npy"), "--out", str(out), "--progress", "false"]
    assert main(["stream", str(folder), *words, "--cache", "0+16,4+12"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["model"]["shape"]["family"], results["model"]["mechanism"]) == ("gpt_oss", "sink_logit")
    assert {"0+16", "4+12", "0+16-nocolumn"} <= results["settings"].keys()


def test_a_column_in_some_layers_is_shown_in_those(made: Made, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", ids_for(300))
    out = tmp_path / "out"
    words = ["--tokens", str(tmp_path / "ids.npy"), "--out", str(out), "--progress", "false"]
    assert main(["inspect", str(made("mimo_v2_flash")[1]), *words, "--samples", "4"]) == 0
    results = json.loads((out / "inspect.json").read_text())
    has = [entry["column"] is not None for entry in results["average_logits"]]
    assert [entry["layer"] for entry in results["average_logits"]] == [0, 1, 2, 3]
    assert has == [True, False] * 2 == [np.mean(layer) > 0 for layer in results["measures"]["column"]]


@pytest.mark.parametrize(("kind", "text"), [("mistral3", "ministral3"), ("gemma3", "gemma3_text")])
def test_models_that_also_see_read_text(kind: str, text: str, tmp_path: Path) -> None:
    """Folders of Ministral 3 and Gemma 3 hold a model of images and text around the one of text."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    about = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        kind,
        text_config=SHAPE | MODELS[text] | {"model_type": text},
        vision_config=about | {"image_size": 28, "patch_size": 14},
    )
    torch.manual_seed(0)
    theirs = sharpened(AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval())
    ours, ids = load_foreign(save(theirs, tmp_path / "m"))[0], ids_for(60)
    assert ours.config.family == text
    assert np.abs(dense_nll(ours, ids, block=17) - own_nll(theirs, ids)).max() < 5e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "phi3": ({"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64}}, "depends on the length"),
    "hunyuan_v1_dense": ({"head_dim": 8}, "rotates queries and keys in a way"),  # norms behind the rotation
    "deepseek_v32": (MODELS["deepseek_v3"] | {"index_topk": 512, "index_head_dim": 8, "index_n_heads": 2},
        "attention is given 'indices'"),
    "deepseek_v4": ({
        "head_dim": 16, "num_key_value_heads": 1, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2,
        "index_n_heads": 2, "index_head_dim": 8, "qk_rope_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2}, "a layer attends to 30 keys of 24 tokens"),
    "rembert": ({"num_key_value_heads": None, "is_decoder": True, "input_embedding_size": 16,
        "output_embedding_size": 24}, r"its logits do not follow from .* alone .RuntimeError: [^\n]*[^.\n]\)\.$"),
    "diffllama": ({}, "4 layers do not call .* but 8 times"),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 2}, "4 layers do not call .* but 2 times"),
    "mamba": ({}, "4 layers do not call .* but 0 times"),
    "bloom": ({"n_head": 4, "n_layer": 4}, "4 layers do not call .* but 0 times"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_would_not_be_exact_is_refused(kind: str, tmp_path: Path) -> None:
    options, sentence = REFUSED[kind]
    folder = save(build(kind, **options), tmp_path / kind)
    with pytest.raises(UserError, match=f"{kind} cannot be streamed exactly: .*{sentence}"):
        load_foreign(folder)


@pytest.mark.parametrize("part", ["mlp", "self_attn.o_proj"])
@pytest.mark.parametrize("mix", [lambda x: x.cumsum(1), lambda x: x.roll(1, 1)])
def test_tokens_that_meet_outside_of_attention(part: str, mix, made: Made, monkeypatch) -> None:
    """In the last layer alone: all those before, and only the one before, of what attention gives or of anything."""
    from transformers.models.olmo2 import modeling_olmo2 as olmo2

    folder, init = made("olmo2")[1], olmo2.Olmo2Model.__init__

    def mixing(self, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.layers[-1].get_submodule(part).register_forward_hook(lambda _, __, out: out + mix(out))

    monkeypatch.setattr(olmo2.Olmo2Model, "__init__", mixing)
    with pytest.raises(UserError, match="tokens meet by other means"):
        load_foreign(folder)


def test_keys_that_are_scaled_by_positions(made: Made, monkeypatch) -> None:
    """Keys are kept while their places change: only a query's own place is known when it is scaled."""
    from transformers.models.ministral3 import modeling_ministral3 as ministral3

    folder, inner, places = made("ministral3")[1], ministral3.Ministral3Attention.__init__, []

    def init(self, *args: Any, **options: Any) -> None:
        inner(self, *args, **options)
        self.register_forward_pre_hook(lambda _, __, given: places.append(given["position_ids"]), with_kwargs=True)
        self.k_proj.register_forward_hook(lambda _, __, out: out * (1 + places[-1][..., None] // 1000))

    monkeypatch.setattr(ministral3.Ministral3Attention, "__init__", init)
    with pytest.raises(UserError, match="depends on positions by other means"):
        load_foreign(folder)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    folder = save(build("olmo2"), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, what in (
        ({k: v for k, v in state.items() if k != name}, f"missing keys: {name}"),
        (state | {"more": torch.zeros(1)}, "unexpected keys: more"),
        (state | {name: torch.zeros(2, 2)}, name),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"^the weights in .* do not fit its config.json .*{what}"):
            load_model(folder)
    save_file(state | {name: torch.full_like(state[name], torch.nan)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="cannot be streamed exactly: its predictions are not finite"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(UserError, match=r"^transformers cannot load .*no such thing"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match=r"^transformers cannot load .*: a 'vit' model is none that predicts the next"):
        load_model(folder)
