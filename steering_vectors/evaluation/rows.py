"""Rows of an evaluation: what was measured of each condition and of each item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering_vectors.evaluation.items import EvaluationItem
from steering_vectors.evaluation.measuring import ItemScores, TextScores
from steering_vectors.evaluation.statistics import bootstrap_interval, rank_correlation, slopes, wilson_interval

VECTOR = "vector"
UNSTEERED = "unsteered"
SYSTEM_PROMPT = "system prompt"
VARIANT = "variant: "


@dataclass(frozen=True)
class ConditionRow:
    """One condition of an evaluation: the vector, a control, or a baseline without steering.

    Attributes:
        condition: The name: ``"vector"`` for the vector itself.
        multipliers: The multipliers.
        propensities: The mean propensity over the items, at each multiplier.
        slope: The mean over the items of the least-squares slope of propensity over multipliers,
            or None without steering.
        slope_low: The lower end of the slope's interval: 95 %, by 10,000 resamples of the items.
        slope_high: Its upper end.
        anti_steerable: The share of items whose slope is negative.
        anti_steerable_low: The lower end of its interval: 95 %, Wilson's.
        anti_steerable_high: Its upper end.
        rank_correlation: Spearman's rank correlation of propensity and multiplier, as the items'
            mean.
        kl_mean: At each multiplier, the mean over the texts' tokens of KL(unsteered ‖ steered), in
            nats. Empty without texts.
        kl_p95: The 95th percentile of the same.
        first_kl: At each multiplier, the mean KL at the first token of an answer, over the items
            where that token is undecided. Empty if it is at none.
        nll_change: At each multiplier, the change of the texts' mean negative log-likelihood per
            token, in nats.
        items: The number of items.
        propensities_low: The lower ends of the propensities' intervals: 95 %, by 10,000 resamples of
            the items. They cover how far the items lie apart, too, which a slope doesn't.
        propensities_high: Their upper ends.
    """

    condition: str
    multipliers: tuple[float, ...]
    propensities: tuple[float, ...]
    slope: float | None = None
    slope_low: float | None = None
    slope_high: float | None = None
    anti_steerable: float | None = None
    anti_steerable_low: float | None = None
    anti_steerable_high: float | None = None
    rank_correlation: float | None = None
    kl_mean: tuple[float, ...] = ()
    kl_p95: tuple[float, ...] = ()
    first_kl: tuple[float, ...] = ()
    nll_change: tuple[float, ...] = ()
    items: int = 0
    propensities_low: tuple[float, ...] = ()
    propensities_high: tuple[float, ...] = ()


@dataclass(frozen=True)
class ItemRow:
    """One item under the vector.

    Attributes:
        prompt: The item's prompt.
        matching: The answer that shows the behaviour.
        not_matching: The answer that doesn't.
        propensities: The propensity at each multiplier.
        slope: The least-squares slope of propensity over multipliers.
    """

    prompt: Any
    matching: str
    not_matching: str
    propensities: tuple[float, ...]
    slope: float


def condition_row(
    condition: str, multipliers: Sequence[float], items: ItemScores, texts: TextScores | None, seed: int
) -> ConditionRow:
    """Return the row of a steering that was measured on items and, perhaps, on texts."""
    by_item = slopes(multipliers, items.propensities)
    low, high = bootstrap_interval(by_item, seed)
    reversed_items, count = int((by_item < 0).sum()), len(by_item)
    share_low, share_high = wilson_interval(reversed_items, count)
    return ConditionRow(
        condition,
        tuple(multipliers),
        _numbers(items.propensities.mean(dim=0)),
        slope=float(by_item.mean()),
        slope_low=low,
        slope_high=high,
        anti_steerable=reversed_items / count,
        anti_steerable_low=share_low,
        anti_steerable_high=share_high,
        rank_correlation=rank_correlation(multipliers, items.propensities),
        first_kl=() if bool(items.first_kl.isnan().all()) else _numbers(items.first_kl.nanmean(dim=0)),
        items=count,
        **_intervals(items.propensities, seed),
        **_costs(texts),
    )


def _intervals(propensities: Tensor, seed: int) -> dict[str, tuple[float, ...]]:
    """Return the intervals of the mean propensities, from ``(items, multipliers)``."""
    low, high = zip(*(bootstrap_interval(values, seed) for values in propensities.T), strict=True)
    return {"propensities_low": low, "propensities_high": high}


def _costs(texts: TextScores | None) -> dict[str, tuple[float, ...]]:
    if texts is None:
        return {}
    return {
        "kl_mean": _numbers(texts.kl.mean(dim=1)),
        "kl_p95": _numbers(texts.kl.quantile(0.95, dim=1)),
        "nll_change": _numbers(texts.nll_change.mean(dim=1)),
    }


def item_rows(items: Sequence[EvaluationItem], scores: ItemScores, multipliers: Sequence[float]) -> tuple[ItemRow, ...]:
    """Return the rows of items under the vector."""
    by_item = slopes(multipliers, scores.propensities)
    return tuple(
        ItemRow(item.prompt, item.matching, item.not_matching, _numbers(scores.propensities[n]), float(by_item[n]))
        for n, item in enumerate(items)
    )


def unsteered_row(condition: str, propensities: Tensor, seed: int) -> ConditionRow:
    """Return the row of a baseline without steering, from its propensities ``(items,)``."""
    low, high = bootstrap_interval(propensities, seed)
    return ConditionRow(
        condition,
        (0.0,),
        (float(propensities.mean()),),
        items=len(propensities),
        propensities_low=(low,),
        propensities_high=(high,),
    )


def joined_items(parts: Sequence[ItemScores]) -> ItemScores:
    """Return the scores of several batches as one."""
    return ItemScores(torch.cat([p.propensities for p in parts]), torch.cat([p.first_kl for p in parts]))


def joined_texts(parts: Sequence[TextScores]) -> TextScores | None:
    """Return the costs of several batches as one, or None for none."""
    if not parts:
        return None
    return TextScores(torch.cat([p.kl for p in parts], dim=1), torch.cat([p.nll_change for p in parts], dim=1))


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(map(float, values))
