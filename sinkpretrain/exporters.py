"""What an exported folder computes with: transformers' own GPT-NeoX class, the same with a seeded slot, or our class.

Each form writes weights and ``config.json``, and says what the folder, loaded back, computes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sinkpretrain import hf, outside, sinks
from sinkpretrain.config import ModelConfig, SinkConfig, to_dict
from sinkpretrain.errors import UserError
from sinkpretrain.export_tokenizer import Special
from sinkpretrain.files import write_json
from sinkpretrain.load import METADATA_KEY, SLOT_FILE, LoadedModel
from sinkpretrain.model import GPTNeoX

Form = Literal["stock", "seeded", "own"]
Logits = Callable[[Tensor], Tensor]
"""ids [B, T] -> logits [B, T, V], as a user of transformers gets them."""

FORMS: dict[Form, str] = {
    "stock": "stock GPT-NeoX",
    "seeded": "stock GPT-NeoX with a seeded slot",
    "own": "own class (sinkpretrain.hf_model)",
}
REMOTE = "modeling_sinkpretrain"
"""Module in the folder through which ``trust_remote_code`` finds the installed class."""


def natural_form(sink: SinkConfig, model: ModelConfig) -> Form:
    """The form nearest to stock transformers that computes exactly what a model does."""
    mechanism = sinks.build(sink, model)
    own = any(mechanism.uses(hook) for hook in ("values", "weigh", "output"))
    if own or model.window or (mechanism.adds_column and mechanism.slot() is None):
        return "own"
    # A folder with a slot holds its keys and values and no other state, from which the mechanism must come back.
    if not mechanism.state_dict().keys() <= ({"key", "value"} if mechanism.adds_column else set()):
        return "own"
    return "seeded" if mechanism.adds_column else "stock"


def choose_form(wanted: Literal["auto", "stock", "own"], model: GPTNeoX) -> Form:
    """The form for what the user asks for; raises UserError if it could not be exact."""
    natural = natural_form(model.sink_config, model.config)
    if wanted == "stock" and natural == "own":
        what = f"a window of {model.config.window} tokens" if model.config.window else model.sink_config.mechanism
        able = [name for name in sinks.REGISTRY if natural_form(SinkConfig(name), model.config) != "own"]
        raise UserError(
            f"the stock GPTNeoXForCausalLM cannot compute {what}; leave out --architecture for a class of our own"
            + (f" (stock: {', '.join(able)})." if able else ".")
        )
    return "own" if wanted == "own" else natural


def write_model(folder: Path, loaded: LoadedModel, form: Form, dtype: torch.dtype, special: Special) -> None:
    """``model.safetensors``, ``config.json`` and ``generation_config.json``, and what the form needs besides."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    model = loaded.trained
    state, config = _own(model, special) if form == "own" else _stock(model, special)
    state = {k: v.to(dtype).contiguous() for k, v in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    about = {
        "model": to_dict(model.config),
        "sink": to_dict(model.sink_config),
        outside.HASHES: outside.hashes(model.sink_config),
        "step": loaded.step,
        "name": loaded.name,
        "seeds": loaded.seeds,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "end_of_document": special.end_id,
        "form": form,
    }
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch."), METADATA_KEY: about})
    if form == "seeded":
        save_file(_slots(model), folder / SLOT_FILE)
        # By itself: whoever has the folder needs nothing of this package.
        shutil.copyfile(Path(__file__).with_name("seeded_slot.py"), folder / "seeded_slot.py")
    if form == "own":
        names = ", ".join(place.partition(".")[2] for place in config["auto_map"].values())
        code = f"from sinkpretrain.hf_model import {names}  # noqa: F401\n"
        (folder / f"{REMOTE}.py").write_text(code, encoding="utf-8")
    # safetensors makes files that only their owner can read.
    for file in folder.iterdir():
        shutil.copymode(folder / "config.json", file)
    # No text holds an id of the spare rows, sinks included, so none must be generated.
    spare = list(range(model.config.tokenizer_size, model.config.vocab_size)) or None
    GenerationConfig(
        bos_token_id=special.end_id,
        eos_token_id=special.end_id,
        pad_token_id=special.padding_id,
        suppress_tokens=spare,
    ).save_pretrained(folder)


def _stock(model: GPTNeoX, special: Special) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from transformers import GPTNeoXConfig

    state = hf.to_hf({k: v for k, v in model.state_dict().items() if ".sink." not in k}, model.config)
    config = GPTNeoXConfig(**hf.hf_config(model.config, special.end_id), pad_token_id=special.padding_id)
    return state, config.to_diff_dict() | {
        "architectures": ["GPTNeoXForCausalLM"],
        # transformers 4 does not know rope_parameters and would silently take its defaults.
        "rotary_pct": model.config.rotary_pct,
        "rotary_emb_base": model.config.rope_base,
    }


def _own(model: GPTNeoX, special: Special) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from sinkpretrain.hf_model import SinkPretrainConfig, SinkPretrainForCausalLM

    config = SinkPretrainConfig(
        model=to_dict(model.config),
        sink=to_dict(model.sink_config),
        bos_token_id=special.end_id,
        eos_token_id=special.end_id,
        pad_token_id=special.padding_id,
    )
    prefix = SinkPretrainForCausalLM.base_model_prefix
    return {f"{prefix}.{k}": v for k, v in model.state_dict().items()}, config.to_dict() | {
        "architectures": [SinkPretrainForCausalLM.__name__],
        "auto_map": {
            "AutoConfig": f"{REMOTE}.{SinkPretrainConfig.__name__}",
            "AutoModelForCausalLM": f"{REMOTE}.{SinkPretrainForCausalLM.__name__}",
        },
    }


def _slots(model: GPTNeoX) -> dict[str, Tensor]:
    slots = [m.slot() for m in model.blocks.modules() if isinstance(m, sinks.Mechanism)]
    return {
        name: torch.stack([s[i] for s in slots if s]).detach().contiguous() for i, name in enumerate(("key", "value"))
    }


def load_back(folder: Path, form: Form) -> Logits:
    """The folder as transformers loads it, in fp32."""
    from transformers import AutoModelForCausalLM

    if form == "own":
        import sinkpretrain.hf_model  # noqa: F401 - registers the class

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    if form == "seeded":
        from sinkpretrain.seeded_slot import forward_inputs

        return lambda ids: model(**forward_inputs(model, ids, folder=folder)).logits
    return lambda ids: model(input_ids=ids).logits
