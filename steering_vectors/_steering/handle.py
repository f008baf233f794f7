"""Change activations at layers and tokens while a model runs."""

import inspect
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._models import Anatomy, along_tokens, attach_all, check_model, remove_all
from steering_vectors._passes import ForwardPass, Need, PassTracker, this_thread
from steering_vectors._steering.change import Change, attach_change, changes_of
from steering_vectors._steering.multiplier import Multiplier
from steering_vectors.steering_operators import PatchDeltaOperator
from steering_vectors.token_selection import (
    Selector,
    expand_rows,
    may_go_by_row_or_end,
    may_need_prompt_length,
    selected,
)


@dataclass(frozen=True, eq=False)
class Steering:
    """What is to be done to a model's activations; checked, and not attached yet.

    ``directions`` are ``(hidden,)`` by layer number, ``places`` the modules that are changed, each with its layer's
    number and whether its output or its input is meant. None as ``selector`` means all tokens. With
    ``this_thread_only`` only passes in the thread that attaches it are steered.
    """

    anatomy: Anatomy
    places: Sequence[tuple[int, nn.Module, str]]
    directions: Mapping[int, Tensor]
    operator: PatchDeltaOperator
    multiplier: Multiplier
    selector: Selector | None
    this_thread_only: bool = False


class SteeringPatchHandle:
    """A steering that is attached to a model; :meth:`remove` takes it off. In a ``with``, leaving the block does.

    ``layers`` are the steered layers' numbers.

    >>> with vector.patch(model) as handle:
    ...     handle
    SteeringPatchHandle(layers=[1], multiplier=1.0, operator=addition_operator(), tokens=all)
    """

    def __init__(self, steering: Steering) -> None:
        """Attach all hooks or, if one can't be attached, none."""
        # Nothing here refers to the model: a steering that is never removed must not keep it in memory.
        self.layers = sorted(steering.directions)
        self._operator = steering.operator
        self._multiplier = steering.multiplier
        self._selector = steering.selector
        self._columns_first = steering.anatomy.columns_first
        self._tracker = PassTracker(_need_of(steering))
        self._thread = this_thread() if steering.this_thread_only else None
        self._order = next(_ORDER)
        self._any_selected: bool | None = None  # until something is known
        self._any_selected_on: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()
        asked: dict[str, Any] = {
            "operator": steering.operator,
            "multiplier": steering.multiplier,
            "weights_for": None if steering.selector is None else self._weights_for,
            "rows_along": self._rows_along,
            "applies": None if self._thread is None else self._is_of_own_thread,
        }
        self._changes = [Change(self, layer, steering.directions[layer], **asked) for layer, _, _ in steering.places]
        self._hooks = attach_all(
            [
                *self._tracker.registrations(steering.anatomy.pass_modules),
                *(
                    partial(attach_change, module, change, place)
                    for change, (_, module, place) in zip(self._changes, steering.places, strict=True)
                ),
            ]
        )

    def remove(self) -> None:
        """Take the steering off the model; a second call does nothing.

        Warns with a RuntimeWarning if the model ran and some layer or every token was passed by, unless an exception is
        on its way.
        """
        self._detach(quiet=sys.exc_info()[0] is not None)

    def __enter__(self) -> "SteeringPatchHandle":
        """Raises RuntimeError if the steering was removed: the block would run unsteered."""
        if not self._hooks:
            raise RuntimeError("this steering was removed from its model: make a new one by vector.patch(model)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._detach(quiet=kind is not None)

    def __repr__(self) -> str:
        return (
            f"SteeringPatchHandle(layers={self.layers}, multiplier={self._multiplier}, "
            f"operator={self._operator!r}, tokens={self._selector or 'all'}"
            f"{'' if self._thread is None else ', this_thread_only=True'}"
            f"{'' if self._hooks else ', removed'})"
        )

    def _detach(self, *, quiet: bool) -> None:
        with self._lock:
            hooks, self._hooks = self._hooks, []
        remove_all(hooks)
        if hooks and not quiet and self._tracker.completed:
            self._warn_of_nothing()

    def _warn_of_nothing(self) -> None:
        idle = sorted({change.layer for change in self._changes if not change.ran})
        flags = [*self._any_selected_on.values(), *([] if self._any_selected is None else [self._any_selected])]
        nothing_selected = flags and not any(bool(flag) for flag in flags)
        if self._thread is not None and idle == self.layers:
            message = (
                f"the model ran, but not in the thread that this steering is for, by this_thread_only=True: layers "
                f"{self.layers} were not steered"
            )
        elif idle:
            message = f"the model ran, and of the steered layers {self.layers} these never did: {idle}"
        elif nothing_selected:
            message = (
                f"the model ran, and {self._selector!r} selected none of its tokens: "
                f"layers {self.layers} were not steered"
            )
        else:
            return
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _weights_for(self, activation: Tensor) -> Tensor | bool:
        """What the selector says of the pass that this thread is in, broadcastable to ``activation``.

        True for all tokens and False for none of them, where that is known without waiting for a device.
        """
        current = self._current_pass()
        weights = current.weights.get(activation.device)
        if weights is None:
            weights = self._select(current, activation.device)
        if isinstance(weights, bool):
            shape = current.positions.index.shape
            if activation.shape[:2] != shape:  # raises where it can't be told which tokens it holds
                along_tokens(activation.new_empty(*shape, 1), activation, columns_first=self._columns_first)
            return weights
        return along_tokens(weights[..., None], activation, columns_first=self._columns_first)

    def _select(self, current: ForwardPass, device: torch.device) -> Tensor | bool:
        """The selection of a pass, kept for its other layers."""
        assert self._selector is not None
        weights = next(iter(current.weights.values()), None)
        if weights is None:
            weights = _all_or_none(selected(self._selector, current.positions))
            self._note_selected(weights)
        if isinstance(weights, Tensor):
            current.weights[weights.device] = weights
            weights = weights.to(device)
        current.weights[device] = weights
        return weights

    def _rows_along(self, rows: Tensor, activation: Tensor) -> Tensor:
        """``rows (rows, n)``, one for each multiplier, expanded to the batch, broadcastable to ``activation``."""
        if activation.ndim == 3 and not self._columns_first:
            return expand_rows(rows, activation.shape[0], "the multiplier")[:, None]
        batch, seq = self._current_pass().shape
        expanded = expand_rows(rows, batch, "the multiplier")[:, None].expand(-1, seq, -1)
        return along_tokens(expanded, activation, columns_first=self._columns_first)

    def _is_of_own_thread(self) -> bool:
        """Whether the pass that runs now is one of the thread that attached the steering."""
        current = self._tracker.current
        return (this_thread() if current is None else current.thread) is self._thread

    def _current_pass(self) -> ForwardPass:
        current = self._tracker.current
        if current is None:
            raise RuntimeError(
                "a steered layer ran outside a pass of the model, so it can't be told which tokens it got; call the "
                "model and not its layers, and enable gradient checkpointing by the model's own method, before steering"
            )
        return current

    def _note_selected(self, weights: Tensor | bool) -> None:
        if isinstance(weights, bool) or weights.device.type == "cpu":
            self._any_selected = self._any_selected or weights is not False
        else:
            some = (weights != 0).any()
            self._any_selected_on[weights.device] = some | self._any_selected_on.get(weights.device, some)


def _need_of(steering: Steering) -> Need:
    """Return the facts of a pass that the steering asks for."""
    selector = steering.selector
    if selector is not None:
        return Need.PROMPT_LENGTH if may_need_prompt_length(selector) else Need.POSITIONS
    if steering.this_thread_only:
        return Need.THREAD
    return Need.SHAPE if steering.multiplier.by_row else Need.PASSES


def _all_or_none(weights: Tensor) -> Tensor | bool:
    """Whether all tokens or none are selected, on the CPU: to look at another device's weights would wait for it."""
    if weights.device.type != "cpu":
        return weights
    if weights.dtype is torch.bool and bool(weights.all()):
        return True
    return weights if bool(weights.any()) else False


class SteeringContext(ContextDecorator):
    """Steers a model inside a ``with`` block, or whenever the function that it decorates runs."""

    def __init__(self, attach: Callable[[], SteeringPatchHandle]) -> None:
        self._attach = attach
        self._handles: list[tuple[object, SteeringPatchHandle]] = []  # with the threads that entered

    def __enter__(self) -> None:
        self._handles.append((this_thread(), self._attach()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # This thread's last one; a generator may be left by another thread than the one that entered.
        own = [n for n, (thread, _) in enumerate(self._handles) if thread is this_thread()]
        _, handle = self._handles.pop(own[-1] if own else -1)
        handle._detach(quiet=kind is not None)

    def __call__(self, function: Any) -> Any:
        """Raises TypeError for functions that do their work after they have returned: they would run unsteered."""
        if any(kind(function) for kind in _DEFERRED):
            raise TypeError(
                f"{getattr(function, '__name__', function)} is a generator or a coroutine, which runs after it has "
                f"returned: use `with vector.apply(…):` inside it"
            )
        return super().__call__(function)

    def _recreate_cm(self) -> "SteeringContext":
        return SteeringContext(self._attach)  # each call of a decorated function steers for itself


def active_patches(model: nn.Module) -> list[SteeringPatchHandle]:
    """The steerings that are attached to ``model``'s modules, in the order in which they were entered.

    A notebook cell that is run twice attaches twice, and doubles a strength.

    >>> active_patches(model)
    []
    """
    check_model(model)
    handles = {change.owner._order: change.owner for module in model.modules() for change in changes_of(module)}
    return [handles[order] for order in sorted(handles)]


def is_steered_by_token(model: nn.Module) -> bool:
    """Whether some steering selects tokens, so that it matters how they are laid out in a pass."""
    return any(patch._selector is not None for patch in active_patches(model))


def is_steered_by_token_or_row(model: nn.Module) -> bool:
    """Whether some steering asks how a pass's tokens are laid out."""
    return any(patch._selector is not None or patch._multiplier.by_row for patch in active_patches(model))


def check_not_steered_by_row(model: nn.Module) -> None:
    """Raise ValueError if a steering depends on the rows of a batch or their padding: in training they aren't the
    caller's.
    """
    for patch in active_patches(model):
        selector = patch._selector
        if (selector is not None and may_go_by_row_or_end(selector)) or patch._multiplier.by_row:
            raise ValueError(
                f"the model is steered row by row or from a row's end, or may be, and training makes rows of its own: "
                f"remove {patch!r} first, or select tokens by their index and use one multiplier for all rows. A "
                f"selector of yours that does so says it by the attributes rows = 1 and counts_from_end = False."
            )


_DEFERRED = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
_ORDER = itertools.count()
