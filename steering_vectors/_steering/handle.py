"""Attach a steering to a model, and remove it by hand or by leaving a block."""

import inspect
import itertools
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import partial
from types import TracebackType
from typing import Any

from steering_vectors._models import attach_all, never_compiled, remove_all
from steering_vectors._passes import Need, PassTracker, this_thread
from steering_vectors._steering.attaching import attach_change
from steering_vectors._steering.change import Change
from steering_vectors._steering.plan import Steering
from steering_vectors._steering.selection import Selection
from steering_vectors.token_selection import may_need_prompt_length


class SteeringPatchHandle:
    """A steering that is attached to a model. :meth:`remove` removes it, and so does leaving a ``with`` block.

    ``layers`` lists the numbers of the steered layers. ``selector`` is None for all tokens. ``order`` grows with each
    handle that is made.

    >>> with vector.patch(model) as handle:
    ...     handle
    SteeringPatchHandle(layers=[1], multiplier=1.0, operator=addition_operator(), tokens=all)
    """

    def __init__(self, steering: Steering) -> None:
        """Attach all hooks or, if one can't be attached, none."""
        # Nothing here refers to the model: a steering that is never removed must not keep it in memory.
        self.layers = sorted(steering.directions)
        self.selector = steering.selector
        self.multiplier = steering.multiplier
        self.order = next(_ORDER)
        self._shown = repr(steering)
        self._thread = this_thread() if steering.this_thread_only else None
        self._lock = threading.Lock()
        self._tracker = PassTracker(_need_of(steering))
        self._selection = Selection(self._tracker, steering.selector, columns_first=steering.anatomy.columns_first)
        weights_for = None if steering.selector is None else never_compiled(self._selection.weights_for)
        applies = None if self._thread is None else never_compiled(self._is_of_own_thread)
        self._changes = [
            Change(
                owner=self,
                layer=layer,
                direction=steering.directions[layer],
                operator=steering.operator,
                multiplier=steering.multiplier,
                weights_for=weights_for,
                rows_along=self._selection.rows_along,
                applies=applies,
            )
            for layer, _, _ in steering.places
        ]
        attachments = (
            partial(attach_change, module, change, place)
            for change, (_, module, place) in zip(self._changes, steering.places, strict=True)
        )
        self._hooks = attach_all([*self._tracker.registrations(steering.anatomy.pass_modules), *attachments])

    def remove(self) -> None:
        """Remove the steering from the model; a second call does nothing.

        Warns with a RuntimeWarning if the model ran but some steered layer did not, or no token was selected. It does
        not warn while an exception is being handled.
        """
        self._detach(quiet=sys.exc_info()[0] is not None)

    def __enter__(self) -> "SteeringPatchHandle":
        """Return the handle. Raises RuntimeError if the steering was removed, since the block would run unsteered."""
        if not self._hooks:
            raise RuntimeError("this steering was removed from its model: make a new one with vector.patch(model)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._detach(quiet=kind is not None)

    def __repr__(self) -> str:
        return f"SteeringPatchHandle({self._shown}{'' if self._hooks else ', removed'})"

    def _detach(self, *, quiet: bool) -> None:
        with self._lock:
            hooks, self._hooks = self._hooks, []
        remove_all(reversed(hooks))  # the layers first: a pass that begins meanwhile finds its tracker
        if hooks and not quiet and self._tracker.completed:
            self._warn_of_nothing()

    def _warn_of_nothing(self) -> None:
        idle = sorted({change.layer for change in self._changes if not change.ran})
        if self._thread is not None and idle == self.layers:
            message = (
                f"the model ran, but not in the thread that attached this steering with this_thread_only=True: layers "
                f"{self.layers} were not steered; run the model in that thread, or leave out this_thread_only"
            )
        elif idle:
            message = f"the model ran, but of the steered layers {self.layers} these never did: {idle}"
        elif self._selection.was_empty:
            message = (
                f"the model ran, but {self.selector!r} selected none of its tokens: "
                f"layers {self.layers} were not steered"
            )
        else:
            return
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _is_of_own_thread(self) -> bool:
        """Return True if the current pass belongs to the thread that attached the steering."""
        current = self._tracker.current
        return (this_thread() if current is None else current.thread) is self._thread


def _need_of(steering: Steering) -> Need:
    """Return the facts about a pass that the steering needs."""
    selector = steering.selector
    if selector is not None:
        return Need.PROMPT_LENGTH if may_need_prompt_length(selector) else Need.POSITIONS
    if steering.this_thread_only:
        return Need.THREAD
    return Need.SHAPE if steering.multiplier.by_row else Need.PASSES


class SteeringContext(ContextDecorator):
    """A context manager that steers a model inside its block, or as a decorator inside a function.

    :meth:`SteeringVector.apply` and :func:`ablate_everywhere` return it.

    >>> vector.apply(model, multiplier=2.0)
    SteeringContext(layers=[1], multiplier=2.0, operator=addition_operator(), tokens=all)
    """

    def __init__(self, attach: Callable[[], SteeringPatchHandle], shown: str) -> None:
        self._attach = attach
        self._shown = shown
        self._handles: list[tuple[object, SteeringPatchHandle]] = []  # each with the thread that entered it

    def __enter__(self) -> None:
        self._handles.append((this_thread(), self._attach()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The last one that this thread entered, if any: a generator may be closed in another thread than it began in.
        entered = [n for n, (thread, _) in enumerate(self._handles) if thread is this_thread()]
        _, handle = self._handles.pop(entered[-1] if entered else -1)
        handle._detach(quiet=kind is not None)

    def __call__(self, function: Any) -> Any:
        """Decorate a function. Raises TypeError for a generator or a coroutine, which would run unsteered."""
        if any(kind(function) for kind in _DEFERRED):
            raise TypeError(
                f"{getattr(function, '__name__', function)} is a generator or a coroutine, whose code runs only "
                f"after the call, unsteered: use `with vector.apply(…):` inside it"
            )
        return super().__call__(function)

    def __repr__(self) -> str:
        return f"SteeringContext({self._shown})"

    def _recreate_cm(self) -> "SteeringContext":
        return SteeringContext(self._attach, self._shown)  # each call of a decorated function attaches its own steering


_DEFERRED = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
_ORDER = itertools.count()
