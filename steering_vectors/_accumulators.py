"""Bring the rows of both sides together, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from steering_vectors._arguments import check_takes
from steering_vectors._extraction import LayerRows, by_side
from steering_vectors._precision import wide, without_autocast
from steering_vectors._vectors import of_norms
from steering_vectors.aggregators import Accumulator, Aggregator, accumulator_for, as_direction, as_set_aggregator
from steering_vectors.layer_matching import LayerType


class Accumulators:
    """An accumulator for each layer, with the width of its rows."""

    def __init__(self, aggregator: Aggregator, *, paired: bool, on_cpu: bool = False) -> None:
        """Check the aggregator.

        Raises TypeError if it can't be called with two arguments, and ValueError if it needs pairs and gets sets.
        """
        check_takes(aggregator, 2, "aggregator", "mean_aggregator()")
        if not paired:
            as_set_aggregator(aggregator)
        self._aggregator = aggregator
        self._paired = paired
        self._on_cpu = on_cpu
        self._by_layer: dict[int, tuple[int, Accumulator]] = {}
        self._norms: dict[int, list[Tensor]] = {}  # of the rows, by layer

    def add(self, parts: Iterable[LayerRows]) -> None:
        for part in parts:  # the model runs in between
            self._add(part)

    @without_autocast
    def _add(self, part: LayerRows) -> None:
        rows = part.rows.to("cpu" if self._on_cpu else part.rows.device)
        rows = wide(rows)
        accumulator = self._at(part.layer, rows.shape[-1])
        self._norms.setdefault(part.layer, []).append(rows.norm(dim=-1))
        for side, indices, samples in by_side(part):
            accumulator.add(rows[indices], side, samples)

    def merge(self, other: Accumulators) -> None:
        for layer, (hidden, accumulator) in other._by_layer.items():
            self._at(layer, hidden).merge(accumulator)
            self._norms.setdefault(layer, []).extend(other._norms[layer])

    @without_autocast
    def directions(self) -> dict[int, Tensor]:
        return {
            layer: as_direction(self._aggregator, accumulator.direction(), hidden)
            for layer, (hidden, accumulator) in sorted(self._by_layer.items())
        }

    def norms_of_stream(self, layer_type: LayerType, site: str) -> dict[str, str]:
        """Return the metadata entry for the median norm of the rows of each block; none for other modules."""
        if layer_type != "decoder_block" or site:
            return {}
        return of_norms({layer: float(torch.cat(norms).median()) for layer, norms in self._norms.items()})

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_aggregator": None}  # it may be impossible to send, and the other process has one

    def _at(self, layer: int, hidden: int) -> Accumulator:
        if layer not in self._by_layer:
            self._by_layer[layer] = (hidden, accumulator_for(self._aggregator, hidden, paired=self._paired))
        return self._by_layer[layer][1]


def merged_accumulators(merged: Accumulators, parts: Sequence[Accumulators]) -> Accumulators:
    """Return the accumulators of all processes' rows, which are added to the empty ones of ``merged``."""
    if len(parts) == 1:
        return parts[0]
    for part in parts:  # in the same order in each process
        merged.merge(part)
    return merged


def rows_of_both(
    layer: int, positive: Sequence[Tensor] | Tensor, negative: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Return the rows of both sides, and True if they are pairs. Raises ValueError unless the sides fit together."""
    if not len(positive) or not len(negative):
        raise ValueError(f"layer {layer} has no rows: give at least one positive and one negative row")
    are_tensors = [isinstance(side, Tensor) for side in (positive, negative)]
    if are_tensors[0] != are_tensors[1]:
        raise ValueError(
            f"layer {layer} has a list on one side and a tensor on the other: give two lists of tensors for pairs, or "
            f"two tensors for sets"
        )
    paired = not all(are_tensors)
    parts = [*positive, *negative] if paired else [positive, negative]
    if not all(isinstance(part, Tensor) and part.ndim == 2 for part in parts):
        raise ValueError(f"layer {layer}: each side must have a list of tensors (n, hidden), or one such tensor")
    sides = [side if isinstance(side, Tensor) else torch.cat(list(side)) for side in (positive, negative)]
    shapes = " and ".join(str(tuple(side.shape)) for side in sides)
    if paired and sides[0].shape != sides[1].shape:
        raise ValueError(
            f"layer {layer}: sides must have one shape, got {shapes}: lists of tensors are pairs; for two sets, give "
            f"one tensor each"
        )
    if sides[0].shape[1] != sides[1].shape[1]:
        raise ValueError(f"layer {layer}: rows of both sides must have one width, got {shapes}")
    return sides[0], sides[1], paired
