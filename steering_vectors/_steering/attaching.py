"""Attach changes to modules; one hook per module runs all of its changes."""

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

from steering_vectors._locks import locked
from steering_vectors._models import (
    INPUT,
    OUTPUT,
    Hook,
    activation_of,
    input_of,
    never_compiled,
    unmark,
    with_activation,
    with_input,
)
from steering_vectors._steering.change import Change

# Called with a steered module, the steered side of it, and the activation there before and after the steering.
Trace: TypeAlias = Callable[[nn.Module, str, Tensor, Tensor], None]
_traces: tuple[Trace, ...] = ()


class AttachedTrace:
    """A function that is called for each steering of a module; an attachment."""

    def __init__(self, trace: Trace) -> None:
        self._trace = never_compiled(trace)

    @property
    def is_attached(self) -> bool:
        return any(self._trace is other for other in _traces)

    @locked
    def attach(self) -> None:
        global _traces  # noqa: PLW0603  # compiled code depends on it, and is recompiled when it changes
        if not self.is_attached:
            _traces = (*_traces, self._trace)

    @locked
    def remove(self) -> None:
        global _traces  # noqa: PLW0603
        _traces = tuple(other for other in _traces if other is not self._trace)


class _Changes:
    """Changes of a module's output, or input, in the order in which they were entered, and the hook that makes them.

    An attribute of the module holds it, so that torch.compile sees that compiled code depends on it.
    """

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.all: tuple[Change, ...] = ()


class AttachedChange:
    """A change of a module's output or, at the place ``INPUT``, of its input; an attachment."""

    def __init__(self, module: nn.Module, change: Change, place: str = OUTPUT) -> None:
        self._module = weakref.ref(module)
        self._change = change
        self._place = place

    @property
    @locked
    def is_attached(self) -> bool:
        module = self._module()
        if module is None:
            return True
        changes: _Changes | None = module.__dict__.get(self._place)
        return changes is not None and self._change in changes.all and changes.hook.is_attached

    @locked
    def attach(self) -> None:
        module = self._module()
        if module is None:
            return
        changes = module.__dict__.get(self._place)
        if changes is None or not changes.hook.is_attached:  # other code may have removed the hook
            changes = module.__dict__[self._place] = _Changes(_hook_of(module, self._place))
            changes.hook.attach()
        if self._change not in changes.all:
            changes.all = (*changes.all, self._change)

    @locked
    def remove(self) -> None:
        module = self._module()
        if module is None:
            return
        changes = module.__dict__.get(self._place)
        if changes is not None:
            changes.all = tuple(change for change in changes.all if change is not self._change)
            if not changes.all:
                changes.hook.remove()
                del module.__dict__[self._place]
        unmark(module)


def changes_of(module: nn.Module, place: str = OUTPUT) -> tuple[Change, ...]:
    """Return the changes of the module's output, or input, in the order in which they were entered."""
    changes: _Changes | None = module.__dict__.get(place)
    return () if changes is None else changes.all


def _hook_of(module: nn.Module, place: str) -> Hook:
    if place == INPUT:
        return Hook(module, _steer_input, before=True, first=True, traceable=True)
    return Hook(module, _steer, first=True, traceable=True)  # first, so that other hooks see what is steered


def _steer(module: nn.Module, _args: Any, output: Any) -> Any:
    activation = steered = activation_of(output)
    for change in changes_of(module):
        steered = change(steered)
    for trace in _traces:
        trace(module, OUTPUT, activation, steered)
    return output if steered is activation else with_activation(output, steered)


def _steer_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    activation = steered = input_of(args, kwargs)
    for change in changes_of(module, INPUT):
        steered = change(steered)
    for trace in _traces:
        trace(module, INPUT, activation, steered)
    return None if steered is activation else with_input(args, kwargs, steered)
