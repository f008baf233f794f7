"""Checks of directions and of their layer numbers.

Directions are tensors ``(hidden,)`` of finite real numbers, all of one width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steering_vectors._arguments import finite_number, is_whole_number

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked_directions(layer_activations: object) -> dict[int, Tensor]:
    """Check directions and return them in a new dictionary. Raises as :class:`SteeringVector`."""
    if not isinstance(layer_activations, Mapping):
        raise TypeError(
            f"layer_activations must map layer numbers to directions, got {type(layer_activations).__name__}"
        )
    directions = {
        layer_number(layer): checked_direction(value, f"the direction of layer {layer}")
        for layer, value in layer_activations.items()
    }
    widths = {direction.shape[-1] for direction in directions.values()}
    if len(widths) > 1:
        raise ValueError(f"all directions must have the same width, got {sorted(widths)}")
    return directions


def layer_number(layer: Any) -> int:
    if not is_whole_number(layer):
        raise TypeError(f"a layer number must be a whole number, got {layer!r}")
    return int(layer)


def checked_direction(value: Any, name: str) -> Tensor:
    try:
        direction = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor of numbers, got {value!r}") from error
    if not isinstance(value, Tensor) and not direction.is_floating_point() and not direction.is_complex():
        direction = direction.to(torch.get_default_dtype())
    if direction.dtype not in _DTYPES:
        raise TypeError(f"{name} must hold real numbers of 16, 32 or 64 bits, got {direction.dtype}")
    if direction.ndim not in (1, 2) or (direction.ndim == 2 and direction.shape[0] != 1) or direction.numel() == 0:
        raise ValueError(f"{name} must have the shape (hidden,) or (1, hidden), got {tuple(direction.shape)}")
    # A finite sum takes one operation, and shows that all of the numbers are finite.
    if not math.isfinite(direction.detach().sum()) and not bool(direction.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite numbers")
    return direction


def checked_factor(value: Any, name: str) -> float | Tensor:
    """Return a factor on directions: a finite number or, if the value requires grad, a scalar tensor with its gradient.

    Raises TypeError unless the value is one number, and ValueError unless it is finite.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        finite_number(value.detach(), name)
        return value.reshape(())
    return finite_number(value, name)


def plain_number(factor: Any) -> float:
    """Return one number as a float, without its gradient."""
    return float(factor.detach() if isinstance(factor, Tensor) else factor)


def scaled(direction: Tensor, factor: float | Tensor) -> Tensor:
    """Return the product in the direction's dtype, on its device."""
    return (factor.to(direction.device) if isinstance(factor, Tensor) else factor) * direction


def asked_layers(layers: Sequence[int], asked: Any, *, depth: int | None) -> list[int]:
    """Return the layers asked for, each once. ``asked`` is a number, several numbers, or a slice.

    A slice means the numbers in it, without its stop. An open end means the lowest or the highest of ``layers``.
    Negative numbers that are not in ``layers`` count from the end of a model with ``depth`` blocks, if it is known.

    Raises TypeError for anything that is not a layer number, and LookupError for numbers that are not in ``layers``.
    """

    def from_end(layer: int) -> int:
        return layer + depth if depth is not None and layer < 0 and layer not in layers else layer

    if isinstance(asked, slice):
        start = min(layers, default=0) if asked.start is None else from_end(asked.start)
        stop = max(layers, default=-1) + 1 if asked.stop is None else from_end(asked.stop)
        wanted = list(range(start, stop, 1 if asked.step is None else asked.step))
    else:
        is_one = is_whole_number(asked) or isinstance(asked, (str, bytes)) or not isinstance(asked, Iterable)
        numbers = [asked] if is_one else list(asked)
        wanted = list(dict.fromkeys(from_end(layer_number(layer)) for layer in numbers))
    missing = [layer for layer in wanted if layer not in layers]
    if missing or not wanted:
        unknown = ", and the depth of its model, from whose end negative numbers count, is unknown"
        raise LookupError(
            f"this vector has no direction for layers {in_ranges(missing) if missing else asked}, only for "
            f"{in_ranges(layers)}{unknown if any(layer < 0 for layer in missing) else ''}"
        )
    return wanted


def in_ranges(layers: Iterable[int]) -> str:
    """Return layer numbers as a short text, with runs written as ``0-29``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"[{', '.join(parts)}]"
