"""Operators: from an activation and a direction to the change of the activation.

:class:`PatchDeltaOperator` says what an operator gets, and what it returns.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from steering_vectors._arguments import check_takes, finite_number


class PatchDeltaOperator(Protocol):
    """Any callable from an activation and a direction to what is to be added to the activation.

    The activation is ``(batch, seq, hidden)``, or as the layer has it, in the model's dtype.
    The direction has been multiplied by the multiplier, and has a shape that broadcasts to the activation. It is in
    float32, or in float64 where the model is, so that it neither vanishes nor overflows in half precision.
    What mixes the two is float32 too, where PyTorch promotes: ``*`` and ``+`` do. Matrix products don't: write
    ``h.float() @ d``, or ``h @ d.to(h.dtype)``.

    The result may have any dtype, and any shape that broadcasts to the activation. It is computed for all tokens,
    brought to the activation's dtype, and added at the selected tokens.
    A function or a lambda will do, and need not say anything of itself. One that returns the direction as it got it,
    ``return direction``, costs a single addition.

    >>> double: PatchDeltaOperator = lambda activation, direction: 2 * direction
    >>> with vector.apply(model, operator=double):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    """

    def __call__(self, activation: Tensor, direction: Tensor, /) -> Tensor:
        """Return what is to be added to the activation."""


def addition_operator() -> PatchDeltaOperator:
    """Add the direction: ``h + d``. The default.

    Source: activation addition, arXiv 2308.10248; contrastive activation addition, arXiv 2312.06681.

    >>> addition_operator()(torch.ones(1, 1, 2), torch.tensor([0.0, 3.0]))
    tensor([0., 3.])
    """
    return _Addition()


def ablation_operator() -> PatchDeltaOperator:
    """Take away the activation's part along the direction: ``h − (h·u)u`` with ``u = d / ‖d‖``.

    The multiplier's size and sign do nothing: it only matters whether it is 0. Nor does the direction's length; one of
    zeros changes nothing.

    Source: directional ablation, arXiv 2406.11717, equation 4.

    >>> ablation_operator()(torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.0, 3.0]))
    tensor([[[-0., -2.]]])
    """
    return _Ablation()


def ablation_then_addition_operator() -> PatchDeltaOperator:
    """Replace the activation's part along the direction by the direction: ``h − (h·u)u + d`` with ``u = d / ‖d‖``.

    Afterwards the projection on ``u`` is ``‖d‖``, whatever it was before. A direction of zeros changes nothing.

    >>> operator = ablation_then_addition_operator()
    >>> operator(torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.0, 3.0]))
    tensor([[[0., 1.]]])
    """
    return _AblationThenAddition()


def clamp_operator(min: float | None = None, max: float | None = None) -> PatchDeltaOperator:  # noqa: A002
    """Bring the activation's projection on the direction between bounds: ``h + (clamp(p) − p)u``, ``p = h·u``.

    The multiplier's size does nothing: it only matters whether it is 0, and where it is negative ``u``, the direction
    at norm 1, points the other way. ``min`` alone lifts what lies below it and leaves the rest, ``max`` alone caps,
    equal bounds set the projection. They are in the activation's units: see :func:`~steering_vectors.residual_norms`.
    A direction of zeros changes nothing.

    Raises TypeError for bounds that are no numbers, and ValueError for none at all, for an infinite one, and where
    ``min`` is above ``max``.

    Source: for ``min`` alone, steering to a target projection, arXiv 2604.08169.

    >>> clamp_operator(min=1.0)(torch.tensor([[[0.5, 2.0]]]), torch.tensor([3.0, 0.0]))
    tensor([[[0.5000, 0.0000]]])
    """
    given = {"min": min, "max": max}
    bounds = [finite_number(bound, f"{name} of clamp_operator") for name, bound in given.items() if bound is not None]
    if not bounds:
        raise ValueError("clamp_operator needs a bound: give min, max or both")
    if bounds[0] > bounds[-1]:
        raise ValueError(f"clamp_operator needs min to be at most max, got min={min} and max={max}")
    return _Clamp(min, max)


def rotation_operator(angle: float) -> PatchDeltaOperator:
    """Turn the activation by ``angle`` radians towards the direction, in the plane of the two; its norm stays.

    The multiplier's size does nothing: it only matters whether it is 0, and where it is negative the activation turns
    away. ``h cos(angle) + ‖h‖ t sin(angle)``, where ``t`` is the part of ``u = d / ‖d‖`` at right angles to ``h``, at
    norm 1. An angle beyond the one between the two turns past the direction. Where ``h`` is along the direction,
    or one of them is zero, there is no plane, and nothing changes.

    Raises TypeError for an angle that is no number, and ValueError for one that isn't finite.

    Source: rotation that preserves the norm, arXiv 2510.26243 and 2601.19375; there in one plane for all activations.

    >>> operator = rotation_operator(torch.pi / 2)
    >>> operator(torch.tensor([[[0.0, 2.0]]]), torch.tensor([3.0, 0.0]))
    tensor([[[ 2., -2.]]])
    """
    return _Rotation(finite_number(angle, "the angle of rotation_operator"))


def norm_preserving_operator(operator: PatchDeltaOperator) -> PatchDeltaOperator:
    """Bring what another operator gives to the norm that the activation had: ``h′ ‖h‖ / ‖h′‖``.

    ``h′`` is ``h + operator(h, d)``. An activation that the operator would make zero stays as it is.

    Raises TypeError for what can't be called with an activation and a direction.

    Source: arXiv 2606.06735 tells what a steering does to angle and norm apart.

    >>> operator = norm_preserving_operator(addition_operator())
    >>> operator(torch.tensor([[[3.0, 4.0]]]), torch.tensor([0.0, -4.0]))
    tensor([[[ 2., -4.]]])
    """
    check_operator(operator)
    return _NormPreserving(operator)


def check_operator(operator: object) -> None:
    """Raise TypeError for what is no operator, also for a function that makes one."""
    check_takes(operator, 2, "operator", "ablation_operator()")


def unit_direction(direction: Tensor) -> Tensor:
    """The direction at norm 1, or zeros for zeros, with finite gradients there too."""
    wide = _wide(direction)
    norm = _norm(wide)
    return (wide / torch.where(norm > 0, norm, 1)).to(direction.dtype)


@dataclass(frozen=True)
class _Addition:
    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        return direction

    def __repr__(self) -> str:
        return "addition_operator()"


@dataclass(frozen=True)
class _Ablation:
    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        unit = unit_direction(direction)
        return -(activation * unit).sum(dim=-1, keepdim=True) * unit

    def __repr__(self) -> str:
        return "ablation_operator()"


@dataclass(frozen=True)
class _AblationThenAddition:
    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        return direction + _Ablation()(activation, direction)

    def __repr__(self) -> str:
        return "ablation_then_addition_operator()"


@dataclass(frozen=True)
class _Clamp:
    min: float | None
    max: float | None

    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        unit = unit_direction(_wide(direction))
        projection = (_wide(activation) * unit).sum(dim=-1, keepdim=True)
        return ((projection.clamp(self.min, self.max) - projection) * unit).to(_promoted(activation, direction))

    def __repr__(self) -> str:
        bounds = [f"{name}={bound}" for name, bound in (("min", self.min), ("max", self.max)) if bound is not None]
        return f"clamp_operator({', '.join(bounds)})"


@dataclass(frozen=True)
class _Rotation:
    angle: float

    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        wide, unit = _wide(activation), unit_direction(_wide(direction))
        own = unit_direction(wide)
        aside = unit - (unit * own).sum(dim=-1, keepdim=True) * own
        # Of a direction along the activation only rounding is left, which must not be blown up to a plane.
        square = (aside * aside).sum(dim=-1, keepdim=True)
        has_plane = square > (4 * torch.finfo(activation.dtype).eps) ** 2
        aside = aside * torch.where(has_plane, square, 1).rsqrt()
        delta = (math.cos(self.angle) - 1) * wide + math.sin(self.angle) * _norm(wide) * aside
        return torch.where(has_plane, delta, 0).to(_promoted(activation, direction))

    def __repr__(self) -> str:
        return f"rotation_operator({self.angle})"


@dataclass(frozen=True)
class _NormPreserving:
    operator: PatchDeltaOperator

    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        wide = _wide(activation)
        steered = wide + self.operator(activation, direction)
        norm = _norm(steered)
        delta = _norm(wide) / torch.where(norm > 0, norm, 1) * steered - wide
        return torch.where(norm > 0, delta, 0).to(_promoted(activation, direction))

    def __repr__(self) -> str:
        return f"norm_preserving_operator({self.operator!r})"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _promoted(activation: Tensor, direction: Tensor) -> torch.dtype:
    return torch.promote_types(activation.dtype, direction.dtype)


def _norm(wide: Tensor) -> Tensor:
    """Euclidean norms ``(…, 1)``, with finite gradients at zero too."""
    # Dividing by the largest number first keeps small and large ones from vanishing or overflowing in their squares.
    largest = wide.detach().abs().amax(dim=-1, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, 1)
    square = (scaled * scaled).sum(dim=-1, keepdim=True)
    return torch.where(square > 0, largest * torch.where(square > 0, square, 1).sqrt(), 0)
