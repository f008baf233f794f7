"""Read or replace a module's output; attach all hooks or none."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor


class Removable(Protocol):
    """What takes a hook off again; a second call does nothing."""

    def remove(self) -> None: ...


def activation_of(output: Any) -> Tensor:
    """The activation in a module's output: itself, the first of a tuple or list, or the first tensor of a ModelOutput.

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
    """A copy of ``output`` with ``activation`` in its place; ``output`` is not changed."""
    if isinstance(output, tuple) and hasattr(output, "_replace"):  # a named tuple
        return output._replace(**{output._fields[0]: with_activation(output[0], activation)})  # type: ignore[attr-defined]
    if isinstance(output, (tuple, list)):
        return type(output)([with_activation(output[0], activation), *output[1:]])
    if isinstance(output, Mapping):
        replaced = copy.copy(output)
        replaced[_activation_key(output)] = activation  # type: ignore[index]
        return replaced
    return activation


def attach_all(registrations: Iterable[Callable[[], Removable]]) -> list[Removable]:
    """Run all ``registrations``; if one raises, what the earlier ones attached is removed."""
    handles: list[Removable] = []
    try:
        for register in registrations:
            handles.append(register())
    except BaseException:
        remove_all(handles)
        raise
    return handles


def remove_all(handles: Iterable[Removable]) -> None:
    for handle in handles:
        handle.remove()


def _activation_key(output: Mapping[str, Any]) -> str:
    key = next((key for key, value in output.items() if isinstance(value, Tensor)), None)
    if key is None:
        raise TypeError(
            f"a layer's output must be a tensor or begin with one, got {type(output).__name__} without tensors"
        )
    return key
