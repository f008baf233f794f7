"""Find the multiplier at which steering changes a model's predictions by a given amount."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steering_vectors._arguments import finite_number, with_hints
from steering_vectors._progress import progress_bar
from steering_vectors.evaluation.manner import Manner
from steering_vectors.evaluation.measuring import continuations_of_texts
from steering_vectors.evaluation.neutral_texts import NEUTRAL_TEXTS
from steering_vectors.evaluation.plan import Plan
from steering_vectors.evaluation.propensity import text_propensity
from steering_vectors.steering_operators import PatchDeltaOperator
from steering_vectors.steering_vector import SteeringVector

_MOST_EVALUATIONS = 10
_CLOSE_ENOUGH = 0.02  # of the budget
_RANGE = (1e-9, 1e9)  # of multipliers
# KL grows about with the square of a small change. Less than this power of it is no growth.
_POWER, _LEAST_POWER = 2.0, 0.05


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`calibrate`.

    Attributes:
        multiplier: The multiplier that meets the budget.
        kl_p95: The 95th percentile of the KL per token at this multiplier, in nats.
        max_kl: The budget.
        evaluations: The multipliers that were tried, each with its KL.

    >>> print(Calibration(1.5, kl_p95=0.99, max_kl=1.0, evaluations=((1.0, 0.5), (1.5, 0.99))))
    multiplier 1.5: the 95th percentile of KL per token is 0.99 nats, of 1 allowed
    """

    multiplier: float
    kl_p95: float
    max_kl: float
    evaluations: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        return (
            f"multiplier {self.multiplier:.3g}: the 95th percentile of KL per token is {self.kl_p95:.2g} nats, of "
            f"{self.max_kl:g} allowed"
        )


@with_hints(missing="the arguments begin with model, tokenizer, vector")
def calibrate(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    texts: Iterable[Any] | None = None,
    *,
    max_kl: float = 1.0,
    tokens: Any = None,
    operator: PatchDeltaOperator | None = None,
    batch_size: int = 8,
    show_progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Calibration:
    """Return the multiplier at which steering costs as much as is allowed, all layers together.

    The cost is the 95th percentile over the texts' tokens of KL(unsteered ‖ steered). It is searched
    for in log–log space, where it grows about with the square of the multiplier, in at most ten
    evaluations, to within 2 % of the budget.

    Args:
        model: The model to steer, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        vector: The vector.
        texts: Neutral texts; by default a few that come with the library.
        max_kl: The budget in nats per token.
        tokens: The tokens to steer, as in :func:`evaluate`; by default all.
        operator: The operator, as in :meth:`~steering_vectors.SteeringVector.apply`.
        batch_size: The number of texts in a pass.
        show_progress: True to show a progress bar, of passes of which there may be fewer than expected.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the budget isn't positive, if a text has fewer than three tokens, and if no
            multiplier meets the budget: the KL of a vector of zeros is none, and that of an
            operator that ignores strength doesn't change.

    >>> vector = train_steering_vector(model, tokenizer, [("I love it", "I hate it")], layers=0)
    >>> result = calibrate(model, tokenizer, vector, ["It rains in the morning."], max_kl=0.01)
    >>> 0 < result.kl_p95 < 0.011
    True
    """
    budget = finite_number(max_kl, "max_kl")
    if budget <= 0:
        raise ValueError(f"max_kl must be more than 0, got {budget:g}")
    neutral = continuations_of_texts(tokenizer, NEUTRAL_TEXTS if texts is None else texts, chat_template_kwargs)
    if not neutral:
        raise ValueError("texts is empty: give at least one")
    plan = Plan(
        model, tokenizer, Manner(tokens, operator), text_propensity(), None, batch_size, 0, chat_template_kwargs
    )
    plan.check(vector)
    parts = plan.parts_of_texts(neutral)
    kept = plan.text_batch(parts[0])  # its unsteered predictions are the largest thing here: no others are kept

    def kl(multiplier: float) -> float:
        found = []
        for number, part in enumerate(parts):
            batch = kept if number == 0 else plan.text_batch(part)
            found.append(batch.scores(plan.steering(vector), [multiplier]).kl)
            bar.update()
        return float(torch.cat(found, dim=1).quantile(0.95))

    with progress_bar(total=_MOST_EVALUATIONS * len(parts), desc="Calibrating", disable=not show_progress) as bar:
        tried = _search(kl, budget)
    multiplier, found = min(tried, key=lambda pair: abs(_log_ratio(pair[1], budget)))
    return Calibration(multiplier, found, budget, tuple(tried))


def _search(kl: Callable[[float], float], budget: float) -> list[tuple[float, float]]:
    """Return the multipliers tried, with the KL of each, of which one meets the budget.

    In log–log space, the next multiplier is where the line through the two nearest tries meets the budget. It stays
    between tries on either side of the budget, once there are any.
    """
    tried: list[tuple[float, float]] = []
    multiplier = 1.0
    while len(tried) < _MOST_EVALUATIONS:
        found = kl(multiplier)
        tried.append((multiplier, found))
        if abs(_log_ratio(found, budget)) <= _CLOSE_ENOUGH:
            return tried
        multiplier = _next(tried, budget)
        if not _RANGE[0] <= multiplier <= _RANGE[1]:
            break
    tries = ", ".join(f"{found:.3g} at {multiplier:.3g}" for multiplier, found in sorted(tried))
    raise ValueError(
        f"no multiplier was found at which the 95th percentile of KL is {budget:g} nats per token: it was {tries}. An "
        f"operator that ignores strength, or a vector of zeros, can't be calibrated; else change max_kl"
    )


def _next(tried: list[tuple[float, float]], budget: float) -> float:
    """Return the multiplier to try next; 0 or infinity if the KL doesn't follow the multiplier."""
    below = max((pair for pair in tried if pair[1] < budget), default=None)
    above = min((pair for pair in tried if pair[1] >= budget), default=None)
    if below is not None and above is not None and below[0] < above[0]:
        low, high = math.log(below[0]), math.log(above[0])
        if below[1] <= 0 or len(tried) % 3 == 0:  # a bisection now and then, for a KL that isn't a power
            return math.exp((low + high) / 2)
        share = _log_ratio(budget, below[1]) / _log_ratio(above[1], below[1])
        return math.exp(low + min(max(share, 0.05), 0.95) * (high - low))
    last, found = tried[-1]
    power = _POWER
    if len(tried) > 1:
        before, earlier = tried[-2]
        power = _log_ratio(found, earlier) / _log_ratio(last, before)
        if not power > _LEAST_POWER:
            return math.inf
    step = _log_ratio(budget, found) / min(power, 2 * _POWER)
    return math.exp(math.log(last) + min(max(1.2 * step, -6.0), 6.0))


def _log_ratio(first: float, second: float) -> float:
    return math.log(max(first, 1e-300) / max(second, 1e-300))
