"""Everything that may be called a model, and what is said of things that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, peaked
from run_factory import save_weights
from safetensors.torch import save_file

from sinkpretrain import hf
from sinkpretrain.config import SinkConfig, to_dict
from sinkpretrain.errors import UserError
from sinkpretrain.files import sha256_file
from sinkpretrain.load import METADATA_KEY, load_model, newest_weights
from sinkpretrain.model import GPTNeoX

OURS = {METADATA_KEY: {"model": to_dict(TINY), "sink": to_dict(SinkConfig())}}
"""What an exported folder says about itself."""


def run_with(folder: Path, net: GPTNeoX, *steps: int) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("name: x\n")
    for step in steps:
        save_weights(net, folder / f"weights/step-{step:07d}.safetensors", step)
    return folder


def write_checkpoint(net: GPTNeoX, file: Path, step: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": to_dict(net.config), "sink": to_dict(net.sink_config), "step": step, "name": "named"}
    state = {f"model.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": {**state, "other.thing": torch.zeros(1)}, METADATA_KEY: about}, file)


def write_hf(net: GPTNeoX, folder: Path, **changes: object) -> Path:
    folder.mkdir()
    config = {"model_type": "gpt_neox", **hf.hf_config(net.config), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(hf.to_hf(net.state_dict(), net.config), folder / "model.safetensors")
    return folder


def same_weights(a: GPTNeoX, b: GPTNeoX) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_weights_say_what_they_are(mechanism: SinkConfig, tmp_path: Path) -> None:
    net = peaked(GPTNeoX(TINY, mechanism, seed=1))
    loaded = load_model(run_with(tmp_path / "run", net, 7))
    assert same_weights(net, loaded.model)
    assert (loaded.model.config, loaded.model.sink_config) == (net.config, mechanism)
    assert loaded.model.prefix_ids == net.prefix_ids
    assert (loaded.step, loaded.name, loaded.tokenizer) == (7, "run", None)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_newest_weights_are_taken_and_plain_ones_first(tmp_path: Path) -> None:
    net = GPTNeoX(TINY)
    run = run_with(tmp_path / "run", net, 0, 900, 1000)
    assert load_model(run).step == 1000
    write_checkpoint(net, run / "checkpoints/step-0001000.ckpt", 1000)
    assert newest_weights(run).suffix == ".safetensors"
    write_checkpoint(net, run / "checkpoints/step-0010000.ckpt", 10000)
    assert load_model(run).files[0].name == "step-0010000.ckpt"


def test_checkpoint_and_tokenizer_of_its_run(tmp_path: Path) -> None:
    net = peaked(GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 2})))
    file = tmp_path / "run/checkpoints/step-0000003.ckpt"
    write_checkpoint(net, file, 3)
    (tmp_path / "run/tokenizer.json").write_text("{}")
    loaded = load_model(file)
    assert same_weights(net, loaded.model)
    assert (loaded.step, loaded.name, loaded.label) == (3, "named", "sink_tokens(n=2)")
    assert loaded.tokenizer == tmp_path / "run/tokenizer.json"


def test_weights_stored_as_bf16_are_read_as_fp32(tmp_path: Path) -> None:
    net = GPTNeoX(TINY, seed=1)
    save_weights(net, tmp_path / "w.safetensors", 1, dtype=torch.bfloat16)
    back = load_model(tmp_path / "w.safetensors").model
    assert back.embed.weight.dtype == torch.float32
    assert torch.equal(back.embed.weight, net.embed.weight.bfloat16().float())


def test_provenance_is_complete(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", GPTNeoX(TINY, SinkConfig("zero_sink")), 5)
    about = load_model(run).provenance()
    assert about["sha256"] == sha256_file(run / "weights/step-0000005.safetensors")
    assert (about["step"], about["mechanism"], about["parameters"]) == (5, "zero_sink", 166464)
    json.dumps(about)


@pytest.mark.parametrize("head", hf.HEADS)
def test_stock_hugging_face_folder_is_vanilla(head: str, tmp_path: Path) -> None:
    net = peaked(GPTNeoX(TINY, seed=1))
    folder = write_hf(net, tmp_path / "pythia")
    save_file(hf.to_hf(net.state_dict(), net.config, head), folder / "model.safetensors")
    loaded = load_model(folder)
    assert same_weights(net, loaded.model)
    assert (loaded.label, loaded.step, loaded.name) == ("vanilla", None, "pythia")


def test_exported_folder_names_its_mechanism(tmp_path: Path) -> None:
    net = GPTNeoX(TINY, SinkConfig("sink_tokens", {"n": 2}))
    about = {"model": to_dict(net.config), "sink": to_dict(net.sink_config), "step": 9, "name": "mine"}
    loaded = load_model(write_hf(net, tmp_path / "hf", **{METADATA_KEY: about}))
    assert loaded.model.prefix_ids == (96, 97)
    assert loaded.model.config == net.config
    assert (loaded.step, loaded.name) == (9, "mine")


def test_old_rotary_settings_are_read(tmp_path: Path) -> None:
    folder = write_hf(GPTNeoX(TINY), tmp_path / "old", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=5000)
    config = load_model(folder).model.config
    assert (config.rotary_pct, config.rope_base) == (0.5, 5000.0)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "mamba"}, "do not fit its config.json .missing keys: backbone"),
        (OURS | {"rope_parameters": {"rope_type": "yarn"}}, "scales its rotary"),
        (OURS | {"tie_word_embeddings": True}, "ties its embeddings"),
        (OURS | {"hidden_act": "gelu_new"}, "another activation"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "depends on the length"),
        ({"num_hidden_layers": 4}, "lack 'gpt_neox.layers.3"),
        ({"num_hidden_layers": 2}, "hold 'gpt_neox.layers.2"),
        ({"vocab_size": 64}, "do not fit their own configuration"),
        ({"num_hidden_layers": "two"}, r"config\.json cannot be understood: setting 'n_layer' must be int"),
        ({"rope_parameters": {"rope_theta": None}}, "setting 'rope_base' must be float, not None"),
        ({METADATA_KEY: {"model": {"tokenizer_size": 96}, "sink": {"mechanism": "zink"}}}, "zink"),
    ],
)
def test_hugging_face_folders_that_would_not_be_exact(changes: dict, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        load_model(write_hf(GPTNeoX(TINY), tmp_path / "hf", **changes))


@pytest.mark.parametrize("key", ["num_hidden_layers", "layer_norm_eps", "max_position_embeddings"])
def test_a_configuration_that_lacks_a_setting(key: str, tmp_path: Path) -> None:
    folder = write_hf(GPTNeoX(TINY), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json lacks '{key}', which a gpt_neox model needs"):
        load_model(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.yaml.*no config\.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="no weights yet"):
        load_model(run_with(tmp_path / "new", GPTNeoX(TINY)))
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot read the weights"):
        load_model(garbage)
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        load_model(garbage.rename(tmp_path / "garbage.ckpt"))
    with pytest.raises(UserError, match="not written by sinkpretrain"):
        load_model(write_hf(GPTNeoX(TINY), tmp_path / "hf") / "model.safetensors")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    file = run_with(tmp_path / "run", GPTNeoX(TINY), 1) / "weights/step-0000001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot read the weights"):
        load_model(file)


def test_a_mechanism_that_is_not_at_hand_is_named_with_its_file(tmp_path: Path) -> None:
    net = GPTNeoX(TINY)
    net.sink_config = SinkConfig("of_somebody_else")
    run = run_with(tmp_path / "run", net, 7)
    file = run / "weights" / "step-0000007.safetensors"
    with pytest.raises(UserError, match=rf"^{file}: unknown sink mechanism 'of_somebody_else'; known: vanilla, "):
        load_model(run)
    folder = write_hf(
        net, tmp_path / "hf", **{METADATA_KEY: {"model": to_dict(net.config), "sink": {"mechanism": "x"}}}
    )
    with pytest.raises(UserError, match=rf"^{folder}: unknown sink mechanism 'x'"):
        load_model(folder)


def test_what_the_hubs_library_fails_with_may_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"cannot get owner/model from the Hugging Face Hub: TimeoutError"):
        load_model("owner/model")
