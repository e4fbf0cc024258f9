"""Drawing tokens: which ones are left, against transformers' own filters, and how often each comes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sinkpretrain.errors import UserError
from sinkpretrain.sampling import NOT_FINITE, Sampler, Sampling, filtered, penalised

V = 300
NO_IDS = torch.full((5,), -1)


@pytest.fixture
def logits() -> Tensor:
    return 3 * torch.randn(V, generator=torch.Generator().manual_seed(0))


def sampler(sampling: Sampling, forbidden: tuple[int, ...] = (), seed: int = 0) -> Sampler:
    mask = torch.zeros(V, dtype=torch.bool)
    mask[list(forbidden)] = True
    return Sampler(sampling, mask, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [0, 1, 20, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_the_same_tokens_are_left_as_in_transformers(logits: Tensor, top_k: int, top_p: float, min_p: float) -> None:
    from transformers.generation import logits_process as hf

    want = logits[None]
    if top_k:
        want = hf.TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = hf.TopPLogitsWarper(top_p)(None, want)
    if min_p:
        want = hf.MinPLogitsWarper(min_p)(None, want)
    assert torch.equal(filtered(logits, Sampling(top_k=top_k, top_p=top_p, min_p=min_p)), want[0])


def test_repetition_penalty_is_that_of_transformers(logits: Tensor) -> None:
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    ids = torch.tensor([3, 7, 7, 0, 299])
    want = RepetitionPenaltyLogitsProcessor(1.3)(ids[None], logits[None])[0]
    assert torch.equal(penalised(logits, torch.cat((ids, NO_IDS)), 1.3), want)
    assert torch.equal(penalised(logits, NO_IDS, 1.3), logits)


def test_frequencies_are_the_softmax_of_what_is_left(logits: Tensor) -> None:
    draw = sampler(Sampling(temperature=0.7, top_k=4))
    n = 4000
    counts = torch.bincount(torch.cat([draw(logits, NO_IDS) for _ in range(n)]), minlength=V)
    top = logits.topk(4)
    want = (top.values / 0.7).softmax(-1)
    assert counts[top.indices].sum() == n
    error = (want * (1 - want) / n).sqrt()
    assert ((counts[top.indices] / n - want).abs() < 4 * error).all()


def test_greedy_and_seeds(logits: Tensor) -> None:
    assert sampler(Sampling(temperature=0))(logits, NO_IDS).item() == logits.argmax()

    def draws(seed: int) -> list[int]:
        draw = sampler(Sampling(), seed=seed)
        return [int(draw(logits, NO_IDS)) for _ in range(20)]

    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_forbidden_ids_are_never_drawn(logits: Tensor, temperature: float) -> None:
    forbidden = (int(logits.argmax()), *range(100, 300))
    draw = sampler(Sampling(temperature=temperature), forbidden)
    assert not {int(draw(logits, NO_IDS)) for _ in range(300)} & set(forbidden)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_noticed(logits: Tensor, bad: float, temperature: float) -> None:
    logits[17] = bad
    assert sampler(Sampling(temperature=temperature))(logits, NO_IDS).item() == NOT_FINITE


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -0.1}, "--temperature must be 0"),
        ({"top_k": -1}, "--top-k must be 0"),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"top_p": 1.5}, "--top-p must be above 0"),
        ({"min_p": 2.0}, "--min-p must be between"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be above 0"),
        ({"temperature": float("nan")}, "--temperature"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Sampling(**options)  # type: ignore[arg-type]
