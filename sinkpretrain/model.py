"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745) as Pythia uses it, with a sink mechanism in every attention layer.

Letters of the axes: B batch, T tokens, C width of the residual stream, H heads, D dimensions of a head, V vocabulary.
How tokens attend to each other is a function given to the forward (``Attend``), so that training, streaming and
measuring run the very same layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sinkpretrain import sinks
from sinkpretrain.attention import causal_attention, rope_tables, rotate, visible_keys, weighed_attention
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.errors import UserError
from sinkpretrain.language import Attend
from sinkpretrain.ops import linear_gelu

KEPT_LENGTHS = 8
"""Lengths whose tables and masks a model keeps; evaluators go through any number of them."""


class Causal:
    """Attention as in training (an ``Attend``): token i attends to the tokens 0 .. i, or to what a mask leaves of them.

    Args:
        tables: cos and sin of every position, fp32 [2, T, R].
        mask: what a query sees, bool broadcastable to [B, H, T, S]; None is plain causal attention.
    """

    def __init__(self, tables: Tensor, mask: Tensor | None) -> None:
        self.tables, self.mask = tables, mask
        self.seen = torch.arange(1, tables.shape[1] + 1, device=tables.device) if mask is None else mask.sum(-1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
        cos, sin = self.tables
        return self.rotated(rotate(q, cos, sin), rotate(k, cos, sin), v, sink)

    def rotated(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, sink: sinks.Mechanism) -> Tensor:
        """The same for queries and keys that stand at their positions already."""
        if sink.weigher is not None:
            return weighed_attention(q_BHTD, k_BHTD, v_BHTD, sink.weigher, self.mask)
        return causal_attention(q_BHTD, k_BHTD, v_BHTD, sink.column(q_BHTD, self.seen), self.mask)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, sink: SinkConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)  # rows: all of q, all of k, all of v
        self.out = nn.Linear(config.d_model, config.d_model)
        self.sink = sinks.build(sink, config)

    def forward(self, x_BTC: Tensor, attend: Attend) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # [B, H, T, D]
            for part in self.qkv(x_BTC).chunk(3, dim=-1)
        )
        o_BHTD = attend(self.layer, q, k, self.sink.values(x_BTC, v), self.sink)
        o_BHTD = self.sink.output(x_BTC, o_BHTD.to(v.dtype))
        mixed: Tensor = self.out(o_BHTD.transpose(1, 2).reshape(B, T, C))
        return mixed


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)
        self.fused = False  # training on a GPU may set it

    def forward(self, x_BTC: Tensor) -> Tensor:
        down: Tensor = self.down(linear_gelu(x_BTC, self.up, self.fused))
        return down


class Block(nn.Module):
    """x + attn(ln1 x) + mlp(ln2 x)."""

    def __init__(self, config: ModelConfig, sink: SinkConfig, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.ln1 = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.ln2 = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.attn = Attention(config, sink, layer)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, attend: Attend) -> Tensor:
        attended: Tensor = x_BTC + self.attn(self.ln1(x_BTC), attend)
        out: Tensor = attended + self.mlp(self.ln2(x_BTC if self.parallel else attended))
        return out


class GPTNeoX(nn.Module):
    """The language model: token ids [B, T] in, logits [B, T, V] out.

    ``prefix_ids`` are the ids that the mechanism wants in front of a sample; the caller puts them there
    (``sinkpretrain.data`` in training, ``sinkpretrain.streaming`` in evaluation). A ``seed`` of None leaves the weights
    as torch makes them, for a caller that fills them in.

    Raises:
        UserError: the configuration's parts do not fit each other.
    """

    def __init__(self, config: ModelConfig, sink: SinkConfig | None = None, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config = config.resolved()
        self.sink_config = sink = sink or SinkConfig()
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, sink, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, config.layer_norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        mechanism = sinks.build(sink, config)
        self.prefix_ids = mechanism.prefix_ids(sinks.Vocabulary(config.tokenizer_size, config.vocab_size))
        self.adds_column = mechanism.adds_column
        self._causal: dict[tuple[int, torch.device], Causal] = {}
        if len(self.prefix_ids) >= config.context:
            raise UserError(
                f"{len(self.prefix_ids)} sink tokens leave no room for text in a context of {config.context} tokens."
            )
        if seed is not None:
            self.init_weights(seed)

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(ids_BT))
        return logits

    def hidden(self, ids_BT: Tensor, attend: Attend | None = None, positions_T: Tensor | None = None) -> Tensor:
        """See ``LanguageModel``; there is no embedding of positions here."""
        if attend is None:
            attend = self.causal(ids_BT.shape[1], ids_BT.device)
        x_BTC = self.embed(ids_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, attend)
        normed: Tensor = self.ln_f(x_BTC)
        return normed

    def causal(self, length: int, device: torch.device) -> Causal:
        """Attention over positions 0 .. length - 1, as in training: causal, within the window if there is one.

        Kept for the last few lengths: compiled code takes its rotary tables as given instead of computing them anew in
        every layer, and recognises the function.
        """
        if (length, device) not in self._causal:
            while len(self._causal) >= KEPT_LENGTHS:
                del self._causal[next(iter(self._causal))]
            with torch.inference_mode(False):  # kept for later, when gradients may be wanted
                positions = torch.arange(length, device=device)
                windowed = 0 < self.config.window < length - 1
                self._causal[length, device] = self._attend(positions, self._visible(positions) if windowed else None)
        return self._causal[length, device]

    def within_documents(self, ids_BT: Tensor, end: int) -> Causal:
        """As ``causal``, but no query sees past the token ``end`` that closes an earlier document.

        The prefix stays visible to every document. Positions go on counting through a sample: among a document's
        tokens rotary positions are relative, so they need no new start.
        """
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        ends_BT = (ids_BT == end).int()
        document_BT = ends_BT.cumsum(1) - ends_BT  # the closing token is its document's last
        own = document_BT[:, :, None] == document_BT[:, None, :]
        mask = self._visible(positions) & (own | (positions < len(self.prefix_ids)))
        return self._attend(positions, mask[:, None])

    def _visible(self, positions_T: Tensor) -> Tensor:
        return visible_keys(positions_T[:, None], positions_T, self.windows[0], self.pinned)

    def _attend(self, positions_T: Tensor, mask: Tensor | None) -> Causal:
        return Causal(torch.stack(self.rope(positions_T)), mask)

    slopes: Tensor | None = None
    learned_positions: int | None = None
    placed: bool = False
    replayable: bool = True

    @property
    def windows(self) -> tuple[int | None, ...]:
        return (self.config.window + 1 if self.config.window else None,) * self.config.n_layer

    @property
    def pinned(self) -> int:
        return self.config.window_sinks

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables(positions_T, self.config.rotary_dim, self.config.rope_base)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-NeoX's initialisation: small_init N(0, sqrt(2 / 5d)) and, for the two output projections of a block,
        wang_init N(0, 2 / (L sqrt(d))); biases 0. (Nguyen and Salazar 2019, arXiv 1910.05895; Wang's
        mesh-transformer-jax.) Drawn on the CPU from ``seed`` alone, so that every mechanism and every device starts
        from the same weights.
        """
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        small = math.sqrt(2 / (5 * config.d_model))
        wang = 2 / (config.n_layer * math.sqrt(config.d_model))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and ".sink." not in name:
                std = wang if name.endswith((".attn.out", ".mlp.down")) else small
                drawn = torch.empty(module.weight.shape).normal_(0.0, std, generator=generator)
                module.weight.copy_(drawn)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        # Sinks draw from a generator of their own, so that every mechanism's other weights are the same.
        generator.manual_seed(seed + 1)
        for module in self.modules():
            if isinstance(module, sinks.Mechanism):
                module.init_weights(generator, small)

    def n_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters; without embeddings leaves out both vocabulary matrices, as Pythia's table does."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - self.embed.weight.numel() - self.head.weight.numel()

    def flops_per_token(self) -> float:
        """Floating-point operations of training on one token: 6 per weight of a matrix product, and the attention
        products over half the context (Kaplan et al. 2020, arXiv 2001.08361, with the causal half counted)."""
        c = self.config
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6.0 * matrices + 6.0 * c.n_layer * c.d_model * c.context


def without_weights(config: ModelConfig, sink: SinkConfig | None = None) -> GPTNeoX:
    """A model that takes no memory, to count its parameters or to fill them in."""
    with torch.device("meta"):
        return GPTNeoX(config, sink, seed=None)
