"""Statistics of an evaluation: slopes over multipliers, intervals, and rank correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_RESAMPLES = 10_000
_Z = 1.959963984540054  # of the normal distribution, for 95 %


def slopes(multipliers: Sequence[float], propensities: Tensor) -> Tensor:
    """Return the least-squares slope ``(items,)`` of each item's propensities ``(items, multipliers)``."""
    x = torch.tensor(multipliers, dtype=torch.float64, device="cpu")
    centred = x - x.mean()
    return propensities.double() @ centred / (centred @ centred)


def bootstrap_interval(values: Tensor, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of ``values (n,)`` over 10,000 seeded resamples."""
    generator = torch.Generator("cpu").manual_seed(seed)
    count, values = len(values), values.double()
    means = []
    for _ in range(0, _RESAMPLES, 1_000):  # bounds the memory
        drawn = torch.randint(count, (1_000, count), generator=generator, device="cpu")
        means.append(values[drawn].mean(dim=1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu"))
    return float(low), float(high)


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share, ``count`` of ``total``."""
    share, weight = count / total, _Z**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def rank_correlation(multipliers: Sequence[float], propensities: Tensor) -> float:
    """Return Spearman's rank correlation with the multipliers of each item's propensities, as the items' mean.

    An item whose propensities are all alike counts as 0.
    """
    x = _ranks(torch.tensor(multipliers, dtype=torch.float64, device="cpu"))
    x = x - x.mean()
    found = []
    for row in propensities.double():
        y = _ranks(row)
        y = y - y.mean()
        size = float(y.norm() * x.norm())
        found.append(float(x @ y) / size if size else 0.0)
    return sum(found) / len(found)


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of values, from 1; equal ones get the mean of theirs."""
    below = (values[None, :] < values[:, None]).sum(dim=1)
    equal = (values[None, :] == values[:, None]).sum(dim=1)
    return below + (equal + 1).double() / 2


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return the share of pairs of values, one of each side, whose positive one is larger; equal ones count half."""
    larger = (positive[:, None] > negative[None, :]).double()
    equal = (positive[:, None] == negative[None, :]).double()
    return float((larger + equal / 2).mean())
