"""Statistics against numpy, scipy, scikit-learn and formulas written out here."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_vectors.evaluation.measuring import kl_divergence
from steering_vectors.evaluation.statistics import auc, bootstrap_interval, rank_correlation, slopes, wilson_interval

NUMBERS = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))


@given(st.lists(NUMBERS, min_size=2, max_size=6, unique=True), st.integers(0, 1000))
@settings(deadline=None)
def test_slopes_are_numpys(multipliers: list[float], seed: int) -> None:
    values = torch.randn(4, len(multipliers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = np.polyfit(multipliers, values.numpy().T, 1)[0]
    spread = max(multipliers) - min(multipliers)
    np.testing.assert_allclose(slopes(multipliers, values).numpy(), expected, rtol=1e-6, atol=1e-6 / spread)


@given(st.lists(st.integers(-3, 3), min_size=3, max_size=7))
@settings(deadline=None)
def test_rank_correlation_is_scipys(values: list[int]) -> None:
    multipliers = list(map(float, range(len(values))))
    found = rank_correlation(multipliers, torch.tensor([values], dtype=torch.float64))
    if len(set(values)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(multipliers, values).statistic)


@pytest.mark.parametrize(("count", "total"), [(0, 16), (3, 16), (16, 16), (1, 1), (40, 100)])
def test_wilsons_interval_is_scipys(count: int, total: int) -> None:
    expected = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high))


def test_the_bootstrap_interval_is_scipys_and_seeded() -> None:
    values = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    low, high = bootstrap_interval(values, seed=0)
    assert (low, high) == bootstrap_interval(values, seed=0) != bootstrap_interval(values, seed=1)
    expected = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_the_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(torch.randn(30, generator=generator, dtype=torch.float64), seed=0)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
@settings(deadline=None)
def test_auc_is_sklearns(positive: list[int], negative: list[int]) -> None:
    labels = [1] * len(positive) + [0] * len(negative)
    expected = sklearn.metrics.roc_auc_score(labels, [*positive, *negative])
    assert auc(torch.tensor(positive), torch.tensor(negative)) == pytest.approx(expected)


def test_kl_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 5, 7, generator=generator).log_softmax(dim=-1)
    expected = [scipy.stats.entropy(p.exp(), q.exp()) for p, q in zip(before, after)]
    np.testing.assert_allclose(kl_divergence(before, after).numpy(), expected, rtol=1e-4)


def test_kl_of_a_token_that_cannot_come_is_none() -> None:
    before = torch.tensor([0.0, -math.inf])
    assert kl_divergence(before, torch.tensor([math.log(0.5)] * 2)).item() == pytest.approx(math.log(2))
    assert kl_divergence(before, before).item() == 0
