"""Change a module's output: one steering at one layer, and the hook that runs all of a module's."""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from steering_vectors._arguments import call_hint
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
from steering_vectors._steering.multiplier import Multiplier
from steering_vectors.steering_operators import PatchDeltaOperator

# The attributes of a steered module, by what of it is steered.
OUTPUT, INPUT = "_steering_vectors", "_steering_vectors_input"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOCK = threading.Lock()


class Change:
    """One steering at one layer: activation → steered activation.

    ``weights_for`` says which of an activation's tokens are steered, in a shape that broadcasts to it, or True for all
    and False for none of them; None means all.
    ``rows_along`` brings one row for each multiplier ``(rows, n)`` to an activation's axes. ``applies`` says whether a
    pass is to be steered at all; None means each. ``owner`` is whose change it is. ``ran`` is set once the layer has
    run in such a pass.
    """

    def __init__(
        self,
        owner: Any,
        layer: int,
        direction: Tensor,
        operator: PatchDeltaOperator,
        multiplier: Multiplier,
        weights_for: Callable[[Tensor], Tensor | bool] | None,
        rows_along: Callable[[Tensor, Tensor], Tensor],
        applies: Callable[[], bool] | None,
    ) -> None:
        self.owner = owner
        self.layer = layer
        self.ran = False
        self._direction = direction
        self._operator = operator
        self._multiplier = multiplier
        self._weights_for = None if weights_for is None else never_compiled(weights_for)
        self._rows_along = rows_along
        self._applies = None if applies is None else never_compiled(applies)
        # Where gradients flow to the direction or the multiplier, their values may change between passes.
        self._is_live = direction.requires_grad or multiplier.is_learned
        with torch.inference_mode(False):  # else no later pass could differentiate through what is made of it
            self._scaled = multiplier.times(_wide(direction.detach())).detach()
            largest = float(self._scaled.abs().max())
        self._too_large_for = set() if self._is_live else {d for d in _DTYPES if largest > torch.finfo(d).max}
        self._copies: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._zeros: dict[torch.device, Tensor] = {}

    def __call__(self, activation: Tensor) -> Tensor:
        if self._applies is not None and not self._applies():
            return activation
        self.ran = True
        weights = True if self._weights_for is None else self._weights_for(activation)
        if self._multiplier.changes_nothing or weights is False:
            return activation
        if activation.shape[-1] != self._direction.shape[-1]:
            raise ValueError(width_message(self._direction.shape[-1], self.layer, activation.shape[-1]))
        direction = self._direction_for(activation, _wide_dtype(activation))
        delta = self._operated(activation, direction)
        if weights is not True and weights.dtype is not torch.bool:
            delta = weights.to(direction.dtype) * delta
            weights = weights != 0
        if delta.dtype is not activation.dtype:
            # Of the direction itself a narrow copy is kept, so that addition costs no more than an addition.
            narrow = activation.dtype
            delta = self._direction_for(activation, narrow) if delta is direction else delta.to(narrow)
        steered = activation + delta
        if self._multiplier.is_learned or self._multiplier.leaves_rows:
            left = _only_gradients(activation, delta) if self._multiplier.is_learned else activation
            steered = torch.where(self._is_zero(activation), left, steered)
        # What is not selected stays bit for bit: to add zero would change a negative zero.
        steered = steered if weights is True else torch.where(weights, steered, activation)
        if activation.dtype in self._too_large_for:  # only a direction of such a size is worth the wait for a device
            _check_finite(steered, activation, self.layer)
        return steered

    def _operated(self, activation: Tensor, direction: Tensor) -> Tensor:
        """Return what the operator would add to the activation, broadcastable to it, in any dtype."""
        try:
            delta = self._operator(activation, direction)
        except RuntimeError as error:
            if activation.dtype is direction.dtype or "type" not in str(error):
                raise
            raise TypeError(
                f"the operator {self._operator!r} mixes dtypes: it gets the activation h in {activation.dtype} and the "
                f"direction d in {direction.dtype}. Write h @ d.to(h.dtype), or h.float() @ d, which is more exact."
            ) from error
        if delta is not direction and not (isinstance(delta, Tensor) and _broadcasts_to(delta, activation)):
            got = f"shape {tuple(delta.shape)}" if isinstance(delta, Tensor) else type(delta).__name__
            raise ValueError(
                f"the operator {self._operator!r} gave {got} for an activation of shape {tuple(activation.shape)}; "
                f"expected what is to be added to it, of a shape that broadcasts to it"
                f"{call_hint(self._operator) if callable(delta) else ''}"
            )
        return delta

    def _direction_for(self, activation: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the direction times the multiplier, on the activation's device: ``(1, 1, hidden)``.

        For an activation ``(batch * seq, hidden)`` it has one axis less. With a multiplier for each row it is
        ``(batch, 1, hidden)``, or has as many axes as the activation.
        """
        if self._multiplier.by_row:
            rows = self._scaled_for(activation.device, dtype, [-1, activation.shape[-1]])
            return self._rows_along(rows, activation)
        return self._scaled_for(activation.device, dtype, [1] * min(activation.ndim - 1, 2) + [-1])

    def _scaled_for(self, device: torch.device, dtype: torch.dtype, shape: list[int]) -> Tensor:
        if self._is_live:
            return self._multiplier.times(_wide(self._direction).to(device)).to(dtype).reshape(shape)
        if torch.compiler.is_dynamo_compiling():
            return self._scaled.to(device, dtype).reshape(shape)
        key = (device, dtype, len(shape))
        if key not in self._copies:
            with torch.inference_mode(False):
                self._copies[key] = self._scaled.to(device, dtype).reshape(shape)
        return self._copies[key]

    def _is_zero(self, activation: Tensor) -> Tensor:
        """Return where the multiplier is 0, broadcastable to ``activation``."""
        device = activation.device
        if self._multiplier.is_learned or torch.compiler.is_dynamo_compiling():
            is_zero = self._multiplier.is_zero(device)
        else:
            if device not in self._zeros:  # a decoding step must not copy from host to device
                self._zeros[device] = self._multiplier.is_zero(device)
            is_zero = self._zeros[device]
        return self._rows_along(is_zero[:, None], activation) if self._multiplier.by_row else is_zero


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


@never_compiled
def _check_finite(steered: Tensor, activation: Tensor, layer: int) -> None:
    if bool((activation.isfinite() & ~steered.isfinite()).any()):
        raise ValueError(
            f"layer {layer}: the change is too large for the model's {activation.dtype}; use a smaller multiplier or a "
            f"model in bfloat16"
        )


def _only_gradients(activation: Tensor, delta: Tensor) -> Tensor:
    """``activation`` bit for bit, with the gradients of ``activation + delta``: for a multiplier learned from 0."""
    return activation - torch.nan_to_num(delta.detach() - delta, nan=0.0)


# Called with each steered module, and its activation before and after.
Trace: TypeAlias = Callable[[nn.Module, Tensor, Tensor], None]
_traces: tuple[Trace, ...] = ()


@contextmanager
def traced(trace: Trace) -> Iterator[None]:
    """A block in which ``trace`` is told of each steering of a module's output."""
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
    """What is done to a module's output, or input: the changes, in the order in which they were entered.

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
    """What takes a change off its module, and the module's hook with the last one."""

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
    """The changes that are made to the module's output, or input, in the order in which they were entered."""
    steered: _Steered | None = module.__dict__.get(place)
    if steered is None:
        return ()
    return steered.changes if steered.original is None else (*steered.original.changes, *steered.changes)


def width_message(width: int, layer: int, layer_width: int) -> str:
    return f"the vector's directions have {width} numbers, the model's layer {layer} has {layer_width}"


def _broadcasts_to(delta: Tensor, activation: Tensor) -> bool:
    sizes = zip(reversed(delta.shape), reversed(activation.shape), strict=False)
    return delta.ndim <= activation.ndim and all(own in (1, size) for own, size in sizes)
