"""Other implementations of the same model, to be trained beside ours in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkpretrain import hf
from sinkpretrain.config import RunConfig
from sinkpretrain.errors import UserError

Loss = Callable[[Tensor, Tensor], Tensor]
Peer = Callable[[RunConfig], tuple[nn.Module, Loss]]


def _transformers(config: RunConfig, compiled: bool) -> tuple[nn.Module, Loss]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    net = GPTNeoXForCausalLM(GPTNeoXConfig(**hf.hf_config(config.model), attn_implementation="sdpa"))

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(ids, use_cache=False).logits.float().flatten(0, 1), labels.flatten())

    return net, torch.compile(loss) if compiled else loss


def _litgpt(config: RunConfig) -> tuple[nn.Module, Loss]:
    """litgpt's own model; its loss, like its pretraining script's, is taken on bf16 logits."""
    try:
        from litgpt import GPT, Config  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"the peer litgpt cannot be imported ({error}); `pip install --no-deps litgpt psutil` adds it, since its "
            "pins exclude our versions."
        ) from error
    m = config.model
    settings = Config.from_name(
        "pythia-160m",
        n_layer=m.n_layer,
        n_head=m.n_head,
        n_embd=m.d_model,
        intermediate_size=m.d_ff,
        block_size=m.context,
        padded_vocab_size=m.vocab_size,
    )
    net = GPT(settings)

    def loss(ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(ids).flatten(0, 1), labels.flatten())

    return net, torch.compile(loss)


PEERS: dict[str, Peer] = {
    "hf": lambda config: _transformers(config, compiled=False),
    "hf-compiled": lambda config: _transformers(config, compiled=True),
    "litgpt-compiled": _litgpt,
}
