"""Run directories with a real tokenizer, made in a moment: models that nobody trained, with peaked attention."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import peaked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.load import describe, write_weights
from sinkpretrain.model import GPTNeoX

SIZE = 300
CONFIG = ModelConfig(n_layer=2, d_model=32, n_head=2, vocab_size=384, tokenizer_size=SIZE, context=64)


def make_tokenizer(file: Path) -> Path:
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
    tokenizer.save(str(file))
    return file


def save_weights(model: GPTNeoX, path: Path, step: int, name: str = "", dtype: torch.dtype | None = None) -> None:
    """A model as one safetensors file, as training writes it."""
    state = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
    write_weights(state, describe(model, step, name), path)


def make_run(
    folder: Path, sink: SinkConfig, tokenizer: Path | None, config: ModelConfig = CONFIG, seed: int = 4
) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: small\n")
    save_weights(peaked(GPTNeoX(config, sink, seed=seed)), folder / "weights/step-0000012.safetensors", 12, "small")
    if tokenizer:
        (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder
