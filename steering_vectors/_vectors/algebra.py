"""Arithmetic on directions by layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steering_vectors._precision import wide

Directions: TypeAlias = Mapping[int, Tensor]


def united(some: Directions, other: Directions, combine: Callable[[Tensor, Tensor], Tensor]) -> dict[int, Tensor]:
    """Combine directions at each layer that either mapping has; a missing direction counts as zeros."""
    found = {}
    for layer in sorted({*some, *other}):
        first, second = some.get(layer), other.get(layer)
        if first is None:
            assert second is not None
            first = torch.zeros_like(second)
        found[layer] = combine(_flat(first), torch.zeros_like(_flat(first)) if second is None else _flat(second))
    return found


def are_equal(some: Directions, other: Directions) -> bool:
    """Return True if layers, values, dtypes and shapes are equal; devices may differ."""
    return some.keys() == other.keys() and all(
        some[layer].dtype == other[layer].dtype
        and some[layer].shape == other[layer].shape
        and torch.equal(some[layer].cpu(), other[layer].cpu())
        for layer in some
    )


def norms(directions: Directions) -> dict[int, float]:
    """Return the Euclidean norms by layer, in ascending order of layers."""
    return {layer: float(_exact(directions[layer].detach()).norm()) for layer in sorted(directions)}


def cosines(some: Directions, other: Directions) -> dict[int, float]:
    """Return the cosines by layer, for the layers that both have; NaN where a direction is all zeros."""
    found = {}
    for layer in sorted(some.keys() & other.keys()):
        first, second = (_exact(directions[layer].detach()) for directions in (some, other))
        found[layer] = float(first @ second / (first.norm() * second.norm()))
    return found


def orthogonal(some: Directions, other: Directions) -> dict[int, Tensor]:
    """Remove from each direction its part along the other direction of that layer, if there is one."""
    return {layer: _without(_flat(direction), other.get(layer)) for layer, direction in some.items()}


def projections(directions: Directions, activations: Mapping[int, Tensor | Sequence[Tensor]]) -> dict[int, Any]:
    """Project activations on the directions at norm 1, ``h·u``, for the layers that both have."""
    if not isinstance(activations, Mapping):
        raise TypeError(f"activations must map layers to tensors or lists of them, got {type(activations).__name__}")
    found: dict[int, Any] = {}
    for layer in sorted(directions.keys() & activations.keys()):
        of_layer, direction = activations[layer], _flat(directions[layer])
        if not bool(direction.detach().any()):
            raise ValueError(f"the direction of layer {layer} is all zeros, so it can't be projected on: leave it out")
        if isinstance(of_layer, Tensor):
            found[layer] = _along(of_layer, direction, layer)
        else:
            found[layer] = [_along(part, direction, layer) for part in of_layer]
    return found


def span_of(rows: Tensor) -> Tensor:
    """Return directions ``(rank, hidden)`` of norm 1, at right angles to each other, with the span of ``rows``.

    A row that is a combination of others, to the rounding of its dtype, adds nothing; nor does a row of zeros.
    """
    exact = rows.detach().cpu().double()
    norms = exact.norm(dim=1, keepdim=True)
    units = (exact / torch.where(norms > 0, norms, 1))[norms.flatten() > 0]
    sizes, basis = torch.linalg.svd(units, full_matrices=False)[1:]
    rounding = 2 * len(rows) ** 0.5 * torch.finfo(rows.dtype).eps
    kept: Tensor = basis[sizes > rounding].to(rows.device, wide(rows[:0]).dtype)
    return kept


def _along(activation: Tensor, direction: Tensor, layer: int) -> Tensor:
    if activation.shape[-1:] != direction.shape:
        width = activation.shape[-1] if activation.ndim else 0
        raise ValueError(f"the activations of layer {layer} have width {width}, but its direction has {len(direction)}")
    rows, exact = wide(activation), _exact(direction)
    unit = (exact / exact.norm()).to(rows)
    along: Tensor = (rows * unit).sum(dim=-1)  # autocast and TF32 would round a matrix product
    return along


def _without(direction: Tensor, other: Tensor | None) -> Tensor:
    if other is None or not bool(other.detach().any()):
        return direction.clone()
    exact, along = _exact(direction), _exact(other)
    return (exact - (exact @ along) / (along @ along) * along).to(direction)


def _flat(direction: Tensor) -> Tensor:
    return direction.reshape(-1)


def _exact(direction: Tensor) -> Tensor:
    """Return a direction as ``(hidden,)`` in float64, on the CPU because some devices have no float64."""
    return _flat(direction).cpu().double()
