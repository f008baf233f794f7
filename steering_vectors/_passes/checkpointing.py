"""Assign the parts that gradient checkpointing reruns to the pass that ran them first."""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from torch import nn

from steering_vectors._models import Removable, every_module

Pass = TypeVar("Pass")

# Hugging Face's models keep here the function that runs a part of a pass, and reruns it in the backward pass.
_FUNCTION = "_gradient_checkpointing_func"
_LOCK = threading.Lock()


class Tracker(Protocol[Pass]):
    """A tracker that knows the pass a thread is in, and can put a thread back into an earlier pass."""

    @property
    def current(self) -> Pass | None: ...

    def resumed(self, earlier: Pass | None) -> AbstractContextManager[None]: ...


def checkpoint_registrations(model: nn.Module, tracker: Tracker[Any]) -> Iterator[Callable[[], Removable]]:
    """Yield one call for each module that reruns parts of a pass; the call attaches the tracker to it."""
    for module in every_module(model):
        if _FUNCTION in vars(module):
            yield partial(_attach, module, tracker)


class _Checkpoints:
    """A module's checkpointing function, which reruns each part in the pass that ran it first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.trackers: tuple[Tracker[Any], ...] = ()

    def __call__(self, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        passes = [(tracker, tracker.current) for tracker in self.trackers]

        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for tracker, current in passes:
                    stack.enter_context(tracker.resumed(current))
                return part(*args, **kwargs)

        return self.function(run, *args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.function, memo)  # a copied model is not steered for long, so it needs no trackers


@dataclass(frozen=True, eq=False)
class _Attached:
    module: "weakref.ref[nn.Module]"
    tracker: Tracker[Any]

    def remove(self) -> None:
        with _LOCK:
            module = self.module()
            function = None if module is None else vars(module).get(_FUNCTION)
            if module is None or not isinstance(function, _Checkpoints):  # other code has replaced it
                return
            function.trackers = tuple(tracker for tracker in function.trackers if tracker is not self.tracker)
            if not function.trackers:
                setattr(module, _FUNCTION, function.function)


def _attach(module: nn.Module, tracker: Tracker[Any]) -> _Attached:
    with _LOCK:
        function = vars(module)[_FUNCTION]
        if not isinstance(function, _Checkpoints):
            function = _Checkpoints(function)
            setattr(module, _FUNCTION, function)
        function.trackers = (*function.trackers, tracker)
    return _Attached(weakref.ref(module), tracker)
