"""Aggregators: callables from contrasting rows of activations to a direction.

An aggregator takes the positive and the negative rows, both ``(n, hidden)`` in float32 or wider, and returns a
direction ``(hidden,)``. Row i of one side belongs to row i of the other. An aggregator that also has the method
``accumulator(hidden)`` takes the rows as they come, and keeps only what it needs of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from steering_vectors._precision import wide, without_autocast
from steering_vectors._statistics import RunningMean, SecondMoment

Aggregator: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Side: TypeAlias = Literal["positive", "negative"]
_ALL_ALIKE = (
    "all differences between the sides are zero, so they show no direction: each pair's positive and negative "
    "activations must differ"
)


class Accumulator(Protocol):
    """State that turns rows into a direction.

    Rows come in any order, and the sides of a pair may come far apart.

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
            samples: The numbers of the pairs: row i belongs to the pair ``samples[i]``.
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


def mean_aggregator() -> Aggregator:
    """Average the differences, positive minus negative. This is the default.

    Source: contrastive activation addition, arXiv 2312.06681, equation 1.

    Raises:
        ValueError: When the aggregator is called, if the sides don't have the same number of rows.

    >>> mean_aggregator()(torch.tensor([[2.0, 4.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([1., 3.])
    """
    return _Mean()


def pca_aggregator() -> Aggregator:
    """Take the first principal component of the differences, at norm 1, pointing towards their mean.

    The differences are not centred: that would remove the part that they all share, which is the
    direction wanted. Activations have norms in the tens to the thousands, so a multiplier of 1
    rarely has a visible effect.

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

    Each pair is first centred on its own mean. Activations have norms in the tens to the thousands,
    so a multiplier of 1 rarely has a visible effect.

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


def accumulator_for(aggregator: Aggregator, hidden: int) -> Accumulator:
    """Return the aggregator's own accumulator, or one that keeps all rows for it."""
    if isinstance(aggregator, StreamingAggregator):
        return aggregator.accumulator(hidden)
    return _KeptRows(aggregator)


@without_autocast
def aggregate(aggregator: Aggregator, positive: Tensor, negative: Tensor) -> Tensor:
    """Return the aggregator's direction for rows ``(n, hidden)``: ``(hidden,)`` in float32.

    Raises TypeError or ValueError if the aggregator returns something else.
    """
    return as_direction(aggregator, aggregator(wide(positive), wide(negative)), positive.shape[-1])


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
class _Logistic:
    sklearn_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        _check_sides(positive, negative)
        half = (wide(positive) - wide(negative)) / 2  # centred on the pair's mean, the sides are half and -half
        if not bool(half.any()):
            raise ValueError(_ALL_ALIKE)
        rows = torch.cat([half, -half]).detach().cpu().numpy()
        labels = [1] * len(half) + [-1] * len(half)
        regression = _logistic_regression()(**{"fit_intercept": False, **self.sklearn_kwargs}).fit(rows, labels)
        normal = torch.as_tensor(regression.coef_, dtype=half.dtype, device=half.device)
        return torch.nn.functional.normalize(normal.reshape(-1), dim=0)

    def __repr__(self) -> str:
        return f"logistic_aggregator({dict(self.sklearn_kwargs) or ''})"


class _KeptRows:
    """Accumulator that keeps all rows, for an aggregator that needs them all at once."""

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator
        self._rows: dict[Side, dict[int, Tensor]] = {"positive": {}, "negative": {}}

    def __getstate__(self) -> dict[str, Any]:
        # The receiving process has the aggregator, which can't always be pickled.
        return {"_aggregator": None, "_rows": self._rows}

    def add(self, rows: Tensor, side: Side, samples: Sequence[int]) -> None:
        self._rows[side].update(zip(samples, rows, strict=True))

    def merge(self, other: _KeptRows) -> None:
        for side, rows in other._rows.items():
            self._rows[side].update(rows)

    def direction(self) -> Tensor:
        _check_paired(self._rows["positive"], self._rows["negative"])
        samples = sorted(self._rows["positive"])
        sides = (torch.stack([self._rows[side][n] for n in samples]) for side in ("positive", "negative"))
        return aggregate(self._aggregator, *sides)


@without_autocast
def _direction_of_all(aggregator: StreamingAggregator, positive: Tensor, negative: Tensor) -> Tensor:
    """Return a streaming aggregator's direction for rows that are all available."""
    _check_sides(positive, negative)
    accumulator = aggregator.accumulator(positive.shape[-1])
    accumulator.add(positive, "positive", range(len(positive)))
    accumulator.add(negative, "negative", range(len(negative)))
    return accumulator.direction()


def _check_sides(positive: Tensor, negative: Tensor) -> None:
    """Raise ValueError unless both sides are rows ``(n, hidden)`` of the same number and width."""
    if positive.shape != negative.shape or positive.ndim != 2:
        raise ValueError(
            f"the positive and negative rows must have the same shape (n, hidden), since row i of one side belongs to "
            f"row i of the other, got {tuple(positive.shape)} and {tuple(negative.shape)}"
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
