"""Intervals: right coverage on dependent data, exact for what is exact."""

from __future__ import annotations

import numpy as np
import pytest

from sinkpretrain.statistics import block_bootstrap, block_means, paired_difference, t_interval


def ar1(length: int, rho: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=length)
    out = np.empty(length)
    out[0] = noise[0]
    for i in range(1, length):
        out[i] = rho * out[i - 1] + noise[i]
    return out


def test_coverage_on_dependent_data() -> None:
    """The interval covers the true mean about 95 times in 100; treating tokens as independent would not."""
    covered = naive = 0
    for seed in range(100):
        values = ar1(20_000, 0.9, seed)
        low, high = block_bootstrap(values, block=500, draws=300)
        covered += low < 0 < high
        naive += abs(values.mean()) < 1.96 * values.std() / len(values) ** 0.5
    assert covered >= 88
    assert naive < 60


def test_coverage_on_a_short_text() -> None:
    """A few thousand tokens hold too few blocks of the usual length; shorter ones keep the interval honest."""
    covered = 0
    for seed in range(200):
        low, high = block_bootstrap(ar1(4096, 0.9, seed), draws=300)
        covered += low < 0 < high
    assert 180 <= covered <= 198


def test_paired_difference_of_a_shift_is_exact() -> None:
    values = ar1(5000, 0.5, 1).astype(np.float32)
    mean, low, high = paired_difference(values + np.float32(0.25), values)
    assert (mean, low, high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)


def test_pairing_is_sharper() -> None:
    hard = ar1(20_000, 0.9, 2)
    a = hard + 0.01 * np.random.default_rng(3).normal(size=len(hard))
    _, low, high = paired_difference(a + 0.01, hard)
    assert 0 < low < 0.01 < high < 0.02
    assert np.subtract(*block_bootstrap(a)[::-1]) > 10 * (high - low)


def test_short_texts_get_shorter_blocks() -> None:
    means, counts = block_means(np.arange(100.0))
    assert len(means) >= 32
    assert counts.sum() == 100
    assert (means * counts).sum() / 100 == pytest.approx(49.5)
    assert block_bootstrap(np.ones(3)) == (1, 1)


def test_deterministic() -> None:
    values = ar1(5000, 0.5, 1)
    assert block_bootstrap(values) == block_bootstrap(values)


def test_t_interval_by_hand() -> None:
    assert t_interval([1.0]) is None
    low, high = t_interval([18.0, 19.0, 20.0]) or (0, 0)
    assert (low, high) == (pytest.approx(19 - 4.303 / 3**0.5), pytest.approx(19 + 4.303 / 3**0.5))


@pytest.mark.parametrize("n", [2, 3, 5, 31])
def test_t_interval_covers_the_mean_of_few_values(n: int) -> None:
    """19 of 20 times, as it says; a percentile bootstrap of three values does not."""
    samples = np.random.default_rng(0).normal(5, 2, (4000, n))
    intervals = [t_interval(list(s)) or (0, 0) for s in samples]
    assert np.mean([low < 5 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.011)
