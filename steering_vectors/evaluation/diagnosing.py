"""Train a vector and diagnose how well its samples agree, from one extraction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._arguments import check_takes, is_whole_number, with_hints
from steering_vectors._html import block, table
from steering_vectors.aggregators import Aggregator, mean_aggregator
from steering_vectors.evaluation.statistics import auc
from steering_vectors.evaluation.tables import data_frame, paragraph, text_table
from steering_vectors.steering_vector import SteeringVector
from steering_vectors.train_steering_vector import train_steering_vector

_FOLDS = 5
_FEWEST = 4  # pairs: two to a half


@dataclass(frozen=True)
class LayerDiagnosis:
    """The agreement of the training pairs at one layer.

    Attributes:
        layer: The layer.
        pair_cosine: The mean cosine of the pairs' differences to the direction.
        separation: d′ along the direction: the distance of both sides' means in units of their
            standard deviations' quadratic mean.
        auc: The share of positive and negative prompts, from pairs that were left out of the
            training, that the direction puts in the right order; 0.5 is chance.
        split_half: The cosine of the directions of two halves of the pairs.
        norm_share: The direction's norm as a share of the activations' norm, or None if unknown.
    """

    layer: int
    pair_cosine: float
    separation: float
    auc: float
    split_half: float
    norm_share: float | None


@dataclass(frozen=True)
class Diagnosis:
    """The result of :func:`diagnose`. Printed, it is a table with the best layers named below.

    Attributes:
        rows: A row for each layer, in order.
        pairs: The number of training pairs.

    >>> row = LayerDiagnosis(7, pair_cosine=0.5, separation=2.0, auc=0.9, split_half=0.8, norm_share=0.2)
    >>> Diagnosis((row,), pairs=20).best(1)
    (7,)
    """

    rows: tuple[LayerDiagnosis, ...]
    pairs: int

    def best(self, count: int = 3) -> tuple[int, ...]:
        """Return the layers that separate best, by AUC, and among equals by the pairs' agreement.

        Args:
            count: The number of layers.
        """
        ordered = sorted(self.rows, key=lambda row: (round(row.auc, 3), row.pair_cosine), reverse=True)
        return tuple(row.layer for row in ordered[:count])

    def __str__(self) -> str:
        return "\n\n".join([text_table(*self._table()), *map(paragraph, self._notes())])

    def _repr_html_(self) -> str:
        return block("Diagnosis", table(*self._table()), *(f"<p>{note}</p>" for note in self._notes()))

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame. Raises ImportError if pandas isn't installed."""
        return data_frame([{field.name: getattr(row, field.name) for field in fields(row)} for row in self.rows])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        columns = ["layer", "AUC", "pair cosine", "separation d'", "split-half cosine", "norm / stream"]
        lines = [
            [
                str(row.layer),
                f"{row.auc:.2f}",
                f"{row.pair_cosine:.2f}",
                f"{row.separation:.1f}",
                f"{row.split_half:.2f}",
                "" if row.norm_share is None else f"{row.norm_share:.2f}",
            ]
            for row in self.rows
        ]
        return columns, lines

    def _notes(self) -> list[str]:
        best = ", ".join(map(str, self.best()))
        return [
            f"{self.pairs} pairs. Best by AUC on pairs left out, then by the pairs' agreement: layer"
            f"{'s' * (len(self.rows) > 1)} {best}.",
            "What separates is not what steers: the best detector may be far from the best control. Sweep the layers "
            "to see which ones steer.",
        ]


@with_hints(missing="the arguments begin with model, tokenizer, training_samples", layer="the argument is layers=")
def diagnose(
    model: nn.Module,
    tokenizer: Any,
    training_samples: Any,
    *,
    layers: int | Iterable[int] | None = None,
    aggregator: Aggregator = mean_aggregator(),
    seed: int = 0,
    **training: Any,
) -> tuple[SteeringVector, Diagnosis]:
    """Train a vector, and measure at each layer how well its training pairs agree.

    Agreement and separation predict steerability in part (arXiv 2505.22637), but the layer that
    separates best is often not the one that steers best (arXiv 2606.24952).

    All comes from one extraction. The aggregator runs eight times for each layer: for the vector,
    for each of five folds, and for two halves.

    Args:
        model: The model to read, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        training_samples: Pairs, as in :func:`~steering_vectors.train_steering_vector`: at least four.
        layers: The layers, as there. None diagnoses all.
        aggregator: The aggregator, as there.
        seed: The seed of folds and halves.
        **training: Further arguments of :func:`~steering_vectors.train_steering_vector`.

    Returns:
        The vector, as :func:`~steering_vectors.train_steering_vector` returns it, and the diagnosis.

    Raises:
        TypeError: If an argument has the wrong type, and for sets in place of pairs.
        ValueError: For fewer than four pairs, and as :func:`~steering_vectors.train_steering_vector` does.

    >>> pairs = [("I love it", "I hate it"), ("Great!", "Awful!"), ("Good", "Bad"), ("Yes", "No")]
    >>> vector, diagnosis = diagnose(model, tokenizer, pairs)
    >>> [row.layer for row in diagnosis.rows]
    [0, 1]
    """
    if isinstance(training_samples, Mapping):
        raise TypeError("diagnose needs pairs: sets have no differences of pairs, whose agreement it measures")
    if training.get("process_group") is not None:
        raise ValueError("diagnose needs all pairs in one process: leave process_group out")
    if not is_whole_number(seed):
        raise TypeError(f"seed must be a whole number, got {seed!r}")
    check_takes(aggregator, 2, "aggregator", "mean_aggregator()")
    recording = _Recording(aggregator)
    vector = train_steering_vector(
        model, tokenizer, training_samples, **{"layers": layers, "aggregator": recording, **training}
    )
    shares = vector.shares()
    rows = []
    for layer, (positive, negative) in zip(vector.layers, recording.rows, strict=True):
        if len(positive) < _FEWEST:
            raise ValueError(f"a diagnosis needs at least {_FEWEST} pairs, got {len(positive)}")
        direction = vector.layer_activations[layer]
        measured = _Layer(positive.double().cpu(), negative.double().cpu(), aggregator, direction.double().cpu(), seed)
        rows.append(
            LayerDiagnosis(
                layer,
                measured.pair_cosine(),
                measured.separation(),
                measured.auc(),
                measured.split_half(),
                shares.get(layer),
            )
        )
    return vector, Diagnosis(tuple(rows), len(positive))


class _Recording:
    """An aggregator that keeps the rows of each layer, in the order of the layers."""

    def __init__(self, aggregator: Aggregator) -> None:
        self._aggregator = aggregator
        self.rows: list[tuple[Tensor, Tensor]] = []

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        self.rows.append((positive, negative))
        return self._aggregator(positive, negative)

    def __repr__(self) -> str:
        return repr(self._aggregator)


@dataclass(frozen=True, eq=False)
class _Layer:
    """The rows of a layer's pairs ``(pairs, hidden)``, and the direction that they have."""

    positive: Tensor
    negative: Tensor
    aggregator: Callable[[Tensor, Tensor], Tensor]
    direction: Tensor
    seed: int

    def pair_cosine(self) -> float:
        return float(torch.cosine_similarity(self.positive - self.negative, self.direction[None], dim=1).mean())

    def separation(self) -> float:
        unit = self.direction / self.direction.norm().clamp(min=1e-300)
        positive, negative = self.positive @ unit, self.negative @ unit
        spread = ((positive.var() + negative.var()) / 2).sqrt()
        return float((positive.mean() - negative.mean()) / spread) if spread > 0 else 0.0

    def auc(self) -> float:
        """Return the mean over folds of the AUC on pairs that the direction wasn't trained on."""
        found, weights = 0.0, 0
        order = self._order()
        for fold in torch.tensor_split(order, min(_FOLDS, len(order))):
            rest = order[~torch.isin(order, fold)]
            direction = self._direction(rest)
            found += len(fold) * auc(self.positive[fold] @ direction, self.negative[fold] @ direction)
            weights += len(fold)
        return found / weights

    def split_half(self) -> float:
        first, second = (self._direction(half) for half in torch.tensor_split(self._order(), 2))
        return float(torch.cosine_similarity(first, second, dim=0))

    def _order(self) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return torch.randperm(len(self.positive), generator=generator, device="cpu")

    def _direction(self, places: Tensor) -> Tensor:
        return self.aggregator(self.positive[places].float(), self.negative[places].float()).double()
