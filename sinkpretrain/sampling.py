"""From logits to the next token: the usual ways of drawing it, as operations on the device without a word to the host.

Options apply in the order that Hugging Face's ``generate`` has them: repetition penalty, temperature, top-k, top-p,
min-p. Letters of the axes: V vocabulary, N tokens in the cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkpretrain.errors import UserError

NOT_FINITE = -1
"""What is drawn from logits that hold a NaN or an infinity."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draw among the k likeliest; 0 is no limit.
    top_p: draw among the fewest likeliest whose probabilities reach p together (Holtzman et al. 2020,
        arXiv 1904.09751).
    min_p: draw among those at least min_p times as probable as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
    repetition_penalty: divides positive and multiplies negative logits of the tokens in the cache (Keskar et al. 2019,
        arXiv 1909.05858); 1 is none.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed, wanted in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (no limit) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (no limit)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (no limit) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and 1 for none"),
        ):
            if not allowed:
                raise UserError(f"--{name.replace('_', '-')} must be {wanted}, not {getattr(self, name)}.")


class Sampler:
    """Draws tokens, never one that is forbidden (sink tokens, spare rows of the vocabulary).

    Args:
        forbidden_V: bool [V], on the device of the logits.
        generator: of the same device.
    """

    def __init__(self, sampling: Sampling, forbidden_V: Tensor, generator: torch.Generator) -> None:
        self.sampling, self.generator = sampling, generator
        self._bias_V = torch.zeros(forbidden_V.shape, device=forbidden_V.device)
        self._bias_V.masked_fill_(forbidden_V, float("-inf"))

    @property
    def reads_cached(self) -> bool:
        """Whether a draw depends on the ids in the cache."""
        return self.sampling.repetition_penalty != 1.0

    @torch.inference_mode()
    def __call__(self, logits_V: Tensor, cached_N: Tensor) -> Tensor:
        """The next token, int64 [1], or ``NOT_FINITE``.

        Args:
            logits_V: fp32.
            cached_N: ids in the cache, -1 where there is none; only the repetition penalty reads them.
        """
        s = self.sampling
        if self.reads_cached:
            logits_V = penalised(logits_V, cached_N, s.repetition_penalty)
        logits_V = logits_V + self._bias_V
        highest, likeliest = logits_V.max(dim=-1, keepdim=True)
        if s.temperature == 0.0:
            chosen = likeliest
        else:
            p_V = filtered((logits_V - highest) / s.temperature, s).softmax(-1)
            # The first of V exponential clocks with rates p to ring: a draw from p without a cumulative sum.
            clocks_V = torch.empty_like(p_V).exponential_(generator=self.generator)
            chosen = (p_V / clocks_V).argmax(dim=-1, keepdim=True)
        # A NaN anywhere is the maximum; -inf, or minus it, is no logit of a model either.
        return torch.where(torch.isfinite(highest), chosen, NOT_FINITE)


def penalised(logits_V: Tensor, cached_N: Tensor, penalty: float) -> Tensor:
    """Logits with those of the cached tokens made smaller."""
    V = len(logits_V)
    cached_V = torch.zeros(V + 1, dtype=torch.bool, device=logits_V.device)
    cached_V = cached_V.index_fill(0, cached_N % (V + 1), True)[:V]  # -1 falls into the place behind the last
    return torch.where(cached_V, torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def filtered(logits_V: Tensor, s: Sampling) -> Tensor:
    """Logits with those that top-k, top-p and min-p leave out at -inf."""
    if 0 < s.top_k < len(logits_V):
        least = torch.topk(logits_V, s.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, float("-inf"))
    if s.top_p < 1.0:
        p_V, order_V = logits_V.softmax(-1).sort(descending=True)
        before_V = p_V.cumsum(-1) - p_V  # the likeliest is always kept
        logits_V = logits_V.masked_fill(
            torch.empty_like(before_V, dtype=torch.bool).scatter_(0, order_V, before_V >= s.top_p), float("-inf")
        )
    if s.min_p > 0.0:
        p_V = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(p_V < s.min_p * p_V.max(), float("-inf"))
    return logits_V
