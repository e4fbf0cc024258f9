"""Every family against transformers' own model, mutations that must show, and folders that must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_factory import MODELS, build, evicting_loop, save
from safetensors.torch import load_file, save_file

from sinkpretrain.cache import Cache
from sinkpretrain.decoder import Alibi, Decoder, Learned, Rotary, Spec
from sinkpretrain.errors import UserError
from sinkpretrain.families import load_decoder
from sinkpretrain.load import load_model
from sinkpretrain.streaming import dense_nll, recompute_nll, stream_nll, token_loop_nll

LENGTH = 50


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[torch.nn.Module, Path]]:
    folder, cache = tmp_path_factory.mktemp("families"), {}

    def get(name: str) -> tuple[torch.nn.Module, Path]:
        if name not in cache:
            model = build(name)
            cache[name] = model, save(model, folder / name)
        return cache[name]

    return get


def ids_for(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, length)


@torch.no_grad()
def difference(theirs: torch.nn.Module, ours: Decoder) -> float:
    ids = torch.from_numpy(ids_for())[None]
    return (theirs(input_ids=ids).logits - ours(ids)).abs().max().item()


@pytest.mark.parametrize("name", list(MODELS))
def test_parity_with_transformers(name: str, made) -> None:
    theirs, folder = made(name)
    ours, _ = load_decoder(folder)
    assert difference(theirs, ours) < 1e-5
    ids = ids_for()
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
    want = F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none").numpy()
    assert np.abs(dense_nll(ours, ids, block=17) - want).max() < 2e-5
    assert np.abs(recompute_nll(ours, ids, 50)[:40] - want[:40]).max() < 2e-5


def slower(spec: Spec) -> Rotary:
    assert isinstance(spec.positions, Rotary)
    return Rotary(tuple(f / 2 for f in spec.positions.frequencies))


MUTATIONS: dict[str, tuple[str, Callable[[Spec], Spec]]] = {
    "no rotation": ("llama", lambda s: replace(s, positions=Rotary(()))),
    "other frequencies": ("llama-3", lambda s: replace(s, positions=slower(s))),
    "unscaled yarn": ("llama-yarn", lambda s: replace(s, positions=replace(s.positions, factor=1.0))),
    "no window": ("mistral", lambda s: replace(s, windows=(None,) * 3)),
    "window off by one": ("mistral", lambda s: replace(s, windows=(10,) * 3)),
    "windows of other layers": ("qwen2-windows", lambda s: replace(s, windows=s.windows[::-1])),
    "no norm of q and k": ("qwen3", lambda s: replace(s, qk_norm=False)),
    "no bias": ("qwen2", lambda s: replace(s, qkv_bias=False)),
    "no gate's activation": ("llama", lambda s: replace(s, activation="relu")),
    "other residual": ("llama", lambda s: replace(s, residual="parallel")),
    "norms not shared": ("falcon-40b", lambda s: replace(s, residual="sequential")),
    "layer norm for rms": ("llama", lambda s: replace(s, norm="layer")),
    "no alibi": ("mpt", lambda s: replace(s, positions=Alibi((0.0,) * 4))),
    "alibi of other heads": ("falcon-rw", lambda s: replace(s, positions=Alibi(s.positions.slopes[::-1]))),
    "no clipping": ("mpt-clip-heads", lambda s: replace(s, clip_qkv=None)),
    "usual scale": ("mpt-clip-heads", lambda s: replace(s, scale=None)),
    "exact gelu for tanh": ("gpt2", lambda s: replace(s, activation="gelu")),
}


@pytest.mark.parametrize("mutation", list(MUTATIONS))
def test_mutations_show(mutation: str, made) -> None:
    name, change = MUTATIONS[mutation]
    theirs, folder = made(name)
    ours, _ = load_decoder(folder)
    other = Decoder(change(ours.config))
    other.load_state_dict(ours.state_dict(), strict=False)
    assert difference(theirs, other.eval()) > 1e-4


def test_swapped_rows_and_heads_show(made, monkeypatch) -> None:
    """Negative controls of the weights' order: gate and value exchanged, neighbouring heads served by other keys."""
    theirs, folder = made("llama")
    ours, _ = load_decoder(folder)
    with torch.no_grad():
        for block in ours.blocks:
            block.mlp.up.weight.copy_(block.mlp.up.weight.roll(48, 0))
    assert difference(theirs, ours) > 1e-3
    ours, _ = load_decoder(folder)
    monkeypatch.setattr("sinkpretrain.attention.spread_heads", lambda x, heads: x.repeat(1, heads // x.shape[1], 1, 1))
    assert difference(theirs, ours) > 1e-3


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("positions", ["in-cache", "absolute"])
def test_blocks_equal_the_token_loop(name: str, positions, made) -> None:
    ours, _ = load_decoder(made(name)[1])
    ids, cache = ids_for(40), Cache(2, 11)
    want = token_loop_nll(ours, ids, cache, positions=positions)
    for block in (7, 64):
        got = stream_nll(ours, ids, cache, block=block, positions=positions)
        assert np.abs(got - want).max() < 1e-4, block
    other = stream_nll(ours, ids, Cache(0, 13), positions=positions)
    assert name.startswith(("mistral", "qwen2-w")) or np.abs(other - want).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "positions", "place"),
    [
        ("mpt", "in-cache", None),  # its bias follows from the length of the cache
        ("gpt2", "in-cache", lambda t, size: min(t, size)),
        ("gpt2", "absolute", lambda t, size: t),
        ("llama", "absolute", lambda t, size: t),
        ("qwen3", "absolute", lambda t, size: t),
        ("falcon-7b", "absolute", lambda t, size: t),
    ],
)
def test_streaming_equals_transformers_with_an_evicting_cache(name: str, positions, place, made) -> None:
    theirs, folder = made(name)
    ours, _ = load_decoder(folder)
    ids, cache = ids_for(60), Cache(3, 10)
    want = evicting_loop(theirs, ids, cache, place)
    assert np.abs(stream_nll(ours, ids, cache, positions=positions) - want).max() < 1e-4
    other = "absolute" if positions == "in-cache" else "in-cache"
    assert np.abs(stream_nll(ours, ids, cache, positions=other) - want).max() > 1e-3


# --- files --------------------------------------------------------------------------------------------------------


def test_a_family_is_a_model_everywhere(made) -> None:
    loaded = load_model(made("llama-3")[1])
    assert (loaded.label, loaded.name, loaded.step) == ("vanilla", "llama-3", None)
    about = loaded.provenance()
    assert about["shape"]["family"] == "llama"
    assert about["parameters"] == sum(p.numel() for p in made("llama-3")[0].parameters())
    json.dumps(about)
    with pytest.raises(UserError, match="no GPT-NeoX model"):
        loaded.trained  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype_unless_told(dtype: torch.dtype, made, tmp_path: Path) -> None:
    folder = save(build("qwen3").to(dtype), tmp_path / "half")
    assert load_model(folder, dtype=None).model.embed.weight.dtype == dtype
    assert load_model(folder).model.embed.weight.dtype == torch.float32


def test_split_and_old_files(made, tmp_path: Path) -> None:
    theirs, _ = made("llama")
    split = save(theirs, tmp_path / "split", max_shard_size="20KB")
    assert len(list(split.glob("*.safetensors"))) > 2
    ours, files = load_decoder(split)
    assert difference(theirs, ours) < 1e-5
    assert len(files) == len(list(split.glob("*.safetensors")))
    old = save(theirs, tmp_path / "old")
    torch.save(theirs.state_dict(), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    assert difference(theirs, load_decoder(old)[0]) < 1e-5
    files[0].unlink()
    with pytest.raises(UserError, match=rf"lacks {files[0].name}.*download it again"):
        load_decoder(split)
    for index in ('{"metadata": {}}', '{"weight_map": {"lm_head.weight": 1}}', "[]"):
        (split / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=r"index\.json does not say which file holds which weights"):
            load_decoder(split)


def test_files_of_the_bare_model(made, tmp_path: Path) -> None:
    """The oldest GPT-2 files have no ``transformer.`` in front of their names, and buffers that follow from nothing."""
    theirs, _ = made("gpt2")
    folder = save(theirs, tmp_path / "bare")
    state = {k.removeprefix("transformer."): v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(state, folder / "model.safetensors")
    assert difference(theirs, load_decoder(folder)[0]) < 1e-5


def changed(folder: Path, to: Path, **options: object) -> Path:
    to.mkdir()
    config = json.loads((folder / "config.json").read_text()) | options
    (to / "config.json").write_text(json.dumps(config))
    (to / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return to


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("llama", {"model_type": "mamba"}, "do not fit its config.json .missing keys: backbone"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "scaled by 'dynamic'"),
        ("llama", {"hidden_act": "tanh"}, "activation 'tanh' is not supported"),
        ("llama", {"num_hidden_layers": 4}, r"lack 'model\.layers\.3\.input_layernorm"),
        ("llama", {"num_hidden_layers": 2}, r"hold 'model\.layers\.2\.input_layernorm"),
        ("llama", {"intermediate_size": 40}, "do not fit their own configuration"),
        ("llama", {"num_attention_heads": "four"}, "cannot be understood"),
        ("llama", {"model_type": ["llama"]}, "does not say what kind of model"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "holds quantized weights .* for llama"),
        ("llama", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "has no 'x' model, and code that lies in a"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0 is no window"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types with 'chunked_attention' among them"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "(2 of them are not supported|must be equal)"),
        ("falcon-7b", {"num_attention_heads": 3}, "hidden_size 32 is not a multiple of num_attention_heads 3"),
        ("falcon-7b", {"hidden_size": 64}, r"do not fit their own configuration: transformer\.h\.0\.self_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi=False is not supported"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln=True is not supported"),
        ("mpt", {"logit_scale": 0.5}, r"logit_scale=0\.5 is not supported"),
        ("mpt", {"no_bias": False}, r"lack 'transformer\.blocks\.0\.norm_1\.bias"),
        ("falcon-40b", {"parallel_attn": False}, "parallel_attn=False is not supported"),
    ],
)  # fmt: skip
def test_folders_that_would_not_be_exact(name: str, options: dict, sentence: str, made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load_model(changed(made(name)[1], tmp_path / "changed", **options))


def test_weights_that_do_not_fit_are_one_line(made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"size mismatch for blocks\.0") as caught:
        load_model(changed(made("llama")[1], tmp_path / "changed", intermediate_size=40))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "falcon-7b", "gpt2"])
def test_a_head_beside_embeddings_that_are_tied(name: str, made, tmp_path: Path) -> None:
    """The same matrix twice is tied; of two, versions of transformers take one or the other."""
    folder = changed(made(name)[1], tmp_path / "tied", tie_word_embeddings=True)
    state = load_file(folder / "model.safetensors")
    names = [key for key in state if key.endswith(("embed_tokens.weight", "word_embeddings.weight", "wte.weight"))]
    embedding = state[names[0]]
    save_file(state | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    model = load_model(folder).model
    assert torch.equal(model.head.weight, embedding)
    save_file(state | {"lm_head.weight": embedding.flip(0).contiguous()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"hold a 'lm_head\.weight' of its own, but .* ties it to the embedding"):
        load_model(folder)


def test_mistral_with_windows_in_some_layers(made, tmp_path: Path) -> None:
    """transformers' own loading takes layer_types for a Ministral, which has the same weights."""
    from transformers import AutoModelForCausalLM

    kinds = ["full_attention", "sliding_attention", "full_attention"]
    folder = changed(made("mistral")[1], tmp_path / "layers", layer_types=kinds)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, _ = load_decoder(folder)
    assert ours.windows == (None, 9, None)
    assert difference(theirs, ours) < 1e-5
    assert difference(made("mistral")[0], ours) > 1e-3


def test_mpt_with_biases(made, tmp_path: Path) -> None:
    """Biases of zero are the model without them; others are not."""
    theirs, folder = made("mpt")
    biased = changed(folder, tmp_path / "biased", no_bias=False)
    state = load_file(folder / "model.safetensors")
    for value in (0.0, 0.5):
        biases = {
            k.replace(".weight", ".bias"): torch.full(v.shape[:1], value)
            for k, v in state.items()
            if "wte" not in k and "lm_head" not in k
        }
        save_file(state | biases, biased / "model.safetensors")
        assert (difference(theirs, load_decoder(biased)[0]) < 1e-5) == (value == 0.0)


def test_unreadable_weights(made, tmp_path: Path) -> None:
    folder = changed(made("llama")[1], tmp_path / "broken")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"cannot read the weights .*model\.safetensors"):
        load_model(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"cannot read the weights .*pytorch_model\.bin"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_model(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_adapters_are_not_applied(whole: bool, made, tmp_path: Path) -> None:
    """transformers would load such an adapter beside a model's weights, so these alone are another model."""
    folder = changed(made("llama")[1], tmp_path / "tuned")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not whole:
        (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds an adapter .* merge it into its model"):
        load_model(folder)


def test_names_of_the_hub_without_a_network(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"no folder meta-llama/Llama-2-7b-hf, and the Hugging Face Hub cannot be asked"
    ):
        load_model("meta-llama/Llama-2-7b-hf")


def test_learned_positions_are_counted(made) -> None:
    ours, _ = load_decoder(made("gpt2")[1])
    assert ours.learned_positions == 64
    assert isinstance(ours.config.positions, Learned)
