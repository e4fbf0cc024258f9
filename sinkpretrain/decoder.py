"""One decoder-only transformer for models that others have trained, told apart by a ``Spec``.

It walks the layers itself, over weights in their own dtype, so that how tokens attend can be a function given to the
forward (``sinkpretrain.language``). What a family of models means by its settings is in ``sinkpretrain.families``.

Letters of the axes: B batch, T tokens, C width of the residual stream, H heads, D dimensions of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkpretrain import sinks
from sinkpretrain.attention import angle_tables, distance_bias, grouped_attention, rotate
from sinkpretrain.config import ModelConfig, SinkConfig
from sinkpretrain.language import Attend

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: the angle of each pair of dimensions per position, and a factor on cos and sin (YaRN)."""

    frequencies: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class Alibi:
    """A key at distance d gets the bias -slope * d, after the scaling of the logits (Press et al. 2022)."""

    slopes: tuple[float, ...]


@dataclass(frozen=True)
class Learned:
    """An embedding of ``count`` positions, added to the tokens'."""

    count: int


@dataclass(frozen=True)
class Spec:
    """Everything in which the families differ.

    n_kv_head: heads of keys and values; each serves n_head / n_kv_head neighbouring heads of queries.
    residual: ``sequential`` x + attn(norm1 x), then + mlp(norm2 of that); ``parallel`` x + attn(norm1 x)
        + mlp(norm2 x); ``shared`` the same with norm1 for both.
    gated: the MLP is down(act(gate x) * up x) instead of down(act(up x)).
    qk_norm: an RMS norm over each head of q and k.
    clip_qkv: q, k and v are held within plus and minus this.
    scale: of the logits, where it is not 1 / sqrt(D).
    windows: see ``LanguageModel``.
    tied: the output matrix is the embedding.
    """

    family: str
    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_ff: int
    vocab_size: int
    context: int
    positions: Rotary | Alibi | Learned
    windows: tuple[int | None, ...]
    norm: Literal["layer", "rms"]
    norm_eps: float
    residual: Literal["sequential", "parallel", "shared"]
    activation: str
    tied: bool
    gated: bool = False
    norm_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    clip_qkv: float | None = None
    scale: float | None = None

    @property
    def tokenizer_size(self) -> int:
        return self.vocab_size


class DecoderAttention(nn.Module):
    """Rows of ``qkv``: all heads of q, then of k, then of v."""

    def __init__(self, spec: Spec, layer: int) -> None:
        super().__init__()
        D = spec.head_dim
        self.layer, self.clip, self.D = layer, spec.clip_qkv, D
        self.sizes = (spec.n_head * D, spec.n_kv_head * D, spec.n_kv_head * D)
        # Attention divides by sqrt(D); a family that scales otherwise gets the rest here.
        self.factor = 1.0 if spec.scale is None else spec.scale * D**0.5
        self.qkv = nn.Linear(spec.d_model, sum(self.sizes), bias=spec.qkv_bias)
        self.out = nn.Linear(spec.n_head * D, spec.d_model, bias=spec.out_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, spec.norm_eps) if spec.qk_norm else nn.Identity() for _ in range(2))
        self.sink = sinks.build(SinkConfig(), ModelConfig())

    def forward(self, x_BTC: Tensor, attend: Attend) -> Tensor:
        B, T, _ = x_BTC.shape
        qkv = self.qkv(x_BTC)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = (part.view(B, T, -1, self.D).transpose(1, 2) for part in qkv.split(self.sizes, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.factor != 1.0:
            q = q * self.factor
        o_BHTD = attend(self.layer, q, k, v, self.sink)
        mixed: Tensor = self.out(o_BHTD.to(v.dtype).transpose(1, 2).reshape(B, T, -1))
        return mixed


class DecoderMLP(nn.Module):
    """Rows of ``up``, where gated: those of the gate, then those of the value."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.gated, self.activation = spec.gated, ACTIVATIONS[spec.activation]
        self.up = nn.Linear(spec.d_model, spec.d_ff * (2 if spec.gated else 1), bias=spec.mlp_bias)
        self.down = nn.Linear(spec.d_ff, spec.d_model, bias=spec.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x = self.up(x_BTC)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            x = self.activation(gate) * x
        else:
            x = self.activation(x)
        down: Tensor = self.down(x)
        return down


class DecoderBlock(nn.Module):
    def __init__(self, spec: Spec, layer: int) -> None:
        super().__init__()
        self.residual = spec.residual
        self.norm1 = _norm(spec)
        self.norm2 = nn.Identity() if spec.residual == "shared" else _norm(spec)
        self.attn = DecoderAttention(spec, layer)
        self.mlp = DecoderMLP(spec)

    def forward(self, x_BTC: Tensor, attend: Attend) -> Tensor:
        normed = self.norm1(x_BTC)
        attended: Tensor = x_BTC + self.attn(normed, attend)
        source = {"sequential": attended, "parallel": x_BTC, "shared": normed}[self.residual]
        out: Tensor = attended + self.mlp(self.norm2(source))
        return out


class Decoder(nn.Module):
    """The language model: token ids [B, T] in, logits [B, T, V] out. It has no sink mechanism."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.config = spec
        self.prefix_ids: tuple[int, ...] = ()
        self.sink_config, self.adds_column = SinkConfig(), False
        self.embed = nn.Embedding(spec.vocab_size, spec.d_model)
        self.learned = nn.Embedding(spec.positions.count, spec.d_model) if isinstance(spec.positions, Learned) else None
        self.blocks = nn.ModuleList(DecoderBlock(spec, layer) for layer in range(spec.n_layer))
        self.norm_f = _norm(spec)
        self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        if spec.tied:
            self.head.weight = self.embed.weight
        self._kept: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def forward(self, ids_BT: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(ids_BT))
        return logits

    def hidden(self, ids_BT: Tensor, attend: Attend | None = None, positions_T: Tensor | None = None) -> Tensor:
        """See ``LanguageModel``."""
        T = ids_BT.shape[1]
        x_BTC = self.embed(ids_BT)
        if self.learned is not None:
            x_BTC = x_BTC + self.learned(torch.arange(T, device=ids_BT.device) if positions_T is None else positions_T)
        if attend is None:
            attend = self.causal(T, ids_BT.device)
        for block in self.blocks:
            x_BTC = block(x_BTC, attend)
        normed: Tensor = self.norm_f(x_BTC)
        return normed

    def causal(self, length: int, device: torch.device) -> Attend:
        """Causal attention over positions 0 .. length - 1, within each layer's window."""
        places = torch.arange(length, device=device)
        cos, sin = self.rope(places)
        distance = places[:, None] - places
        biases = {
            window: None
            if self.slopes is None and (window or length) >= length
            else distance_bias(distance, self.slopes, (distance >= 0) & (distance < (window or length)))
            for window in set(self.windows)
        }

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sink: sinks.Mechanism) -> Tensor:
            return grouped_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, biases[self.windows[layer]])

        return attend

    def rope(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LanguageModel``; empty tables where positions are not rotary."""
        rotary = self.config.positions if isinstance(self.config.positions, Rotary) else Rotary(())
        cos, sin = angle_tables(positions_T, self._constants(rotary.frequencies))
        return (cos, sin) if rotary.factor == 1.0 else (cos * rotary.factor, sin * rotary.factor)

    replayable: bool = True

    @property
    def slopes(self) -> Tensor | None:
        positions = self.config.positions
        return self._constants(positions.slopes) if isinstance(positions, Alibi) else None

    def _constants(self, values: tuple[float, ...]) -> Tensor:
        """As fp32 on the model's device: no buffer, which a change of the model's dtype would round."""
        key = (values, self.embed.weight.device)
        if key not in self._kept:
            self._kept[key] = torch.tensor(values, dtype=torch.float32, device=key[1])
        return self._kept[key]

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.config.windows

    @property
    def pinned(self) -> int:
        return 0

    @property
    def learned_positions(self) -> int | None:
        return self.config.positions.count if isinstance(self.config.positions, Learned) else None

    @property
    def placed(self) -> bool:
        return self.learned is not None

    def n_parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters())


def _norm(spec: Spec) -> nn.Module:
    if spec.norm == "rms":
        return nn.RMSNorm(spec.d_model, spec.norm_eps)
    return nn.LayerNorm(spec.d_model, spec.norm_eps, bias=spec.norm_bias)
