"""Assign the parts that gradient checkpointing reruns to the pass that ran them first."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from steering_vectors._locks import locked
from steering_vectors._models import Wrapper, every_module, mark, unmark

Pass = TypeVar("Pass")

# Hugging Face's models keep here the function that runs a part of a pass, and reruns it in the backward pass.
_FUNCTION = "_gradient_checkpointing_func"


class Tracker(Protocol[Pass]):
    """A tracker that knows the pass a thread is in, and can put a thread back into an earlier pass."""

    is_traceable: bool

    @property
    def current(self) -> Pass | None: ...

    def resumed(self, earlier: Pass | None) -> AbstractContextManager[None]: ...


def checkpoint_attachments(model: nn.Module, tracker: Tracker[Any]) -> Iterator["_Attached"]:
    """Yield an attachment of the tracker to each module that reruns parts of a pass."""
    for module in every_module(model):
        if _FUNCTION in vars(module):
            yield _Attached(module, tracker)


class _Checkpoints(Wrapper):
    """A module's checkpointing function, which reruns each part in the pass that ran it first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.trackers: tuple[Tracker[Any], ...] = ()

    def __call__(self, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and all(tracker.is_traceable for tracker in self.trackers):
            return self.function(part, *args, **kwargs)
        passes = [(tracker, tracker.current) for tracker in self.trackers]
        for _, current in passes:
            if current is not None:
                current.will_rerun = True

        def run(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for tracker, current in passes:
                    stack.enter_context(tracker.resumed(current))
                return part(*args, **kwargs)

        return self.function(run, *args, **kwargs)


class _Attached:
    """A tracker attached to a module's checkpointing function."""

    def __init__(self, module: nn.Module, tracker: Tracker[Any]) -> None:
        self._module = weakref.ref(module)
        self._tracker = tracker

    @property
    def is_attached(self) -> bool:
        function = self._function()
        return isinstance(function, _Checkpoints) and self._tracker in function.trackers

    @locked
    def attach(self) -> None:
        module, function = self._module(), self._function()
        if module is None or function is None or self.is_attached:
            return
        if not isinstance(function, _Checkpoints):
            mark(module)
            function = _Checkpoints(function)
            setattr(module, _FUNCTION, function)
        function.trackers = (*function.trackers, self._tracker)

    @locked
    def remove(self) -> None:
        module, function = self._module(), self._function()
        if module is None:
            return
        if isinstance(function, _Checkpoints):  # other code may have replaced it
            function.trackers = tuple(tracker for tracker in function.trackers if tracker is not self._tracker)
            if not function.trackers:
                setattr(module, _FUNCTION, function.function)
        unmark(module)

    def _function(self) -> Callable[..., Any] | None:
        module = self._module()
        return None if module is None else vars(module).get(_FUNCTION)
