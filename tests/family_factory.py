"""Tiny random models of every family, made and saved by transformers, with attention far from uniform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sinkpretrain.bench_stream import evict
from sinkpretrain.cache import Cache

COMMON = {"vocab_size": 96, "tie_word_embeddings": False}
LLAMA = COMMON | {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FALCON = COMMON | {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
MPT = COMMON | {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-mha-bias": ("llama", LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "llama-3": ("llama", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16}),
    "llama-linear": ("llama", LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-yarn": ("llama", LLAMA | {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 9}),
    "mistral-full": ("mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-windows": ("qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16}),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-11b": ("falcon", FALCON | {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-rw": ("falcon", FALCON | {
        "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "tie_word_embeddings": True}),
    "mpt": ("mpt", MPT),
    "mpt-clip-heads": ("mpt", MPT | {
        "d_model": 48, "n_heads": 6, "attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3}}),
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "bos_token_id": 0, "eos_token_id": 0}),
}  # fmt: skip


def build(name: str, **changes: Any) -> torch.nn.Module:
    """A model of transformers in fp32, its q, k and v scaled up so that attention is peaked, vectors given values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = MODELS[name]
    config = AutoConfig.for_model(kind, **{**options, **changes})
    torch.manual_seed(sum(map(ord, name)))
    return sharpened(AutoModelForCausalLM.from_config(config).float().eval())


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose attention is peaked and whose vectors have values, in place."""
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn(p.shape)
            elif any(part in key for part in ("q_proj", "k_proj", "query_key_value", "Wqkv", "c_attn")):
                p *= 15
            elif "embed" not in key:
                p *= 8
    return model


def save(model: torch.nn.Module, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)  # type: ignore[operator]
    return folder


@torch.no_grad()
def evicting_loop(
    model: torch.nn.Module, ids: np.ndarray, cache: Cache, place: Callable[[int, int], int] | None
) -> np.ndarray:
    """Losses of transformers' own forward, a token at a time over a cache that evicts; ``place(t, size)`` is the
    position it is told."""
    from transformers import DynamicCache

    past, nll = DynamicCache(config=model.config), []
    for t, token in enumerate(ids[:-1]):
        where = {} if place is None else {"position_ids": torch.tensor([[place(t, cache.size)]])}
        logits = model(
            input_ids=torch.tensor([[int(token)]]), past_key_values=past, use_cache=True, **where
        ).logits[0]  # fmt: skip
        nll.append(F.cross_entropy(logits, torch.tensor([int(ids[t + 1])])).item())
        evict(past, cache)
    return np.array(nll, dtype=np.float32)
