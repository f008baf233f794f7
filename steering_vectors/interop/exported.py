"""Directions as files of other projects hold them: of decoder blocks, numbered from 0."""

from __future__ import annotations

from torch import Tensor

from steering_vectors._arguments import finite_number
from steering_vectors._vectors import checked_directions
from steering_vectors.steering_vector import SteeringVector


def exported(vector: SteeringVector, multiplier: float, reader: str) -> dict[int, Tensor]:
    """Return the directions ``(hidden,)`` times ``multiplier``, on the CPU in float32, by layer number from 0.

    They are multiplied in float64. ``reader`` names in errors who would read them.

    Raises TypeError for anything but a vector and a number. Raises ValueError if the vector has no directions, is not
    of decoder blocks, or has negative layers while its metadata don't record the model's depth, and if a number is too
    large for float32.
    """
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"expected a SteeringVector, got {type(vector).__name__}")
    factor = finite_number(multiplier, "multiplier")
    if vector.layer_type != "decoder_block" or vector.metadata.get("layer_config"):
        place = vector.metadata.get("layer_config") or vector.layer_type
        raise ValueError(f"{reader} steers the outputs of decoder blocks, but this vector is of {place}")
    directions = checked_directions(vector.layer_activations)
    if not directions:
        raise ValueError("this steering vector has no directions: there is nothing to write")
    found: dict[int, Tensor] = {}
    for layer, direction in directions.items():
        number = _from_start(layer, blocks_of(vector))
        if number in found:
            raise ValueError(f"two of the vector's layers are layer {number} of the model: keep only one of them")
        found[number] = in_float32(direction, factor, number)
    return dict(sorted(found.items()))


def in_float32(direction: Tensor, factor: float, layer: int) -> Tensor:
    """Return a layer's direction ``(hidden,)`` times a factor. Raises ValueError if it is too large for float32."""
    rounded = (direction.detach().cpu().double().reshape(-1) * factor).float()
    if not bool(rounded.isfinite().all()):
        raise ValueError(f"the direction of layer {layer}, times {factor:g}, has numbers too large for float32")
    return rounded


def only_one(directions: dict[int, Tensor], reader: str) -> tuple[int, Tensor]:
    """Return the layer and the direction of a vector with one. Raises ValueError if there are several."""
    if len(directions) > 1:
        layers = list(directions)
        raise ValueError(f"{reader} reads one direction, but the vector has layers {layers}: write vector[{layers[0]}]")
    return next(iter(directions.items()))


def blocks_of(vector: SteeringVector) -> int | None:
    """Return the number of blocks of the vector's model, None if the metadata don't record it."""
    recorded = vector.metadata.get("layers_of_model", "")
    return int(recorded) if recorded.isdecimal() else None


def _from_start(layer: int, blocks: int | None) -> int:
    if layer < 0 and blocks is None:
        raise ValueError(
            f"layer {layer} counts from the model's end, but the metadata don't record its depth: number layers from 0"
        )
    number = layer + (blocks or 0) if layer < 0 else layer
    if blocks is not None and not 0 <= number < blocks:
        raise ValueError(f"the vector has layer {layer}, but its model has {blocks} layers (0 to {blocks - 1})")
    return number
