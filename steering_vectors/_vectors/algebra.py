"""Arithmetic of directions by layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Directions: TypeAlias = Mapping[int, Tensor]


def united(some: Directions, other: Directions, combine: Callable[[Tensor, Tensor], Tensor]) -> dict[int, Tensor]:
    """``combine`` of the two at each layer that either has; where one has none, it counts as zeros."""
    found = {}
    for layer in sorted({*some, *other}):
        own, others = some.get(layer), other.get(layer)
        if own is None:
            assert others is not None
            own = torch.zeros_like(others)
        found[layer] = combine(_flat(own), torch.zeros_like(_flat(own)) if others is None else _flat(others))
    return found


def are_equal(some: Directions, other: Directions) -> bool:
    """Say whether layers, numbers, dtypes and shapes are the same; devices may differ."""
    return some.keys() == other.keys() and all(
        some[layer].dtype == other[layer].dtype
        and some[layer].shape == other[layer].shape
        and torch.equal(some[layer].cpu(), other[layer].cpu())
        for layer in some
    )


def norms(directions: Directions) -> dict[int, float]:
    """Euclidean norms, by layer, ascending."""
    return {layer: float(_exact(directions[layer].detach()).norm()) for layer in sorted(directions)}


def cosines(some: Directions, other: Directions) -> dict[int, float]:
    """By layer, where both have one; NaN where one of them is zero."""
    found = {}
    for layer in sorted(some.keys() & other.keys()):
        own, others = (_exact(directions[layer].detach()) for directions in (some, other))
        found[layer] = float(own @ others / (own.norm() * others.norm()))
    return found


def orthogonal(some: Directions, other: Directions) -> dict[int, Tensor]:
    """``some`` without their parts along the ``other`` at the same layers; where there is none, as they are."""
    return {layer: _without(_flat(own), other.get(layer)) for layer, own in some.items()}


def projections(directions: Directions, activations: Mapping[int, Tensor | Sequence[Tensor]]) -> dict[int, Any]:
    """``h·u``, with the direction at norm 1, of each activation at each layer that both have."""
    if not isinstance(activations, Mapping):
        raise TypeError(f"activations must map layers to tensors or lists of them, got {type(activations).__name__}")
    found: dict[int, Any] = {}
    for layer in sorted(directions.keys() & activations.keys()):
        of_layer, direction = activations[layer], _flat(directions[layer])
        if not bool(direction.detach().any()):
            raise ValueError(f"the direction of layer {layer} is zero, and nothing goes along it")
        if isinstance(of_layer, Tensor):
            found[layer] = _along(of_layer, direction, layer)
        else:
            found[layer] = [_along(part, direction, layer) for part in of_layer]
    return found


def _along(activation: Tensor, direction: Tensor, layer: int) -> Tensor:
    if activation.shape[-1:] != direction.shape:
        widths = f"{activation.shape[-1] if activation.ndim else 0} numbers, the directions {len(direction)}"
        raise ValueError(f"the activations of layer {layer} have {widths}")
    wide = activation.to(torch.promote_types(activation.dtype, torch.float32))
    own = _exact(direction)
    along: Tensor = wide @ (own / own.norm()).to(wide)
    return along


def _without(own: Tensor, other: Tensor | None) -> Tensor:
    if other is None or not bool(other.detach().any()):
        return own.clone()
    wide, others = _exact(own), _exact(other)
    return (wide - (wide @ others) / (others @ others) * others).to(own)


def _flat(direction: Tensor) -> Tensor:
    return direction.reshape(-1)


def _exact(direction: Tensor) -> Tensor:
    """``(hidden,)`` in float64, on the CPU: some devices have no float64."""
    return _flat(direction).cpu().double()
