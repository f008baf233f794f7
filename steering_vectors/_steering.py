"""Change activations at layers and tokens while a model runs."""

import itertools
import math
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steering_vectors._hooks import Removable, activation_of, attach_all, remove_all, with_activation
from steering_vectors._model_structure import pass_modules
from steering_vectors._passes import PassTracker
from steering_vectors._positions import along_tokens
from steering_vectors.layer_matching import check_model
from steering_vectors.steering_operators import PatchDeltaOperator
from steering_vectors.token_selection import KnownSelector, Selector, selected


@dataclass(frozen=True, eq=False)
class Steering:
    """What is to be done to a model's activations; checked, and not attached yet.

    ``directions`` are ``(hidden,)`` by layer number, ``modules`` the modules of the same layers. None as ``operator``
    means addition, None as ``selector`` all tokens.
    """

    model: nn.Module
    modules: Mapping[int, nn.Module]
    directions: Mapping[int, Tensor]
    operator: PatchDeltaOperator | None
    multiplier: float | Tensor
    selector: Selector | None

    def attach(self) -> "SteeringPatchHandle":
        """Attach all hooks or, if one can't be attached, none."""
        handle = SteeringPatchHandle(self)
        handle._attach(self)
        return handle


class SteeringPatchHandle:
    """A steering that is attached to a model; :meth:`remove` takes it off. In a ``with``, leaving the block does.

    ``layers`` are the steered layers' numbers.

    >>> with vector.patch(model) as handle:
    ...     handle
    SteeringPatchHandle(layers=[1], multiplier=1.0, operator=addition, tokens=all)
    """

    def __init__(self, steering: Steering) -> None:
        # Nothing here refers to the model: a steering that is never removed must not keep it in memory.
        self.layers = sorted(steering.modules)
        self._operator = steering.operator
        self._multiplier = steering.multiplier
        self._selector = steering.selector
        self._tracker = PassTracker(
            need_positions=steering.selector is not None,
            need_prompt_length=not isinstance(steering.selector, KnownSelector)
            or steering.selector.needs_prompt_length,
        )
        self._order = next(_ORDER)
        self._hooks: list[Removable] = []
        self._layers_run: set[int] = set()
        self._any_selected: dict[torch.device, Tensor] = {}
        self._lock = threading.Lock()

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
            f"SteeringPatchHandle(layers={self.layers}, multiplier={_number(self._multiplier)}, "
            f"operator={self._operator or 'addition'}, tokens={self._selector or 'all'}"
            f"{'' if self._hooks else ', removed'})"
        )

    def _attach(self, steering: Steering) -> None:
        changes = [
            partial(_attach_change, module, _Change(self, steering, layer))
            for layer, module in steering.modules.items()
        ]
        self._hooks = attach_all([*self._tracker.registrations(pass_modules(steering.model)), *changes])

    def _detach(self, *, quiet: bool) -> None:
        with self._lock:
            hooks, self._hooks = self._hooks, []
        remove_all(hooks)
        if hooks and not quiet and self._tracker.completed:
            self._warn_of_nothing()

    def _warn_of_nothing(self) -> None:
        idle = [layer for layer in self.layers if layer not in self._layers_run]
        nothing_selected = self._any_selected and not any(bool(flag) for flag in self._any_selected.values())
        if idle:
            message = f"the model ran, and of the steered layers {self.layers} these never did: {idle}"
        elif nothing_selected:
            message = (
                f"the model ran, and {self._selector!r} selected none of its tokens: "
                f"layers {self.layers} were not steered"
            )
        else:
            return
        warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _weights_for(self, activation: Tensor) -> Tensor | None:
        """What the selector says of the pass that this thread is in, broadcastable to ``activation``; None for all."""
        selector = self._selector
        if selector is None:
            return None
        current = self._tracker.current
        if current is None:
            raise RuntimeError(
                "a steered layer ran outside a pass of the model, so it can't be told which tokens it got; call the "
                "model and not its layers, and steer all tokens under gradient checkpointing"
            )
        device = activation.device
        if device not in current.weights:
            if not current.weights:
                weights = selected(selector, current.positions)
                current.weights[weights.device] = weights
                self._note_selected(weights)
            current.weights[device] = next(iter(current.weights.values())).to(device)
        return along_tokens(current.weights[device], activation)

    def _note_selected(self, weights: Tensor) -> None:
        flag = self._any_selected.get(weights.device)
        if flag is None:
            self._any_selected[weights.device] = (weights != 0).any()
        elif weights.device.type != "cpu" or not flag:  # a read of a device's flag would wait for the device
            self._any_selected[weights.device] = flag | (weights != 0).any()


class SteeringContext(ContextDecorator):
    """Steers a model inside a ``with`` block, or whenever the function that it decorates runs."""

    def __init__(self, attach: Callable[[], SteeringPatchHandle]) -> None:
        self._attach = attach
        self._handles: list[SteeringPatchHandle] = []

    def __enter__(self) -> None:
        self._handles.append(self._attach())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handles.pop()._detach(quiet=kind is not None)

    def _recreate_cm(self) -> "SteeringContext":
        return SteeringContext(self._attach)  # each call of a decorated function steers for itself


def active_patches(model: nn.Module) -> list[SteeringPatchHandle]:
    """The steerings that are attached to ``model``'s modules, in the order in which they were entered.

    A notebook cell that is run twice attaches twice, and doubles a strength.

    >>> active_patches(model)
    []
    """
    check_model(model)
    hooks = [hook for module in model.modules() if (hook := _STEERED.get(module)) is not None]
    handles = {change.handle._order: change.handle for hook in hooks for change in hook.changes}
    return [handles[order] for order in sorted(handles)]


def check_not_steered_by_row(model: nn.Module) -> None:
    """Raise ValueError if a steering depends on the rows of a batch or their padding: in training they aren't the
    caller's.
    """
    for patch in active_patches(model):
        selector = patch._selector
        if isinstance(selector, KnownSelector) and (selector.rows > 1 or selector.counts_from_end):
            raise ValueError(
                f"the model is steered row by row or from a row's end, and training makes its own rows: take off "
                f"{patch!r} first, or select tokens by their index, the same in each row"
            )


def as_multiplier(multiplier: Any) -> float | Tensor:
    """``multiplier`` as a float, or as it is where it is a tensor that gradients flow to.

    Raises TypeError unless it is one number, and ValueError unless it is finite.
    """
    if isinstance(multiplier, (str, bytes)):
        raise TypeError(f"multiplier must be one number, got {multiplier!r}")
    try:
        number = float(multiplier.detach() if isinstance(multiplier, Tensor) else multiplier)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"multiplier must be one number, got {type(multiplier).__name__}") from error
    if not math.isfinite(number):
        raise ValueError(f"multiplier must be finite, got {number}")
    is_learned = isinstance(multiplier, Tensor) and multiplier.ndim == 0 and multiplier.requires_grad
    return multiplier if is_learned else number


class _Change:
    """One steering at one layer: activation → steered activation."""

    def __init__(self, handle: SteeringPatchHandle, steering: Steering, layer: int) -> None:
        direction = steering.directions[layer]
        self.handle = handle
        self._layer = layer
        self._direction = direction
        self._operator = steering.operator
        self._multiplier = steering.multiplier
        # Where gradients flow to the direction or the multiplier, their values may change between passes.
        self._is_live = direction.requires_grad or isinstance(steering.multiplier, Tensor)
        with torch.inference_mode(False):  # else no later pass could differentiate through what is made of it
            wide = direction.to(torch.promote_types(direction.dtype, torch.float32))
            self._scaled = direction if self._is_live else (steering.multiplier * wide).detach()
            self._largest = float(self._scaled.detach().abs().max())
        self._copies: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def __call__(self, activation: Tensor) -> Tensor:
        self.handle._layers_run.add(self._layer)
        weights = self.handle._weights_for(activation)
        if not isinstance(self._multiplier, Tensor) and self._multiplier == 0:
            return activation
        if activation.shape[-1] != self._direction.shape[-1]:
            raise ValueError(width_message(self._direction.shape[-1], self._layer, activation.shape[-1]))
        delta = self._delta(activation)
        if weights is not None and weights.dtype is not torch.bool:
            delta = weights.to(activation.dtype) * delta
            weights = weights != 0
        steered = activation + delta
        if isinstance(self._multiplier, Tensor):
            steered = torch.where(self._multiplier.to(steered.device) != 0, steered, _only_gradients(activation, delta))
        # What is not selected stays bit for bit: to add zero would change a negative zero.
        return steered if weights is None else torch.where(weights, steered, activation)

    def _delta(self, activation: Tensor) -> Tensor:
        """What is to be added, broadcastable to ``activation``."""
        direction = self._direction_for(activation)
        if self._operator is None:
            return direction
        delta = self._operator(activation, direction)
        if not isinstance(delta, Tensor) or not _broadcasts_to(delta, activation):
            got = f"shape {tuple(delta.shape)}" if isinstance(delta, Tensor) else type(delta).__name__
            raise ValueError(
                f"the operator {self._operator!r} gave {got} for an activation of shape {tuple(activation.shape)}; "
                f"expected what is to be added to it, of a shape that broadcasts to it"
            )
        return delta.to(activation.dtype)

    def _direction_for(self, activation: Tensor) -> Tensor:
        """The direction times the multiplier, in the activation's dtype, on its device: ``(1, 1, hidden)``.

        For an activation ``(batch * seq, hidden)`` it has one axis less.
        """
        shape = [1] * min(activation.ndim - 1, 2) + [-1]
        if self._is_live:
            scaled = self._multiplier * self._direction.to(activation.device)
            return scaled.to(activation.dtype).reshape(shape)
        key = (activation.device, activation.dtype, len(shape))
        if key not in self._copies:
            if self._largest > torch.finfo(activation.dtype).max:
                raise ValueError(
                    f"layer {self._layer}: the direction times the multiplier is too large for the model's "
                    f"{activation.dtype}; use a smaller multiplier or a model in bfloat16"
                )
            with torch.inference_mode(False):
                self._copies[key] = self._scaled.to(activation.device, activation.dtype).reshape(shape)
        return self._copies[key]


def _only_gradients(activation: Tensor, delta: Tensor) -> Tensor:
    """``activation`` bit for bit, with the gradients of ``activation + delta``: for a multiplier learned from 0."""
    return activation - torch.nan_to_num(delta.detach() - delta, nan=0.0)


class _ModuleHook:
    """The one hook of a steered module; it runs the module's changes in the order in which they were entered."""

    def __init__(self, module: nn.Module) -> None:
        self.changes: tuple[_Change, ...] = ()

        # A plain function: a copy of the model made by deepcopy shares it, and is steered no longer than the model.
        def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
            activation = steered = activation_of(output)
            for change in self.changes:
                steered = change(steered)
            return output if steered is activation else with_activation(output, steered)

        # First, so that whoever captures the output later sees what was steered.
        self.handle: RemovableHandle = module.register_forward_hook(steer, prepend=True)


@dataclass(frozen=True, eq=False)
class _AttachedChange:
    """What takes a change off its module, and the module's hook with the last one."""

    module: "weakref.ref[nn.Module]"
    change: _Change

    def remove(self) -> None:
        with _STEERED_LOCK:
            module = self.module()
            hook = None if module is None else _STEERED.get(module)
            if module is None or hook is None:
                return
            hook.changes = tuple(change for change in hook.changes if change is not self.change)
            if not hook.changes:
                hook.handle.remove()
                del _STEERED[module]


_ORDER = itertools.count()
_STEERED: "weakref.WeakKeyDictionary[nn.Module, _ModuleHook]" = weakref.WeakKeyDictionary()
_STEERED_LOCK = threading.Lock()


def _attach_change(module: nn.Module, change: _Change) -> _AttachedChange:
    with _STEERED_LOCK:
        hook = _STEERED.get(module)
        if hook is None:
            hook = _STEERED[module] = _ModuleHook(module)
        hook.changes = (*hook.changes, change)
    return _AttachedChange(weakref.ref(module), change)


def width_message(width: int, layer: int, layer_width: int) -> str:
    return f"the vector's directions have {width} numbers, the model's layer {layer} has {layer_width}"


def _broadcasts_to(delta: Tensor, activation: Tensor) -> bool:
    sizes = zip(reversed(delta.shape), reversed(activation.shape), strict=False)
    return delta.ndim <= activation.ndim and all(own in (1, size) for own, size in sizes)


def _number(multiplier: float | Tensor) -> float:
    return multiplier.item() if isinstance(multiplier, Tensor) else multiplier
