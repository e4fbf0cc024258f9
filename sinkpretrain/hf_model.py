"""The models of this project as a class of transformers, for what the stock GPT-NeoX class cannot compute.

Importing this module registers it, so that ``AutoModelForCausalLM.from_pretrained`` takes an exported folder. Without
the import, ``trust_remote_code=True`` does the same. Only public parts of transformers are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from sinkpretrain import outside, sinks
from sinkpretrain.attention import rotate, sink_attention, visible_keys
from sinkpretrain.config import ModelConfig, SinkConfig, from_dict, to_dict
from sinkpretrain.language import Attend
from sinkpretrain.load import METADATA_KEY
from sinkpretrain.model import GPTNeoX


class SinkPretrainConfig(PreTrainedConfig):  # type: ignore[misc]
    """A model's shape and sink mechanism, as plain data, and their names in transformers' own terms."""

    model_type = "sinkpretrain"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, model: dict[str, Any] | None = None, sink: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shape = from_dict(ModelConfig, model or {"tokenizer_size": 50277}).resolved()
        self.model, self.sink = to_dict(shape), to_dict(from_dict(SinkConfig, sink or {}))
        self.use_cache = kwargs.pop("use_cache", True)
        derived = {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.d_model,
            "num_hidden_layers": shape.n_layer,
            "num_attention_heads": shape.n_head,
            "max_position_embeddings": shape.context,
            "tie_word_embeddings": False,
        }
        super().__init__(**{**kwargs, **derived})


class SinkPretrainForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """``GPTNeoX`` with a sink mechanism behind transformers' interface.

    Rows may be padded on either side: positions count what ``attention_mask`` keeps. The cache holds rotated keys.
    """

    config_class = SinkPretrainConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: SinkPretrainConfig) -> None:
        super().__init__(config)
        sink = from_dict(SinkConfig, config.sink)
        outside.warn_if_edited(sink, getattr(config, METADATA_KEY, None) or {}, Path(config.name_or_path))
        self.model = GPTNeoX(from_dict(ModelConfig, config.model), sink, seed=None)
        if self.model.embed.weight.device.type != "meta":
            self.model.init_weights(seed=0)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The model has drawn its own."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V]; also takes ``position_ids`` and ``use_cache``, as transformers' models do.

        Args:
            attention_mask: [B, S], 0 on padding, over what the cache holds and ``input_ids``.
            labels: [B, T], -100 where there is no loss; shifted here.
        """
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), past + input_ids.shape[1], device=input_ids.device)
        positions_BS = (attention_mask.cumsum(-1) - 1).clamp(min=0).long()
        attend = self._attend(positions_BS, attention_mask.bool(), past_key_values, kwargs.get("position_ids"))
        logits = self.model.head(self.model.hidden(input_ids, attend))
        loss = None
        if labels is not None:
            counted = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **counted)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _attend(self, positions_BS: Tensor, kept_BS: Tensor, cache: Cache | None, query_BT: Tensor | None) -> Attend:
        """The attention of new queries over the cache and themselves; ``query_BT``: their positions, if given."""
        past = cache.get_seq_length() if cache is not None else 0
        S = positions_BS.shape[1]
        T = S - past
        if query_BT is None:
            query_BT = positions_BS[:, past:]
        cos, sin = self.model.rope(query_BT.flatten())
        cos, sin = (table.view(*query_BT.shape, -1)[:, None] for table in (cos, sin))
        key_BTS = positions_BS[:, None, :].expand(-1, T, -1)
        visible = visible_keys(positions_BS[:, past:, None], key_BTS, self.model.windows[0], self.model.pinned)
        # In what order keys stand decides, not their positions: padding has none. It sees itself, for a softmax must
        # see something.
        order = torch.arange(S, device=positions_BS.device)
        before, own = order <= order[past:, None], order == order[past:, None]
        mask = ((visible & before & kept_BS[:, None, :]) | own)[:, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if cache is not None:
                k, v = cache.update(k, v, layer)
            return sink_attention(q, k, v, sink, mask)

        return attend


AutoConfig.register(SinkPretrainConfig.model_type, SinkPretrainConfig, exist_ok=True)
AutoModelForCausalLM.register(SinkPretrainConfig, SinkPretrainForCausalLM, exist_ok=True)
