"""Aggregators: callables from contrasting rows of activations to a direction.

An aggregator takes the positive and the negative rows, both ``(n, hidden)`` in float32 or wider, and returns a
direction ``(hidden,)``. Row i of one side belongs to row i of the other. An aggregator that also has the method
``of_sets`` takes two sets too, of which no row belongs to another: any callable that doesn't have it is taken to need
pairs. An aggregator that also has the method ``accumulator(hidden)`` takes the rows as they come, and keeps only what
it needs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from steering_vectors._arguments import finite_number
from steering_vectors._precision import wide, without_autocast
from steering_vectors._statistics import RunningMean, SecondMoment, geometric_median, winsorized_mean

Aggregator: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Side: TypeAlias = Literal["positive", "negative"]
_ALL_ALIKE = (
    "all differences between the sides are zero, so they show no direction: each pair's positive and negative "
    "activations must differ"
)


class Accumulator(Protocol):
    """State that turns rows into a direction.

    Rows come in any order, and the sides of a pair may come far apart. The sides of two sets, which
    only aggregators with the method ``of_sets`` get, may differ in their numbers of rows.

    >>> accumulator = mean_aggregator().accumulator(hidden=2)
    >>> accumulator.add(torch.tensor([[1.0, 1.0]]), "negative", samples=[0])
    >>> accumulator.add(torch.tensor([[2.0, 4.0]]), "positive", samples=[0])
    >>> accumulator.direction()
    tensor([1., 3.])
    """

    def add(self, rows: Tensor, side: Side, samples: Sequence[int]) -> None:
        """Add rows of one side.

        Args:
            rows: Activations ``(n, hidden)`` in float32 or wider.
            side: The side of the pairs that all these rows belong to.
            samples: The numbers of the pairs: row i belongs to the pair ``samples[i]``. In a set,
                they count its prompts.
        """

    def merge(self, other: Any) -> None:
        """Add the rows that another accumulator of the same kind has seen, from other pairs."""

    def direction(self) -> Tensor:
        """Return the direction ``(hidden,)`` of all pairs added."""


@runtime_checkable
class StreamingAggregator(Protocol):
    """An aggregator that takes rows as they come, so that none need be kept until the end.

    >>> isinstance(mean_aggregator(), StreamingAggregator)
    True
    >>> isinstance(logistic_aggregator(), StreamingAggregator)
    False
    """

    def accumulator(self, hidden: int) -> Accumulator:
        """Return a new accumulator for rows of width ``hidden``."""


@runtime_checkable
class SetAggregator(Protocol):
    """An aggregator that also takes two sets, of which no row belongs to another.

    A function becomes one with ``function.of_sets = function``. One that also has
    ``accumulator(hidden)`` gets the rows of sets through it in training.

    >>> isinstance(mean_aggregator(), SetAggregator)
    True
    >>> isinstance(pca_aggregator(), SetAggregator)
    False
    """

    def of_sets(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return the direction ``(hidden,)`` of two sets.

        Args:
            positive: Positive rows ``(n, hidden)`` in float32 or wider.
            negative: Negative rows ``(m, hidden)``.
        """


def mean_aggregator() -> Aggregator:
    """Average the differences, positive minus negative. This is the default.

    Of sets, it is the difference of their means. No row is kept.

    Source: contrastive activation addition, arXiv 2312.06681, equation 1.

    Raises:
        ValueError: When the aggregator is called, if the sides don't have the same number of rows.

    >>> mean_aggregator()(torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([1., 3.])
    """
    return _Mean()


def geometric_median_aggregator() -> Aggregator:
    """Subtract the negative side's geometric median from the positive side's.

    The geometric median is the point with the least sum of distances to the rows. As long as less
    than half of a side's rows are outliers, it stays near the others, where the mean would follow
    the outliers (Lopuhaä and Rousseeuw 1991, "Breakdown points of affine equivariant estimators of
    multivariate location and covariance matrices").
    It is of each side and not of the differences, so that pairs and sets have the same direction.
    All rows are kept until the end.

    Source: robust means in place of each side's mean, arXiv 2603.03206. The algorithm is
    Weiszfeld's, in the form of Vardi and Zhang 2000, "The multivariate L1-median and associated
    data depth". It stops when a step is shorter than 1e-10 of the rows' mean distance to the point,
    or after 1,000 steps. Where the median is not unique, as of two rows, it is the point to which
    the algorithm leads from the mean.

    Raises:
        ValueError: When the aggregator is called, if a side has no rows, or if the sides don't have
            the same number of rows.

    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [90.0, 90.0]])
    >>> geometric_median_aggregator()(rows, torch.zeros(5, 2)).round(decimals=2)
    tensor([0.3100, 0.3100])
    """
    return _GeometricMedian()


def winsorized_aggregator(quantile: float) -> Aggregator:
    """Subtract the negative side's winsorized mean from the positive side's.

    In each of the ``hidden`` numbers, the k lowest values of a side are raised to the next one, and
    the k highest are lowered to the next one, with k = ⌊quantile · n⌋ of n rows. Then the mean is
    taken. Of fewer than 1 / quantile rows none is changed. It is of each side and not of the
    differences, so that pairs and sets have the same direction. All rows are kept until the end.

    Source: Tukey 1962, "The future of data analysis"; as in ``scipy.stats.mstats.winsorize``.

    Args:
        quantile: The share of the rows that is changed at each end, from 0 to below 0.5.

    Raises:
        TypeError: If ``quantile`` is not a number.
        ValueError: If it is not from 0 to below 0.5. When the aggregator is called, if a side has
            no rows, or if the sides don't have the same number of rows.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [90.0]])
    >>> winsorized_aggregator(0.2)(rows, torch.zeros(5, 1))
    tensor([3.])
    """
    if not 0 <= finite_number(quantile, "quantile") < 0.5:
        raise ValueError(f"quantile must be from 0 to below 0.5, since it is cut at both ends, got {quantile}")
    return _Winsorized(float(quantile))


def pca_aggregator() -> Aggregator:
    """Take the first principal component of the differences, at norm 1, pointing towards their mean.

    The differences are not centred: that would remove the part that they all share, which is the
    direction wanted. Activations have norms in the tens to the thousands, so a multiplier of 1
    rarely has a visible effect. It needs pairs: sets have no differences.

    Source: representation engineering, arXiv 2310.01405, section 3.1.

    Raises:
        ValueError: When the aggregator is called, if all differences are zero, or if the sides
            don't have the same number of rows.

    >>> direction = pca_aggregator()(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.zeros(2, 2))
    >>> direction.round(decimals=4)
    tensor([1., 0.])
    """
    return _PCA()


def logistic_aggregator(sklearn_kwargs: Mapping[str, Any] | None = None) -> Aggregator:
    """Fit a logistic regression between the sides, and take its normal at norm 1.

    Each pair is first centred on its own mean, and the regression has no intercept. Sets are
    centred on the mean of all rows, and the regression has one. Activations have norms in the tens
    to the thousands, so a multiplier of 1 rarely has a visible effect. All rows are kept until the
    end.

    Args:
        sklearn_kwargs: Arguments for scikit-learn's ``LogisticRegression``.

    Raises:
        ImportError: If scikit-learn isn't installed: it comes with ``steering-vectors[sklearn]``.
        ValueError: When the aggregator is called, if all differences are zero, or if the sides
            don't have the same number of rows.

    >>> aggregator = logistic_aggregator({"C": 10.0})
    >>> aggregator(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.zeros(2, 2)).round()
    tensor([1., 0.])
    """
    _logistic_regression()
    return _Logistic(dict(sklearn_kwargs or {}))


def as_set_aggregator(aggregator: Aggregator) -> SetAggregator:
    """Return the aggregator. Raises ValueError if it has no method for sets, and so needs pairs."""
    if not isinstance(aggregator, SetAggregator):
        raise ValueError(
            f"{aggregator!r} needs pairs, in which row i of one side belongs to row i of the other, but got two sets: "
            f"give pairs, or choose an aggregator for sets, such as mean_aggregator(). An aggregator of your own takes "
            f"sets if it has a method of_sets(positive, negative)"
        )
    return aggregator


def accumulator_for(aggregator: Aggregator, hidden: int, *, paired: bool = True) -> Accumulator:
    """Return the aggregator's own accumulator, or one that keeps all rows for it."""
    if isinstance(aggregator, StreamingAggregator):
        return aggregator.accumulator(hidden)
    return _KeptRows(aggregator, paired=paired)


@without_autocast
def aggregate(aggregator: Aggregator, positive: Tensor, negative: Tensor, *, paired: bool = True) -> Tensor:
    """Return the aggregator's direction for rows of pairs or of sets: ``(hidden,)`` in float32.

    Raises TypeError or ValueError if the aggregator returns something else.
    """
    combine = aggregator if paired else as_set_aggregator(aggregator).of_sets
    return as_direction(aggregator, combine(wide(positive), wide(negative)), positive.shape[-1])


def as_direction(aggregator: Aggregator, direction: object, hidden: int) -> Tensor:
    """Return an aggregator's result as a direction ``(hidden,)`` in float32, without gradients.

    Raises TypeError unless the result is a tensor, and ValueError unless it has the shape of a direction.
    """
    if not isinstance(direction, Tensor):
        raise TypeError(
            f"the aggregator {aggregator!r} returned {type(direction).__name__}, expected a tensor of shape ({hidden},)"
        )
    if direction.shape not in ((hidden,), (1, hidden)):
        raise ValueError(
            f"the aggregator {aggregator!r} returned a tensor of shape {tuple(direction.shape)}, expected ({hidden},)"
        )
    return direction.detach().reshape(hidden).float()


@dataclass(frozen=True)
class _Mean:
    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_pairs(positive, negative)
        return _direction_of_all(self, positive, negative)

    def of_sets(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_sets(positive, negative)
        return _direction_of_all(self, positive, negative)

    def accumulator(self, hidden: int) -> _MeanAccumulator:
        return _MeanAccumulator()

    def __repr__(self) -> str:
        return "mean_aggregator()"


class _MeanAccumulator:
    """Accumulator of the difference of two means; it keeps no row."""

    def __init__(self) -> None:
        self._means = {"positive": RunningMean(), "negative": RunningMean()}

    def add(self, rows: Tensor, side: Side, samples: Sequence[int]) -> None:
        self._means[side].add(rows)

    def merge(self, other: _MeanAccumulator) -> None:
        for side, mean in self._means.items():
            mean.merge(other._means[side])

    def direction(self) -> Tensor:
        return (self._means["positive"].mean - self._means["negative"].mean).float()


@dataclass(frozen=True)
class _PCA:
    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_pairs(positive, negative)
        return _direction_of_all(self, positive, negative)

    def accumulator(self, hidden: int) -> _PCAAccumulator:
        return _PCAAccumulator()

    def __repr__(self) -> str:
        return "pca_aggregator()"


class _PCAAccumulator:
    """Accumulator of the differences' second moment; it keeps a row until the pair's other row comes."""

    def __init__(self) -> None:
        self._waiting: dict[Side, dict[int, Tensor]] = {"positive": {}, "negative": {}}
        self._moment = SecondMoment()

    def add(self, rows: Tensor, side: Side, samples: Sequence[int]) -> None:
        partners, sign = (self._waiting["negative"], 1) if side == "positive" else (self._waiting["positive"], -1)
        paired = [n for n, sample in enumerate(samples) if sample in partners]
        if paired:
            others = torch.stack([partners.pop(samples[n]) for n in paired])
            self._moment.add(sign * (wide(rows[paired]) - wide(others)))
        alone = set(range(len(samples))).difference(paired)
        self._waiting[side].update((samples[n], rows[n]) for n in sorted(alone))

    def merge(self, other: _PCAAccumulator) -> None:
        self._moment.merge(other._moment)
        for side, rows in self._waiting.items():
            rows.update(other._waiting[side])

    def direction(self) -> Tensor:
        _check_paired(self._waiting["positive"], self._waiting["negative"])
        component = self._moment.principal_component()
        if component is None:
            raise ValueError(_ALL_ALIKE)
        return component.float()


@dataclass(frozen=True)
class _GeometricMedian:
    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_pairs(positive, negative)
        return self.of_sets(positive, negative)

    @without_autocast
    def of_sets(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_sets(positive, negative)
        return (geometric_median(positive) - geometric_median(negative)).float()

    def __repr__(self) -> str:
        return "geometric_median_aggregator()"


@dataclass(frozen=True)
class _Winsorized:
    quantile: float

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_pairs(positive, negative)
        return self.of_sets(positive, negative)

    def of_sets(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_sets(positive, negative)
        return (winsorized_mean(positive, self.quantile) - winsorized_mean(negative, self.quantile)).float()

    def __repr__(self) -> str:
        return f"winsorized_aggregator({self.quantile})"


@dataclass(frozen=True)
class _Logistic:
    sklearn_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_pairs(positive, negative)
        half = (wide(positive) - wide(negative)) / 2  # centred on the pair's mean, the sides are half and -half
        if not bool(half.any()):
            raise ValueError(_ALL_ALIKE)
        return self._normal(half, -half, fit_intercept=False)

    def of_sets(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_sets(positive, negative)
        rows = torch.cat([wide(positive), wide(negative)])
        if not bool((rows != rows[0]).any()):
            raise ValueError("all rows of the two sets are the same, so they show no direction")
        # With an intercept the centre doesn't matter, but large common values would slow the fit.
        rows = rows - rows.mean(dim=0)
        return self._normal(rows[: len(positive)], rows[len(positive) :], fit_intercept=True)

    def _normal(self, positive: Tensor, negative: Tensor, *, fit_intercept: bool) -> Tensor:
        rows = torch.cat([positive, negative])
        labels = [1] * len(positive) + [-1] * len(negative)
        regression = _logistic_regression()(**{"fit_intercept": fit_intercept, **self.sklearn_kwargs})
        regression.fit(rows.detach().cpu().numpy(), labels)
        normal = torch.as_tensor(regression.coef_, dtype=rows.dtype, device=rows.device)
        return torch.nn.functional.normalize(normal.reshape(-1), dim=0)

    def __repr__(self) -> str:
        return f"logistic_aggregator({dict(self.sklearn_kwargs) or ''})"


class _KeptRows:
    """Accumulator that keeps all rows, for an aggregator that needs them all at once."""

    def __init__(self, aggregator: Aggregator, *, paired: bool) -> None:
        self._aggregator = aggregator
        self._paired = paired
        self._rows: dict[Side, dict[int, Tensor]] = {"positive": {}, "negative": {}}

    def __getstate__(self) -> dict[str, Any]:
        # The receiving process has the aggregator, which can't always be pickled.
        return {**vars(self), "_aggregator": None}

    def add(self, rows: Tensor, side: Side, samples: Sequence[int]) -> None:
        self._rows[side].update(zip(samples, rows, strict=True))

    def merge(self, other: _KeptRows) -> None:
        for side, rows in other._rows.items():
            self._rows[side].update(rows)

    def direction(self) -> Tensor:
        if self._paired:
            _check_paired(self._rows["positive"], self._rows["negative"])
        positive, negative = (torch.stack([rows[n] for n in sorted(rows)]) for rows in self._rows.values())
        return aggregate(self._aggregator, positive, negative, paired=self._paired)


@without_autocast
def _direction_of_all(aggregator: StreamingAggregator, positive: Tensor, negative: Tensor) -> Tensor:
    """Return a streaming aggregator's direction for rows that are all available."""
    accumulator = aggregator.accumulator(positive.shape[-1])
    accumulator.add(positive, "positive", range(len(positive)))
    accumulator.add(negative, "negative", range(len(negative)))
    return accumulator.direction()


def _check_pairs(positive: Tensor, negative: Tensor) -> None:
    """Raise ValueError unless both sides are rows ``(n, hidden)`` of the same number and width."""
    if positive.shape != negative.shape or positive.ndim != 2:
        raise ValueError(
            f"the positive and negative rows must have the same shape (n, hidden), since row i of one side belongs to "
            f"row i of the other, got {tuple(positive.shape)} and {tuple(negative.shape)}"
        )


def _check_sets(positive: Tensor, negative: Tensor) -> None:
    """Raise ValueError unless both sides are rows ``(n, hidden)`` of the same width, at least one on each side."""
    shapes = [tuple(side.shape) for side in (positive, negative)]
    if (
        positive.ndim != 2
        or negative.ndim != 2
        or positive.shape[1] != negative.shape[1]
        or 0 in (*shapes[0], *shapes[1])
    ):
        raise ValueError(
            f"the positive and the negative rows must be (n, hidden) and (m, hidden), at least one on each side, got "
            f"{shapes[0]} and {shapes[1]}"
        )


def _check_paired(positive: Mapping[int, Tensor], negative: Mapping[int, Tensor]) -> None:
    """Raise ValueError if some samples have a row on one side alone."""
    alone = sorted(positive.keys() ^ negative.keys())
    if alone:
        raise ValueError(f"each sample must have a positive and a negative row, but sample {alone[0]} has only one")


def _logistic_regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "logistic_aggregator() needs scikit-learn: pip install 'steering-vectors[sklearn]'"
        ) from error
    return LogisticRegression
