"""Attention with an optional extra softmax column, its gradient exact, and the merge that streaming uses.

Letters of the axes: B batch, H heads, T queries, S keys, D dimensions of a head, R rotated dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sinkpretrain import flash4
from sinkpretrain.mechanism import Column, Mechanism, Weigh

aten = torch.ops.aten


# --- rotary positions ---------------------------------------------------------------------------------------------


def rope_tables(positions_T: Tensor, rotary_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [T, R], of the rotary angles at integer positions (Su et al. 2021, arXiv 2104.09864).

    Never stored in the model: a blanket cast of a table to bf16 would put positions near 2,000 wrong by 0.4 rad.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=positions_T.device, dtype=torch.float32) / rotary_dim
    return angle_tables(positions_T, 1.0 / base**exponents)


def angle_tables(positions_T: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [T, R], of positions times angles per position [R / 2].

    Angles are rounded to fp32, as models do it, or to fp64 where the positions are.
    """
    kind = torch.float64 if positions_T.dtype == torch.float64 else torch.float32
    angles = positions_T.to(kind)[:, None] * frequencies.to(kind)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BHTD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head, in fp32, halves paired as GPT-NeoX does."""
    rotary_dim = cos_TR.shape[-1]
    if rotary_dim == 0:
        return x_BHTD
    x = x_BHTD[..., :rotary_dim].to(cos_TR.dtype)
    left, right = x.chunk(2, dim=-1)
    turned = (x * cos_TR + torch.cat((-right, left), dim=-1) * sin_TR).to(x_BHTD.dtype)
    return torch.cat((turned, x_BHTD[..., rotary_dim:]), dim=-1)


# --- training -----------------------------------------------------------------------------------------------------


def causal_attention(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, column: Column | None, visible: Tensor | None = None
) -> Tensor:
    """Softmax attention [B, H, T, D], with the extra column if there is one. Gradients are exact.

    Args:
        visible: which keys a query sees, bool broadcastable to [B, H, T, S]; every query sees one at least. None is
            plain causal attention.
    """
    if column is None:
        if visible is None and flash4.takes(q_BHTD, k_BHTD):
            plain: Tensor = flash4.CausalAttention.apply(q_BHTD, k_BHTD, v_BHTD)  # type: ignore[no-untyped-call]
            return plain
        return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=visible, is_causal=visible is None)
    if q_BHTD.device.type == "cuda" and q_BHTD.dtype not in (torch.bfloat16, torch.float16):
        return _eager_column(q_BHTD, k_BHTD, v_BHTD, column, visible)
    bias = None if visible is None else _bias(visible, q_BHTD, k_BHTD)
    out: Tensor = ColumnAttention.apply(q_BHTD, k_BHTD, v_BHTD, column.logit, column.value, bias)  # type: ignore[no-untyped-call]
    return out


def _bias(visible: Tensor, q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor:
    """``visible`` as 0 and -inf, [B, H, T, S], in the layout that the kernels of the device take."""
    bias = torch.zeros(visible.shape, dtype=q_BHTD.dtype, device=visible.device).masked_fill(~visible, float("-inf"))
    S = k_BHSD.shape[2]
    if q_BHTD.device.type == "cuda":
        # The kernel loads the bias in aligned rows: give it a padded buffer and a view of the true width.
        bias = F.pad(bias, (0, -S % 16))[..., :S]
    return bias.expand(*q_BHTD.shape[:3], S)


WEIGHED_ROWS = 256
"""Queries whose weights exist at a time in ``weighed_attention``."""


def weighed_attention(
    q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, weigh: Weigh, visible: Tensor | None = None
) -> Tensor:
    """Causal attention [B, H, T, D] under a normalisation of the mechanism's own, which no flash kernel takes.

    Queries are those of the last T of the S keys. Weights are made for a few hundred queries at a time, in fp32
    whatever autocast says, and made again in the backward pass: memory grows with the length, not with its square, and
    gradients are autograd's. On two CPU cores (12 heads of 64, 2,048 tokens, forward and backward) that costs 6 times
    the flash kernel's softmax for clipped_softmax, 11 times for sigmoid_attention and 16 times for softpick.

    Args:
        visible: as in ``causal_attention``.
    """
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    parts = []
    for start in range(0, T, WEIGHED_ROWS):
        stop = min(T, start + WEIGHED_ROWS)
        # Causality: no query of this part sees a key behind the part.
        end = S - T + stop
        if visible is None:
            seen = torch.ones(stop, end, dtype=torch.bool, device=q_BHTD.device).tril(S - T)[start:]
        else:
            seen = visible[..., start:stop, :end]
        rows = (q_BHTD[:, :, start:stop], k_BHSD[:, :, :end], v_BHSD[:, :, :end], weigh, seen)
        parts.append(checkpoint(_weighed, *rows, use_reentrant=False) if torch.is_grad_enabled() else _weighed(*rows))
    return torch.cat(parts, dim=2).to(v_BHSD.dtype)


def _weighed(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, weigh: Weigh, visible: Tensor) -> Tensor:
    with torch.autocast(q_BHTD.device.type, enabled=False):
        weights = weigh(scaled_logits(q_BHTD, k_BHSD), visible)
        return weights @ v_BHSD.to(weights.dtype)


def scaled_logits(q_BHTD: Tensor, k_BHSD: Tensor) -> Tensor:
    """q k^T / sqrt(d), at least fp32."""
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    k_BHSD = spread_heads(k_BHSD, q_BHTD.shape[1])
    logits: Tensor = (q_BHTD.to(wide) @ k_BHSD.to(wide).mT) * q_BHTD.shape[-1] ** -0.5
    return logits


class ColumnAttention(torch.autograd.Function):
    """Causal attention with one extra column, through the stock flash kernels.

    Flash kernels give no gradient for the logsumexp, so out * sigmoid(lse - s) would train with wrong dq and dk. But
    the flash backward only needs the logsumexp of the softmax that was taken and rowsum(dO * out); given the ones of
    the softmax *with* the column, it returns the exact gradients of q, k and v. With p_i = exp(s_i - lse'_i):

        lse' = logaddexp(lse, s)      out' = exp(lse - lse') out + p v'
        ds_i = p_i (dO_i . v' - dO_i . out'_i)        dv' = sum_i p_i dO_i
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, s: Tensor, value: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        out, lse, extra = _flash_forward(q, k, v, bias)
        lse_all = torch.logaddexp(lse, s.to(lse.dtype))
        merged = out * torch.exp(lse - lse_all).unsqueeze(-1)
        if value is not None:
            p = torch.exp(s.to(lse.dtype) - lse_all)
            merged = merged + p.unsqueeze(-1) * value.unsqueeze(-2)
        merged = merged.to(q.dtype)
        ctx.save_for_backward(q, k, v, s, value, bias, merged, lse_all, *extra)
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        q, k, v, s, value, bias, merged, lse_all, *extra = ctx.saved_tensors
        dq, dk, dv = _flash_backward(d_out, (q, k, v, bias), merged, lse_all, extra)
        d_s = d_value = None
        if ctx.needs_input_grad[3] or (value is not None and ctx.needs_input_grad[4]):
            d_wide = d_out.to(lse_all.dtype)
            p = torch.exp(s.to(lse_all.dtype) - lse_all)
            inner = -(d_wide * merged).sum(-1)
            if value is not None:
                inner = inner + (d_wide * value.unsqueeze(-2)).sum(-1)
                d_value = (p.unsqueeze(-1) * d_wide).sum((0, 2)).to(value.dtype)
            d_s = (p * inner).sum_to_size(s.shape).to(s.dtype)
        return dq, dk, dv, d_s, d_value, None


@flash4.constant
def _prefers_cudnn(device: torch.device) -> bool:
    """cuDNN's kernels are the fast ones on Hopper and Blackwell, as torch's own dispatch has it."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Attention that is causal or under a bias: output, logsumexp [B, H, T], and what the same device's backward wants
    besides."""
    if bias is None and flash4.takes(q, k):
        return *flash4.flash4_forward(q, k, v), ()
    if q.device.type != "cuda":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, bias is None, attn_mask=bias)
        return out, lse, ()
    if bias is not None:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)
        return out, lse[..., : q.shape[2]], (seed, offset)  # the kernel rounds T up to a multiple of 32
    if _prefers_cudnn(q.device):
        out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False
        )
        return out, lse.view(lse.shape[:3]), (seed, offset)
    out, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    return out, lse, (seed, offset)


def _flash_backward(
    d_out: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    out: Tensor,
    lse: Tensor,
    extra: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, bias = inputs
    T, S = q.shape[2], k.shape[2]
    if bias is None and flash4.takes(q, k):
        grads = flash4.flash4_backward(d_out, q, k, v, out, lse)
    elif q.device.type != "cuda":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out.contiguous(), q, k, v, out, lse, 0.0, bias is None, attn_mask=bias
        )
    elif bias is not None:
        lse = F.pad(lse, (0, -T % 32))
        wanted = [True, True, True, False]
        grads = aten._scaled_dot_product_efficient_attention_backward(
            d_out.contiguous(), q, k, v, bias, out, lse, *extra, 0.0, wanted
        )
    elif _prefers_cudnn(q.device):
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            d_out, q, k, v, out, lse.unsqueeze(-1), *extra, None, None, None, T, S, 0.0, True
        )
    else:
        grads = aten._scaled_dot_product_flash_attention_backward(
            d_out.contiguous(), q, k, v, out, lse, None, None, T, S, 0.0, True, *extra
        )
    return grads[0], grads[1], grads[2]


def _eager_column(q: Tensor, k: Tensor, v: Tensor, column: Column, visible: Tensor | None = None) -> Tensor:
    """The definition, differentiated by autograd, for what no flash kernel takes (fp32 and fp64 on a GPU)."""
    if visible is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    logits = ((q @ k.mT) * q.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    return merge_column(torch.softmax(logits, dim=-1) @ v, lse, column)


# --- inference ----------------------------------------------------------------------------------------------------


def spread_heads(x_BHSD: Tensor, heads: int) -> Tensor:
    """Keys or values with fewer heads than queries, repeated so that each serves its neighbouring heads of queries."""
    return x_BHSD if x_BHSD.shape[1] == heads else x_BHSD.repeat_interleave(heads // x_BHSD.shape[1], dim=1)


def distance_bias(distance_TS: Tensor, slopes_H: Tensor | None, visible_TS: Tensor) -> Tensor:
    """What is added to the logits, fp32 [T, S], or [H, T, S] under ALiBi: -slope * distance, -inf where not visible."""
    bias = torch.zeros(visible_TS.shape, device=visible_TS.device)
    if slopes_H is not None:
        bias = -slopes_H[:, None, None] * distance_TS
    return bias.masked_fill(~visible_TS, float("-inf"))


def visible_keys(query: Tensor, key: Tensor, reach: int | None = None, pinned: int = 0) -> Tensor:
    """Which keys a query attends to by their places, bool; queries and keys are broadcast against each other.

    Those up to its own; with a ``reach`` only that many, its own included, and the first ``pinned`` places.
    """
    distance = query - key
    seen = distance >= 0
    return seen if reach is None else seen & ((distance < reach) | (key < pinned))


def grouped_attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of a forward without a sink: causal, or under ``distance_bias``; keys may have fewer heads."""
    k, v = (spread_heads(x, q_BHTD.shape[1]) for x in (k_BHSD, v_BHSD))
    if bias is None:
        return F.scaled_dot_product_attention(q_BHTD, k, v, is_causal=True)
    return masked_attention(q_BHTD, k, v, bias)[0]


def masked_attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bias_TS: Tensor) -> tuple[Tensor, Tensor]:
    """Attention under an additive bias [T, S], [H, T, S] or [B, H or 1, T, S]: output [B, H, T, D], fp32 logsumexp.

    No gradient. A bias of each head holds distances, which 16 bits would round: such a product is taken in fp32.
    """
    by_head = bias_TS.dim() > 2 and bias_TS.shape[-3] > 1
    if by_head and q_BHTD.dtype in (torch.bfloat16, torch.float16):
        out, lse = masked_attention(q_BHTD.float(), k_BHSD.float(), v_BHSD.float(), bias_TS)
        return out.to(q_BHTD.dtype), lse
    k_BHSD, v_BHSD = (spread_heads(x, q_BHTD.shape[1]) for x in (k_BHSD, v_BHSD))
    bias = bias_TS.to(q_BHTD.dtype)
    blind_T1 = (bias == float("-inf")).all(-1, keepdim=True)
    if q_BHTD.device.type == "cuda":
        B, H, T, _ = q_BHTD.shape
        S = k_BHSD.shape[2]
        padded = F.pad(bias, (0, -S % 16))[..., :S].expand(B, H, T, S)  # aligned rows, as in _bias
        out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q_BHTD, k_BHSD, v_BHSD, padded, True)
        lse = lse[..., :T].float()
    else:
        mask = bias[None] if bias.dim() == 3 else bias
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask)
    # Kernels differ in what they return for a query that sees nothing; an empty sum is 0 and its logarithm -inf.
    return out.masked_fill(blind_T1, 0.0), lse.masked_fill(blind_T1.squeeze(-1), float("-inf"))


def merge_keys(out_BHTD: Tensor, lse_BHT: Tensor, logits_BHTS: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    """Add a few keys (scaled fp32 logits, values) to a softmax that was taken without them."""
    more = torch.logsumexp(logits_BHTS, dim=-1)
    lse_all = torch.logaddexp(lse_BHT, more)
    weights = torch.exp(logits_BHTS - lse_all.unsqueeze(-1))
    kept = out_BHTD.to(lse_all.dtype) * torch.exp(lse_BHT - lse_all).unsqueeze(-1)
    return kept + weights @ spread_heads(v_BHSD, out_BHTD.shape[1]).to(lse_all.dtype), lse_all


def merge_column(out_BHTD: Tensor, lse_BHT: Tensor, column: Column | None) -> Tensor:
    """Apply a mechanism's column to an output and its logsumexp (the formula at the head of ``sinkpretrain.sinks``)."""
    if column is None:
        return out_BHTD
    g = torch.sigmoid(lse_BHT - column.logit.to(lse_BHT.dtype)).unsqueeze(-1)
    out = g * out_BHTD
    return out if column.value is None else out + (1 - g) * column.value.unsqueeze(-2)


def weighed_keys(logits_BHTS: list[Tensor], visible_TS: list[Tensor], v_BHSD: list[Tensor], weigh: Weigh) -> Tensor:
    """The output of keys in groups (scaled fp32 logits, what is visible, values) under a mechanism's ``weigh``, which
    sees them as one row."""
    weights = weigh(torch.cat(logits_BHTS, dim=-1), torch.cat(visible_TS, dim=-1))
    values = spread_heads(torch.cat(v_BHSD, dim=2), weights.shape[1])
    return weights @ values.to(weights.dtype)


def weighted_values(weights_BHTS: Tensor, mass_BHT: Tensor, v_BHSD: Tensor, column: Column | None) -> Tensor:
    """The output, at least fp32 [B, H, T, D], of what ``attention_weights`` returned."""
    out = weights_BHTS @ spread_heads(v_BHSD, weights_BHTS.shape[1]).to(weights_BHTS.dtype)
    if column is None or column.value is None:
        return out
    return out + mass_BHT.unsqueeze(-1) * column.value.unsqueeze(-2)


def attention_weights(
    q_BHTD: Tensor, k_BHSD: Tensor, column: Column | None, visible: Tensor, weigh: Weigh | None = None
) -> tuple[Tensor, Tensor]:
    """The attention itself, at least fp32 [B, H, T, S], and the mass on the column [B, H, T].

    ``visible`` says what a query sees, bool broadcastable to [B, H, T, S], or is what is added to its logits
    (``distance_bias``). Of a softmax, the sum over S is 1; under a mechanism's own ``weigh`` it is what it is, and the
    column has none. Quadratic in memory: for measures and as the plain reference of the fast paths.
    """
    logits = scaled_logits(q_BHTD, k_BHSD)
    if weigh is not None:
        weights = weigh(logits, visible if visible.dtype == torch.bool else visible > float("-inf"))
        return weights, torch.zeros_like(weights[..., 0])
    logits = logits.masked_fill(~visible, float("-inf")) if visible.dtype == torch.bool else logits + visible
    lse = torch.logsumexp(logits, dim=-1)
    if column is None:
        return torch.exp(logits - lse.unsqueeze(-1)), torch.zeros_like(lse)
    lse_all = torch.logaddexp(lse, column.logit.float())
    return torch.exp(logits - lse_all.unsqueeze(-1)), torch.exp(column.logit.float() - lse_all)


def sink_weights(q_BHTD: Tensor, k_BHSD: Tensor, sink: Mechanism, visible: Tensor) -> tuple[Tensor, Tensor]:
    """``attention_weights`` as a mechanism has them, column and normalisation."""
    return attention_weights(q_BHTD, k_BHSD, sink.column(q_BHTD, visible.sum(-1)), visible, sink.weigher)


def sink_attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, sink: Mechanism, visible: Tensor) -> Tensor:
    """Attention as a mechanism has it under any mask (as in ``causal_attention``), with exact gradients."""
    if sink.weigher is not None:
        return weighed_attention(q_BHTD, k_BHSD, v_BHSD, sink.weigher, visible)
    return causal_attention(q_BHTD, k_BHSD, v_BHSD, sink.column(q_BHTD, visible.sum(-1)), visible)
