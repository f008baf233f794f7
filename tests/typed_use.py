"""Checked by mypy and not run: the names of the lazy package have their types, and no others are there."""

from torch import Tensor, nn
from typing_extensions import assert_type

import steering_vectors
from steering_vectors import (
    CombinableSelector,
    SteeringPatchHandle,
    SteeringVector,
    TokenPositions,
    after,
    from_index,
    generated,
    select,
    train_steering_vector,
)
from steering_vectors.aggregators import mean_aggregator


def use(model: nn.Module, tokenizer: object) -> None:
    vector = train_steering_vector(model, tokenizer, [("yes", "no")], aggregator=mean_aggregator())
    assert_type(vector, SteeringVector)
    assert_type(vector.norms(), dict[int, float])
    assert_type(steering_vectors.SteeringVector.load("file"), SteeringVector)
    assert_type(vector.patch(model, tokens=from_index(1), operator=lambda h, d: d - h), SteeringPatchHandle)

    def even(positions: TokenPositions) -> Tensor:
        return positions.index % 2 == 0

    vector.apply(model, tokens=even)
    vector.apply(model, tokens=lambda positions: positions.index > 3)
    assert_type(0.5 * (from_index(1) & ~after([3, 4], until=5)) | [0, 1], CombinableSelector)
    assert_type([0, 1] | (even & generated(3, strength=lambda step: 0.8**step)), CombinableSelector)
    vector.apply(model, tokens=select(even) & slice(2, 5))
    steering_vectors.absent  # type: ignore[attr-defined]  # noqa: B018
