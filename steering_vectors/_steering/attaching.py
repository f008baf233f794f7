"""Attach changes to modules: one hook a module runs all of its changes."""

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

# The attributes of a steered module, by what of it is steered.
OUTPUT, INPUT = "_steering_vectors", "_steering_vectors_input"
_LOCK = threading.Lock()

# Called with each steered module, and its activation before and after.
Trace: TypeAlias = Callable[[nn.Module, Tensor, Tensor], None]
_traces: tuple[Trace, ...] = ()


@contextmanager
def traced(trace: Trace) -> Iterator[None]:
    """Call ``trace`` in the block with each steering of a module's output."""
    global _traces  # noqa: PLW0603  # compiled code looks at it, and is made anew
    own = never_compiled(trace)
    with _LOCK:
        _traces = (*_traces, own)
    try:
        yield
    finally:
        with _LOCK:
            _traces = tuple(other for other in _traces if other is not own)


class _Steered:
    """The changes of a module's output, or input, in the order in which they were entered.

    It stands on the module itself, where torch.compile sees what compiled code depends on.
    """

    def __init__(self, module: nn.Module, place: str, original: "_Steered | None") -> None:
        self.module = weakref.ref(module)
        self.original = original  # what steers the module that this one is a copy of
        self.changes: tuple[Change, ...] = ()
        # A copy of a steered module has the hook. It comes first, so that whoever captures the output later sees what
        # was steered.
        self.hook: Removable | None = None
        if place == OUTPUT and _steer not in module._forward_hooks.values():
            self.hook = after_forward(module, _steer, first=True, traceable=True)
        if place == INPUT and _steer_input not in module._forward_pre_hooks.values():
            self.hook = before_forward(module, _steer_input, traceable=True)

    def __deepcopy__(self, _memo: Any) -> "_Steered":
        return self  # a copy of the model is steered no longer than the model


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
    """An attached change; to remove the last one removes the module's hook."""

    steered: _Steered  # which copies of the module share, and may outlive it by
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
    """Make the change to the module's output, or at the place ``INPUT`` to its input, from now on."""
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
