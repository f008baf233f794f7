"""Attach a steering to a model, and remove it by hand or by leaving a block."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from steering_vectors._models import never_compiled
from steering_vectors._passes import ForwardPass, Need, PassTracker, this_thread
from steering_vectors._steering.attaching import AttachedChange
from steering_vectors._steering.change import Change
from steering_vectors._steering.plan import Place, Steering
from steering_vectors._steering.selection import Selection
from steering_vectors._tokens import may_need_prompt_length, needs_row_ids


class SteeringPatchHandle:
    """A steering that is attached to a model, until :meth:`remove` or the end of a ``with`` block.

    Attributes:
        layers: The numbers of the steered layers.
        selector: The selector of the steered tokens; None for all tokens.
        locating: The callables that get the tokens' positions, a selector or operator.
        multiplier: The factor on the directions or, without them, on the change.
        order: A number that grows with each handle that is made.

    >>> with vector.patch(model) as handle:
    ...     handle
    SteeringPatchHandle(layers=[1], multiplier=1.0, operator=addition_operator(), tokens=all)
    """

    def __init__(self, steering: Steering) -> None:
        # Nothing here refers to the model: a steering that is never removed must not keep it in memory.
        self.layers = steering.layers
        self.selector = steering.selector
        self.locating = steering.locating
        self.multiplier = steering.multiplier
        self.order = next(_ORDER)
        self._shown = repr(steering)
        self._entered_by = this_thread()
        self._this_thread_only = steering.this_thread_only
        self._has_warned = False
        self._missed: Counter[int] = Counter()  # passes in which a layer did not run, by layer
        self._text_config = steering.anatomy.text_config
        self._has_dropped_layers = False
        self._tracker = PassTracker(
            steering.anatomy.pass_modules,
            _need_of(steering),
            self._note_layers_run,
            need_row_ids=any(map(needs_row_ids, steering.locating)),
        )
        self._selection = Selection(self._tracker, steering.selector, columns_first=steering.anatomy.columns_first)
        placed = list(self._placed(steering))
        self._changes = [change for change, _ in placed]
        self._attachments = [AttachedChange(place.module, change, place.side) for change, place in placed]

    def _placed(self, steering: Steering) -> Iterator[tuple[Change, Place]]:
        """Yield the steering's changes, each with its place."""
        applies = self._applies if self._tracker.is_traceable else never_compiled(self._applies)
        change = functools.partial(
            Change,
            owner=self,
            operator=steering.operator,
            asked=steering.asked,
            multiplier=steering.multiplier,
            positions_for=never_compiled(self._selection.positions_for),
            weights_for=None if steering.selector is None else never_compiled(self._selection.weights_for),
            rows_along=self._selection.rows_along,
            applies=applies,
            applies_to_compiled=self._tracker.is_traceable,
        )
        for place in steering.places:
            for direction in steering.directions_at(place.layer):
                yield change(layer=place.layer, direction=direction, strength=place.strength), place

    def remove(self) -> None:
        """Remove the steering from the model; a second call does nothing.

        Passes that other threads are running now keep it until they end.

        Warns:
            RuntimeWarning: If the model ran but some steered layer did not, or not in each pass, if
                no token was selected, or if other code has removed the steering's hooks. There is
                no warning while an exception is being handled.
        """
        self._leave(quiet=sys.exc_info()[0] is not None)

    def __enter__(self) -> SteeringPatchHandle:
        """Return the handle.

        Raises:
            RuntimeError: If the steering was removed, since the block would run unsteered.
        """
        if not self.is_on:
            raise RuntimeError("this steering was removed from its model: make a new one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave(quiet=kind is not None)

    def __repr__(self) -> str:
        state = ", hooks removed by other code" if not self._tracker.is_attached else ""
        return f"SteeringPatchHandle({self._shown}{state if self.is_on else ', removed'})"

    @property
    def is_on(self) -> bool:
        """True from the moment that the steering is attached until it is removed."""
        return self._tracker.is_on

    @property
    def is_entered_here(self) -> bool:
        """True in the thread that attached the steering."""
        return self._entered_by is this_thread()

    @property
    def concerns_this_thread(self) -> bool:
        """True unless the steering changes the passes of another thread only."""
        return self.is_entered_here or not self._this_thread_only

    def _attach(self) -> SteeringPatchHandle:
        """Attach all hooks or, if one can't be attached, none."""
        self._tracker.start(self._attachments)
        return self

    def _leave(self, *, quiet: bool, after_block: bool = False) -> None:
        try:
            was_on, was_attached = self.is_on, self._tracker.is_attached
            self._tracker.stop()
        except BaseException:  # an interrupt: what it left undone is done now
            self._tracker.stop()
            raise
        if was_on and not quiet:
            if not was_attached:
                message: str | None = _HOOKS_GONE.format(self.layers)
            elif after_block and not self._tracker.begun and not any(change.ran for change in self._changes):
                message = _NOTHING_RAN
            else:
                message = self._nothing_steered()
            if message:
                warnings.warn(message, RuntimeWarning, stacklevel=3)

    def _nothing_steered(self) -> str | None:
        """Return a message about layers or tokens that were to be steered and were not; None if there are none."""
        if not self._tracker.completed:
            return None
        idle = [] if self._has_dropped_layers else sorted({c.layer for c in self._changes if not c.ran})
        if self._this_thread_only and idle == self.layers:
            return (
                f"the model ran, but not in the thread that attached this steering with this_thread_only=True: layers "
                f"{self.layers} were not steered; run the model in that thread, or leave out this_thread_only"
            )
        if idle:
            return f"the model ran, but of the steered layers {self.layers} these never did: {idle}"
        if self._selection.was_empty:
            return (
                f"the model ran, but {self.selector!r} selected none of its tokens: "
                f"layers {self.layers} were not steered"
            )
        compiled = {change.layer for change in self._changes if change.ran_compiled}
        missed = {layer: passes for layer, passes in sorted(self._missed.items()) if layer not in compiled}
        if missed:
            return (
                f"of {self._tracker.completed} passes of the model, steered layers did not run in some, which were not "
                f"steered there (passes by layer: {missed}). Does this model run its layers' code without calling the "
                f"layers, as some fast decoding loops do? Then steer it with that turned off"
            )
        return None

    def _applies(self, layer: int) -> bool:
        """Return True if the layer that runs now in this thread is to be steered."""
        current = self._tracker.current
        if current is None:  # a layer called alone, or a pass that began before this steering, or after it
            return self.is_on and self.concerns_this_thread and self._tracker.is_between_passes
        if current.thread is not self._entered_by:
            if self._this_thread_only:
                return False
            self._warn_of_another_thread()
        current.layers_run.add(layer)
        return True

    def _warn_of_another_thread(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"layers {self.layers} are steered in a thread other than the one that attached this steering; to "
                f"steer only the passes of one thread, attach it there with this_thread_only=True",
                RuntimeWarning,
                stacklevel=2,
            )

    def _note_layers_run(self, current: ForwardPass) -> None:
        """Note the steered layers that did not run in a pass, though the model did not leave them out by design."""
        module = current.begun_by()
        if module is None or (self._this_thread_only and current.thread is not self._entered_by):
            return
        if module.training:  # layers are dropped at random
            settings = getattr(self._text_config, "__dict__", {})
            self._has_dropped_layers = any("layerdrop" in name and value for name, value in settings.items())
            return
        depth = getattr(self._text_config, "num_hidden_layers", None)  # lowered in passes that leave off early
        self._missed.update(
            layer
            for layer in self.layers
            if layer not in current.layers_run and not (isinstance(depth, int) and layer >= depth)
        )


_HOOKS_GONE = (
    "other code has removed hooks of this steering, so that it no longer steered layers {} as asked: remove hooks by "
    "their handles, not all hooks of a module"
)


_NOTHING_RAN = (
    "the model did not run inside the block, so nothing was steered: run it inside. A thread that is started there may "
    "begin only after the block was left: wait for it inside, or enter the block in the thread"
)


def attach(steering: Steering) -> SteeringPatchHandle:
    """Attach a steering and return its handle. If it can't be attached, nothing is left behind."""
    handle = SteeringPatchHandle(steering)
    try:
        return handle._attach()
    except BaseException:  # an interrupt may come after the steering is attached and before anyone has the handle
        handle._tracker.stop()
        raise


def _need_of(steering: Steering) -> Need:
    """Return the facts about a pass that the steering needs."""
    if steering.locating:
        return Need.PROMPT_LENGTH if any(map(may_need_prompt_length, steering.locating)) else Need.POSITIONS
    if steering.this_thread_only:
        return Need.THREAD
    return Need.SHAPE if steering.multiplier.by_row else Need.PASSES


class SteeringContext:
    """A context manager that steers a model inside its block, or as a decorator inside a function.

    It may be entered several times, also by several threads. :meth:`SteeringVector.apply`,
    :func:`steer` and :func:`ablate_everywhere` return it.

    >>> steered = vector.apply(model, multiplier=2.0)
    >>> steered
    SteeringContext(layers=[1], multiplier=2.0, operator=addition_operator(), tokens=all)
    >>> with steered:
    ...     output = model(**inputs)
    """

    def __init__(self, make: Callable[[], Steering], shown: str) -> None:
        self._make = make
        self._shown = shown
        self._handles: list[SteeringPatchHandle] = []  # one for each block that was entered and not left
        self._was_used = False

    def patch(self) -> SteeringPatchHandle:
        """Steer the model from now on, until ``remove()`` of the returned handle is called.

        >>> handle = vector.apply(model, multiplier=2.0).patch()
        >>> handle.remove()
        """
        self._was_used = True
        return attach(self._make())

    def __enter__(self) -> SteeringPatchHandle:
        """Attach the steering and return its handle, as :meth:`SteeringVector.patch` does."""
        self._was_used = True
        handle = SteeringPatchHandle(self._make())
        self._handles.append(handle)  # known before it is attached, for an interrupt in between
        try:
            handle._attach()
        except BaseException:
            handle._tracker.stop()
            self._handles.remove(handle)
            raise
        return handle

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The last one that this thread entered, if any: a generator may be closed in another thread than it began in.
        entered = [handle for handle in self._handles if handle.is_entered_here] or self._handles
        handle = entered[-1]
        try:
            handle._leave(quiet=kind is not None, after_block=True)
        finally:
            handle._tracker.stop()  # in case of an interrupt
            self._handles.remove(handle)

    def __del__(self) -> None:
        # An interrupt may come when a block is entered or left, before any code of this class runs.
        for handle in getattr(self, "_handles", ()):  # none after an error in __init__
            handle._leave(quiet=True)
        if not getattr(self, "_was_used", True):
            warnings.warn(
                f"{self!r} was never entered, so it steered nothing: write `with vector.apply(…):`, or use patch(), "
                f"which steers until it is removed",
                RuntimeWarning,
                stacklevel=2,
            )

    def __call__(self, function: Any) -> Any:
        """Decorate a function.

        Raises:
            TypeError: If the function is a generator or a coroutine, which would run unsteered. The
                decorated function raises the same error if it returns one.
        """
        self._was_used = True
        if any(is_deferred(function) for is_deferred in _DEFERRED_FUNCTIONS):
            raise TypeError(_DEFERRED.format(getattr(function, "__name__", function)))

        @functools.wraps(function)
        def steered(*args: Any, **kwargs: Any) -> Any:
            with SteeringContext(self._make, self._shown):  # each call attaches a steering of its own
                result = function(*args, **kwargs)
                if any(is_deferred(result) for is_deferred in _DEFERRED_RESULTS):
                    if inspect.iscoroutine(result):
                        result.close()  # else Python warns that it was never awaited
                    raise TypeError(_DEFERRED.format(getattr(function, "__name__", function)))
                return result

        return steered

    def __repr__(self) -> str:
        return f"SteeringContext({self._shown})"


_DEFERRED = (
    "{} is a generator or a coroutine, or returns one, whose code runs only after the call, unsteered: use "
    "`with vector.apply(…):` inside it"
)
_DEFERRED_FUNCTIONS = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
_DEFERRED_RESULTS = (inspect.isgenerator, inspect.isawaitable, inspect.isasyncgen)
_ORDER = itertools.count()
