"""Read or replace the activation among a module's arguments or in its output."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def activation_of(output: Any) -> Tensor:
    """Return the activation in a module's output.

    It is the output itself, the first item of a tuple or list, or the first tensor of a ModelOutput.
    Raises TypeError if there is none.
    """
    if isinstance(output, (tuple, list)) and output:
        return activation_of(output[0])
    if isinstance(output, Mapping):
        return activation_of(output[_activation_key(output)])
    if not isinstance(output, Tensor):
        raise TypeError(f"a layer's output must be a tensor or begin with one, got {type(output).__name__}")
    return output


def with_activation(output: Any, activation: Tensor) -> Any:
    """Return a copy of ``output`` with its activation replaced by ``activation``; ``output`` is not changed."""
    if isinstance(output, tuple) and hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: with_activation(output[0], activation)})  # type: ignore[attr-defined]
    if isinstance(output, (tuple, list)):
        return type(output)([with_activation(output[0], activation), *output[1:]])
    if isinstance(output, Mapping):
        replaced = copy.copy(output)
        replaced[_activation_key(output)] = activation  # type: ignore[index]
        return replaced
    return activation


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the activation among a module's arguments. Raises TypeError if there is none."""
    activation = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(activation, Tensor):
        raise TypeError(
            f"a module's first argument, or its hidden_states, must be a tensor, got {type(activation).__name__}"
        )
    return activation


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], activation: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with the module's input replaced by ``activation``."""
    return ((activation, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": activation})


def _activation_key(output: Mapping[str, Any]) -> str:
    key = next((key for key, value in output.items() if isinstance(value, Tensor)), None)
    if key is None:
        raise TypeError(
            f"a layer's output must be a tensor or begin with one, got {type(output).__name__} without tensors"
        )
    return key
