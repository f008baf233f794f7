"""Steering vectors from values at hand: tensors, arrays, and features of sparse autoencoders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._arguments import is_whole_number
from steering_vectors.layer_matching import LayerType
from steering_vectors.steering_vector import SteeringVector


def from_tensors(tensors: Any, *, layer: int | None = None, layer_type: LayerType = "decoder_block") -> SteeringVector:
    """Make a steering vector from tensors, arrays or lists.

    Tensors are kept as they are, and arrays and lists are converted to tensors.

    Args:
        tensors: One of three forms. One direction ``(hidden,)`` needs its ``layer``. A tensor
            ``(layers, hidden)`` or a sequence of directions has layer l in row l. A mapping has
            directions by layer number; its keys may be strings such as ``"12"`` or ``"layers.12"``.
        layer: The layer of a single direction.
        layer_type: The kind of activation that the directions change.

    Raises:
        TypeError: As in :class:`~steering_vectors.SteeringVector`.
        ValueError: As there, and if ``layer`` is missing for one direction or given for several, or
            if a name doesn't have exactly one number.

    >>> from_tensors(torch.ones(4), layer=12).layers
    [12]
    >>> from_tensors({"layers.3": torch.ones(4)}).layers
    [3]
    """
    if isinstance(tensors, Mapping):
        directions = {_number(name): direction for name, direction in tensors.items()}
        if len(directions) < len(tensors):
            raise ValueError(
                f"each layer may have one direction, but some of these keys name the same layer: {list(tensors)}"
            )
    else:
        rows = _rows(tensors)
        is_one = (isinstance(rows, Tensor) and rows.ndim == 1) or (isinstance(rows, list) and _is_number(rows[:1]))
        if is_one and layer is None:
            raise ValueError("one direction needs its layer: write from_tensors(direction, layer=12)")
        if len(rows) == 0:
            raise ValueError("tensors is empty: give at least one direction")
        directions = {layer: rows} if is_one and layer is not None else dict(enumerate(rows))
        layer = None if is_one else layer
    if layer is not None:
        raise ValueError(
            "layer is only for one direction: the layers of several are their keys or positions, so leave it out"
        )
    return SteeringVector(directions, layer_type)


def from_sae(sae: Any, feature: int, *, layer: int, layer_type: LayerType = "decoder_block") -> SteeringVector:
    """Make a steering vector from a feature of a sparse autoencoder: its row of the decoder weight.

    Args:
        sae: An object with a decoder weight, or the weight ``(features, hidden)`` itself. The
            object has an attribute ``W_dec`` ``(features, hidden)``, or a linear layer ``decoder``,
            whose weight is ``(hidden, features)``.
        feature: The feature's number, from 0.
        layer: The block on whose output the autoencoder was trained. It is 8 for
            ``blocks.8.hook_resid_post``, and 7 for ``blocks.8.hook_resid_pre``, which is the input
            of block 8.
        layer_type: The kind of activation on which the autoencoder was trained.

    Raises:
        TypeError: If there is no decoder weight.
        ValueError: If the autoencoder doesn't have the feature.

    >>> from_sae(torch.eye(4), 2, layer=7).layer_activations
    {7: tensor([0., 0., 1., 0.])}
    """
    rows = _decoder_rows(sae)
    if not is_whole_number(feature) or not 0 <= feature < rows.shape[0]:
        raise ValueError(f"feature must be a whole number from 0 to {len(rows) - 1}, got {feature!r}")
    return SteeringVector({layer: rows[feature].detach().clone()}, layer_type)


def _decoder_rows(sae: Any) -> Tensor:
    """Return the decoder weight as ``(features, hidden)``."""
    weight = sae if isinstance(sae, Tensor) else getattr(sae, "W_dec", None)
    decoder = getattr(sae, "decoder", None)
    if weight is None and isinstance(decoder, nn.Linear):
        weight = decoder.weight.T
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise TypeError(
            f"sae must be an autoencoder with W_dec (features, hidden) or a linear decoder, or the weight (features, "
            f"hidden) itself, got {shown(sae)}"
        )
    return weight


def _rows(tensors: Any) -> Any:
    """Return a sequence of directions, or the numbers of one."""
    if isinstance(tensors, Sequence) and not isinstance(tensors, str):
        return list(tensors)
    try:
        rows = tensors if isinstance(tensors, Tensor) else torch.as_tensor(tensors, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"tensors must be a tensor, a sequence or a mapping, got {shown(tensors)}") from error
    if not isinstance(tensors, Tensor) and not rows.is_floating_point():
        rows = rows.to(torch.get_default_dtype())
    if rows.ndim == 0:
        raise TypeError("tensors must be one or more directions, got a single number")
    return rows


def _number(name: Any) -> int:
    """Return the layer of a name: a number, or a text with exactly one number in it."""
    if is_whole_number(name):
        return int(name)
    numbers = [part for part in re.split("[._]", str(name)) if re.fullmatch("-?[0-9]{1,9}", part)]
    if len(numbers) != 1:
        raise ValueError(f"a layer's key must have exactly one number, such as 12 or 'layers.12', got {name!r}")
    return int(numbers[0])


def _is_number(first: Sequence[Any]) -> bool:
    return bool(first) and not isinstance(first[0], (Sequence, Mapping)) and getattr(first[0], "ndim", 0) == 0


def shown(value: Any) -> str:
    """Return a few words on a value that doesn't fit, for an error."""
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
