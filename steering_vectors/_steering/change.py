"""Change an activation: one steering at one layer."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from steering_vectors._arguments import call_hint
from steering_vectors._models import never_compiled
from steering_vectors._precision import wide, wide_dtype
from steering_vectors._steering.multiplier import Multiplier
from steering_vectors._tokens import TokenPositions

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Change:
    """One steering at one layer: activation → steered activation.

    Without a ``direction``, the operator gets the activation alone, and the multiplier scales its result. ``strength``
    is a factor on the result, which the operator doesn't know. ``asked`` are
    the keyword-only arguments that the operator gets: ``layer``, and ``positions``, which ``positions_for`` returns for
    an activation.

    ``weights_for`` returns the weights of an activation's tokens, in a shape that broadcasts to the activation. It
    returns True to steer all tokens, and False to steer none. Without it, all tokens are steered. Gradients flow to
    weights that require them, where they are 0 too.
    ``rows_along`` lays out one row for each multiplier, ``(rows, n)``, along an activation's axes. ``applies`` gets the
    layer and returns True if the current pass is steered at all; with ``applies_to_compiled``, all passes of compiled
    code are. ``owner`` is the handle that the change belongs to. ``ran`` is True once the layer has run in a steered
    pass, and ``ran_compiled`` once it has run in code that asks for no passes.
    """

    def __init__(
        self,
        owner: Any,
        layer: int,
        direction: Tensor | None,
        strength: float,
        operator: Callable[..., Tensor],
        asked: Collection[str],
        multiplier: Multiplier,
        positions_for: Callable[[Tensor], TokenPositions],
        weights_for: Callable[[Tensor], Tensor | bool] | None,
        rows_along: Callable[[Tensor, Tensor], Tensor],
        applies: Callable[[int], bool],
        applies_to_compiled: bool,
    ) -> None:
        self.owner = owner
        self.layer = layer
        self.ran = self.ran_compiled = False
        self._has_direction = direction is not None
        # A factor on the operator's result, where there is no direction.
        direction = torch.ones(1, device="cpu") if direction is None else direction
        self._direction = direction
        self._strength = strength
        self._operator = operator
        self._asks_layer, self._asks_positions = "layer" in asked, "positions" in asked
        self._multiplier = multiplier
        self._positions_for = positions_for
        self._weights_for = weights_for
        self._rows_along = rows_along
        self._applies = applies
        self._applies_to_compiled = applies_to_compiled
        # Where gradients flow to the direction or the multiplier, their values may change between passes.
        self._is_live = direction.requires_grad or multiplier.is_learned
        with torch.inference_mode(False):  # otherwise no later pass could differentiate through these tensors
            self._scaled = multiplier.times(wide(direction.detach())).detach()
            largest = float(self._scaled.abs().max())
        self._too_large_for = set() if self._is_live else {d for d in _DTYPES if largest > torch.finfo(d).max}
        self._check_finite = never_compiled(_check_finite) if self._too_large_for else _check_finite
        self._copies: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._zeros: dict[torch.device, Tensor] = {}

    def __call__(self, activation: Tensor) -> Tensor:
        if self._applies_to_compiled and torch.compiler.is_dynamo_compiling():
            self.ran_compiled = True
        elif not self._applies(self.layer):
            return activation
        self.ran = True
        weights = True if self._weights_for is None else self._weights_for(activation)
        if self._multiplier.changes_nothing or weights is False:
            return activation
        if self._has_direction and activation.shape[-1] != self._direction.shape[-1]:
            raise ValueError(width_message(self._direction.shape[-1], self.layer, activation.shape[-1]))
        direction = self._direction_for(activation, wide_dtype(activation.dtype))
        if self._has_direction:
            delta = self._operated(activation, direction)
        else:
            delta = direction * wide(self._operated(activation))
        if self._strength != 1:
            delta = self._strength * delta
        if weights is not True and weights.dtype is not torch.bool:
            delta = weights.to(direction.dtype) * delta
        if delta.dtype is not activation.dtype:
            # A narrow copy of the direction itself is cached, so that addition costs no more than an addition.
            narrow = activation.dtype
            delta = self._direction_for(activation, narrow) if delta is direction else delta.to(narrow)
        steered = self._added(activation, delta, weights if isinstance(weights, Tensor) else None)
        if self._may_overflow(activation):
            self._check_finite(steered, activation, self.layer)
        return steered

    def _added(self, activation: Tensor, delta: Tensor, weights: Tensor | None) -> Tensor:
        """Return the sum, or the activation bit for bit where the multiplier or a token's weight is 0.

        Adding zero would change a negative zero. A multiplier or weight that is learned gets the sum's gradients at 0
        too, unless another factor is 0 and stays so.
        """
        added = activation + delta
        if self._multiplier.is_learned:
            added = torch.where(self._is_zero(activation), _only_gradients(activation, delta), added)
        if weights is not None and weights.requires_grad:
            added = torch.where(weights != 0, added, _only_gradients(activation, delta))
        if self._multiplier.leaves_rows:
            added = torch.where(self._is_zero(activation), activation, added)
        if weights is not None and not weights.requires_grad:
            added = torch.where(weights if weights.dtype is torch.bool else weights != 0, added, activation)
        return added

    def _may_overflow(self, activation: Tensor) -> bool:
        """Return True if the change may be too large, and looking at it takes no wait that isn't worth it."""
        if activation.dtype in self._too_large_for:
            return True
        is_narrow = activation.dtype is torch.float16 and activation.device.type == "cpu"
        return is_narrow and not torch.compiler.is_dynamo_compiling()  # the check would split the compiled code

    def _operated(self, activation: Tensor, *direction: Tensor) -> Tensor:
        """Return the operator's result, checked to broadcast to the activation, in any dtype."""
        where: dict[str, Any] = {"layer": self.layer} if self._asks_layer else {}
        if self._asks_positions:
            where["positions"] = self._positions_for(activation)
        try:
            delta = self._operator(activation, *direction, **where)
        except RuntimeError as error:
            if all(one.dtype is activation.dtype for one in direction) or "type" not in str(error):
                raise
            raise TypeError(
                f"the operator {self._operator!r} mixes dtypes: it gets the activation h in {activation.dtype} and the "
                f"direction d in {direction[0].dtype}. Write h @ d.to(h.dtype), or h.float() @ d, which is more exact."
            ) from error
        if any(delta is one for one in direction):
            return delta
        if not (isinstance(delta, Tensor) and _broadcasts_to(delta, activation) and not delta.is_complex()):
            got = f"shape {tuple(delta.shape)}" if isinstance(delta, Tensor) else type(delta).__name__
            got = f"{got} in {delta.dtype}" if isinstance(delta, Tensor) and delta.is_complex() else got
            raise ValueError(
                f"the operator {self._operator!r} returned {got} for an activation of shape {tuple(activation.shape)}; "
                f"expected the tensor to add to it, of a shape that broadcasts to it"
                f"{call_hint(self._operator) if callable(delta) else ''}"
            )
        return delta

    def _direction_for(self, activation: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the direction times the multiplier, on the activation's device: ``(1, 1, hidden)``.

        The result has one axis less for an activation ``(batch * seq, hidden)``. With a multiplier for each row it is
        ``(batch, 1, hidden)``, or has as many axes as the activation.
        """
        if self._multiplier.by_row:
            rows = self._scaled_for(activation.device, dtype, [-1, self._direction.shape[-1]])
            return self._rows_along(rows, activation)
        return self._scaled_for(activation.device, dtype, [1] * min(activation.ndim - 1, 2) + [-1])

    def _scaled_for(self, device: torch.device, dtype: torch.dtype, shape: list[int]) -> Tensor:
        if self._is_live:
            return self._multiplier.times(wide(self._direction).to(device)).to(dtype).reshape(shape)
        if torch.compiler.is_compiling():  # also in torch.export, whose tensors hold no numbers to be kept
            return self._scaled.to(device, dtype).reshape(shape)
        key = (device, dtype, len(shape))
        if key not in self._copies:
            with torch.inference_mode(False):
                self._copies[key] = self._scaled.to(device, dtype).reshape(shape)
        return self._copies[key]

    def _is_zero(self, activation: Tensor) -> Tensor:
        """Return a mask of the multipliers that are 0, broadcastable to ``activation``."""
        device = activation.device
        if self._multiplier.is_learned or torch.compiler.is_compiling():
            is_zero = self._multiplier.is_zero(device)
        else:
            if device not in self._zeros:  # a decoding step must not copy from host to device
                self._zeros[device] = self._multiplier.is_zero(device)
            is_zero = self._zeros[device]
        return self._rows_along(is_zero[:, None], activation) if self._multiplier.by_row else is_zero


def _check_finite(steered: Tensor, activation: Tensor, layer: int) -> None:
    if bool((activation.isfinite() & ~steered.isfinite()).any()):
        raise ValueError(
            f"layer {layer}: the change is too large for the model's {activation.dtype}; use a smaller multiplier or a "
            f"model in bfloat16"
        )


def _only_gradients(activation: Tensor, delta: Tensor) -> Tensor:
    """Return ``activation`` bit for bit with the gradients of ``activation + delta``, to learn a factor from 0."""
    return activation - torch.nan_to_num(delta.detach() - delta, nan=0.0)


def width_message(width: int, layer: int, layer_width: int) -> str:
    """Return the message of the error for a vector of another width than the model's."""
    return (
        f"the vector's directions have {width} numbers, but the model's layer {layer} has {layer_width}: use a vector "
        f"made for this model"
    )


def _broadcasts_to(delta: Tensor, activation: Tensor) -> bool:
    sizes = zip(reversed(delta.shape), reversed(activation.shape), strict=False)
    return delta.ndim <= activation.ndim and all(given in (1, size) for given, size in sizes)
