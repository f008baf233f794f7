"""Attach changes to modules; one hook per module runs all of its changes."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from steering_vectors._models import (
    Removable,
    activation_of,
    after_forward,
    before_forward,
    input_of,
    never_compiled,
    unless_removed,
    with_activation,
    with_input,
)
from steering_vectors._steering.change import Change

# Attributes of a steered module that hold the changes of its output, and of its input.
OUTPUT, INPUT = "_steering_vectors", "_steering_vectors_input"
_LOCK = threading.Lock()

# Called with a steered module, and with its activation before and after the steering.
Trace: TypeAlias = Callable[[nn.Module, Tensor, Tensor], None]
_traces: tuple[Trace, ...] = ()


@contextmanager
def traced(trace: Trace) -> Iterator[None]:
    """Call ``trace`` for each steering of a module's output inside the block."""
    global _traces  # noqa: PLW0603  # compiled code depends on it, and is recompiled when it changes
    uncompiled = never_compiled(trace)
    with _LOCK:
        _traces = (*_traces, uncompiled)
    try:
        yield
    finally:
        with _LOCK:
            _traces = tuple(other for other in _traces if other is not uncompiled)


class _Steered:
    """Changes of a module's output, or input, in the order in which they were entered.

    An attribute of the module holds it, so that torch.compile sees that compiled code depends on it.
    """

    def __init__(self, module: nn.Module, place: str, original: "_Steered | None") -> None:
        self.module = weakref.ref(module)
        self.original = original  # the changes of the module that this one was copied from
        self.changes: tuple[Change, ...] = ()
        # A copy of a steered module has the hook already. The hook comes first, so that later hooks see the steered
        # output.
        self.hook: Removable | None = None
        if place == OUTPUT and _steer not in module._forward_hooks.values():
            self.hook = after_forward(module, _steer, first=True, traceable=True)
        if place == INPUT and _steer_input not in module._forward_pre_hooks.values():
            self.hook = before_forward(module, _steer_input, traceable=True)

    def __deepcopy__(self, _memo: Any) -> "_Steered":
        return self  # shared, so that a copy of the model is steered only as long as the model


def _steer(module: nn.Module, _args: Any, output: Any) -> Any:
    activation = steered = activation_of(output)
    for change in changes_of(module):
        steered = change(steered)
    for trace in _traces:
        trace(module, activation, steered)
    return output if steered is activation else with_activation(output, steered)


@unless_removed
def _steer_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    activation = input_of(args, kwargs)
    for change in changes_of(module, INPUT):
        activation = change(activation)
    return with_input(args, kwargs, activation)


@dataclass(frozen=True, eq=False)
class _AttachedChange:
    """An attached change. Removing a module's last change removes the module's hook."""

    steered: _Steered  # copies of the module share it, and may outlive the module
    place: str
    change: Change

    def remove(self) -> None:
        with _LOCK:
            steered = self.steered
            steered.changes = tuple(change for change in steered.changes if change is not self.change)
            module = steered.module()
            if steered.changes or module is None or module.__dict__.get(self.place) is not steered:
                return
            if steered.hook is not None:
                steered.hook.remove()
            del module.__dict__[self.place]
            if steered.original is not None:
                module.__dict__[self.place] = steered.original


def attach_change(module: nn.Module, change: Change, place: str = OUTPUT) -> _AttachedChange:
    """Apply the change to the module's output from now on or, at the place ``INPUT``, to its input."""
    with _LOCK:
        steered = module.__dict__.get(place)
        if steered is None or steered.module() is not module:
            steered = module.__dict__[place] = _Steered(module, place, original=steered)
        steered.changes = (*steered.changes, change)
    return _AttachedChange(steered, place, change)


def changes_of(module: nn.Module, place: str = OUTPUT) -> tuple[Change, ...]:
    """Return the changes of the module's output, or input, in the order in which they were entered."""
    steered: _Steered | None = module.__dict__.get(place)
    if steered is None:
        return ()
    return steered.changes if steered.original is None else (*steered.original.changes, *steered.changes)
