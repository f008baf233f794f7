"""Operators: callables from an activation and a direction to the change of the activation.

:class:`PatchDeltaOperator` specifies an operator's arguments and its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from steering_vectors._arguments import asked_keywords, check_takes, finite_number, is_whole_number
from steering_vectors._precision import wide


class PatchDeltaOperator(Protocol):
    """Any callable from an activation and a direction to the tensor that is added to the activation.

    A function or a lambda will do; it needs no attributes. It must not change its arguments. The
    result may have any dtype, and any shape that broadcasts to the activation. It is computed for
    all tokens, converted to the activation's dtype, and added at the selected tokens. An operator
    that returns its argument unchanged, ``return direction``, costs a single addition.

    ``*`` and ``+`` promote, so their results are in float32 too. Matrix products don't promote:
    write ``h.float() @ d``, or ``h @ d.to(h.dtype)``.

    An operator may ask where it is by keyword-only parameters, ``layer``, ``positions`` or both:
    ``operator(activation, direction, *, layer, positions)``. ``layer`` is the layer's number from
    0. ``positions`` is the pass's :class:`~steering_vectors.TokenPositions`, on the activation's
    device. The signature is read when the steering is made. Parameters that may be positional keep
    their defaults, as ``layer`` in ``lambda h, d, layer=layer: …`` does.

    An operator that asks for positions may have the attributes of a
    :class:`~steering_vectors.Selector`, with the same meaning. Any operator may have
    ``only_layers``, the numbers of the layers that it can steer: others are refused.

    Args:
        activation: The activation ``(batch, seq, hidden)``, or of whichever shape the layer has, in
            the model's dtype.
        direction: The direction times the multiplier, in a shape that broadcasts to the activation.
            It is in float32, or in float64 if the model is, so that it neither vanishes nor
            overflows in half precision.

    >>> double: PatchDeltaOperator = lambda activation, direction: 2 * direction
    >>> with vector.apply(model, operator=double):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    >>> def fading(activation, direction, *, layer, positions):
    ...     age = positions.index.clamp(min=0)[..., None]
    ...     return direction * 0.9 ** (age + layer)
    >>> with vector.apply(model, operator=fading):
    ...     output = model.generate(**inputs, max_new_tokens=4)
    """

    def __call__(self, activation: Tensor, direction: Tensor, /) -> Tensor:
        """Return the tensor to add to the activation."""


def addition_operator() -> PatchDeltaOperator:
    """Add the direction: ``h + d``. This is the default.

    Source: activation addition, arXiv 2308.10248; contrastive activation addition, arXiv
    2312.06681.

    >>> addition_operator()(torch.ones(1, 1, 2), torch.tensor([0.0, 3.0]))
    tensor([0., 3.])
    """
    return _Addition()


def ablation_operator() -> PatchDeltaOperator:
    """Remove the activation's component along the direction: ``h − (h·u)u`` with ``u = d / ‖d‖``.

    The multiplier's size and sign don't matter, except that 0 changes nothing. The direction's
    length doesn't matter either, except that a direction of zeros changes nothing.

    Source: directional ablation, arXiv 2406.11717, equation 4.

    >>> ablation_operator()(torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.0, 3.0]))
    tensor([[[-0., -2.]]])
    """
    return _Ablation()


def ablation_then_addition_operator() -> PatchDeltaOperator:
    """Replace the activation's component along the direction by the direction.

    ``h`` becomes ``h − (h·u)u + d`` with ``u = d / ‖d‖``.

    Afterwards the projection on ``u`` is ``‖d‖``, whatever it was before. A direction of zeros
    changes nothing.

    >>> operator = ablation_then_addition_operator()
    >>> operator(torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.0, 3.0]))
    tensor([[[0., 1.]]])
    """
    return _AblationThenAddition()


def clamp_operator(
    min: float | Mapping[int, float] | None = None,  # noqa: A002
    max: float | Mapping[int, float] | None = None,  # noqa: A002
) -> PatchDeltaOperator:
    """Clamp the activation's projection on the direction: ``h + (clamp(p) − p)u`` with ``p = h·u``.

    ``u`` is the direction at norm 1. Equal bounds set the projection. The bounds are in the
    activation's units: see :func:`~steering_vectors.residual_norms`. The multiplier's size doesn't
    matter, except that 0 changes nothing. A negative multiplier makes ``u`` point the other way. A
    direction of zeros changes nothing.

    A bound may be a mapping from layers to numbers, such as those of
    :func:`~steering_vectors.projection_quantiles`. Layers that it lacks can't be steered.

    Source: for ``min`` alone, steering to a target projection, arXiv 2604.08169; with bounds by
    layer, activation capping, arXiv 2601.10387.

    Args:
        min: The bound to which lower projections are raised, one number or one by layer number;
            None for no such bound.
        max: The bound to which higher projections are lowered, in the same form; None for no such
            bound.

    Raises:
        TypeError: If a bound is not a number, or a layer not a whole number.
        ValueError: If both bounds are missing, if one isn't finite, if ``min`` is above ``max``, or
            if no layer has all bounds. In the call of ``apply``, if a layer lacks a bound.

    >>> clamp_operator(min=1.0)(torch.tensor([[[0.5, 2.0]]]), torch.tensor([3.0, 0.0]))
    tensor([[[0.5000, 0.0000]]])
    >>> clamp_operator(min={1: 1.0})
    clamp_operator(min={1: 1.0})
    """
    given = {name: bound for name, bound in (("min", min), ("max", max)) if bound is not None}
    if not given:
        raise ValueError("clamp_operator needs a bound: pass min, max or both")
    by_layer = [_bounds_by_layer(name, bound) for name, bound in given.items() if isinstance(bound, Mapping)]
    layers = sorted(set.intersection(*map(set, by_layer))) if by_layer else [None]
    if not layers:
        raise ValueError("clamp_operator needs a layer that has all bounds, but no layer is in all mappings")
    for layer in layers:
        bounds = [finite_number(_bound_at(bound, layer), f"{name} of clamp_operator") for name, bound in given.items()]
        if bounds[0] > bounds[-1]:
            where = "" if layer is None else f" at layer {layer}"
            raise ValueError(
                f"clamp_operator needs min to be at most max, got min={bounds[0]:g} and max={bounds[-1]:g}{where}"
            )
    low, high = (_bounds_by_layer(n, b) if isinstance(b, Mapping) else b for n, b in (("min", min), ("max", max)))
    return _ClampByLayer(low, high) if by_layer else _Clamp(low, high)  # type: ignore[arg-type]  # numbers or None


def rotation_operator(angle: float) -> PatchDeltaOperator:
    """Rotate the activation by ``angle`` radians towards the direction, keeping its norm.

    The rotation is in the plane of the two. The result is ``h cos(angle) + ‖h‖ t sin(angle)``,
    where ``t`` is the component of ``u = d / ‖d‖`` orthogonal to ``h``, at norm 1. The multiplier's
    size doesn't matter, except that 0 changes nothing. A negative multiplier rotates away from the
    direction. Nothing changes where ``h`` is along the direction or one of them is zero, since the
    two span no plane.

    Source: norm-preserving rotation, arXiv 2510.26243 and 2601.19375, which use one plane for all
    activations.

    Args:
        angle: The angle in radians. One larger than the angle between the two rotates past the
            direction.

    Raises:
        TypeError: If ``angle`` is not a number.
        ValueError: If ``angle`` isn't finite or is more than a whole turn; such angles are probably
            degrees.

    >>> operator = rotation_operator(torch.pi / 2)
    >>> operator(torch.tensor([[[0.0, 2.0]]]), torch.tensor([3.0, 0.0]))
    tensor([[[ 2., -2.]]])
    """
    radians = finite_number(angle, "the angle of rotation_operator")
    if abs(radians) > 2 * math.pi:
        raise ValueError(
            f"the angle of rotation_operator is in radians, at most 2π either way, got {radians:g}: for {radians:g} "
            f"degrees pass {math.radians(radians):.4g}"
        )
    return _Rotation(radians)


def norm_preserving_operator(operator: PatchDeltaOperator | Callable[..., Tensor]) -> PatchDeltaOperator:
    """Rescale another operator's result to the activation's norm.

    The result is ``h′ ‖h‖ / ‖h′‖`` with ``h′ = h + operator(h, d)``. An activation that the
    operator would make zero is left unchanged. It asks for the layer and for positions if the other
    operator does.

    Source: arXiv 2606.06735, which separates a steering's effects on angle and on norm.

    Args:
        operator: The operator whose result is rescaled.

    Raises:
        TypeError: If ``operator`` can't be called with an activation and a direction.

    >>> operator = norm_preserving_operator(addition_operator())
    >>> operator(torch.tensor([[[3.0, 4.0]]]), torch.tensor([0.0, -4.0]))
    tensor([[[ 2., -4.]]])
    """
    check_operator(operator)
    return _NormPreserving(operator)


def check_operator(operator: object) -> None:
    """Raise TypeError unless ``operator`` is an operator. A function that makes operators is not one."""
    hint = " Operators that get the activation alone are for steer(model, operator)"
    check_takes(operator, 2, "operator", "ablation_operator()", keywords=asked_of(operator), hint=hint)


def check_operator_alone(operator: object) -> None:
    """Raise TypeError unless ``operator`` can be called with an activation alone, without a direction."""
    example, hint = "lambda activation: -0.1 * activation", " Operators that get a direction are for vector.apply"
    check_takes(operator, 1, "operator", example, keywords=asked_of(operator), hint=hint)


def asked_of(operator: object) -> tuple[str, ...]:
    """Return ``layer`` and ``positions``, as far as the operator asks for them by keyword-only parameters."""
    return asked_keywords(operator, ("layer", "positions"))


def check_layers(operator: object, numbers: Iterable[int]) -> None:
    """Raise ValueError if ``operator`` has ``only_layers`` that lack one of the layers with these numbers."""
    only = getattr(operator, "only_layers", None)
    if only is not None and (lacking := [number for number in numbers if number not in only]):
        raise ValueError(
            f"the operator {operator!r} is for layers {sorted(only)} only, but the steering has layers {lacking} too: "
            f"leave these out, or make the operator for all of them"
        )


def unit_direction(direction: Tensor) -> Tensor:
    """Return the direction at norm 1, or zeros for zeros; gradients are finite there too."""
    exact = wide(direction)
    norm = _norm(exact)
    return (exact / torch.where(norm > 0, norm, 1)).to(direction.dtype)


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
        unit = unit_direction(wide(direction))
        projection = (wide(activation) * unit).sum(dim=-1, keepdim=True)
        return ((projection.clamp(self.min, self.max) - projection) * unit).to(_promoted(activation, direction))

    def __repr__(self) -> str:
        return _shown_clamp(self.min, self.max)


@dataclass(frozen=True)
class _ClampByLayer:
    """A clamp of which some bounds are by layer number."""

    min: float | dict[int, float] | None
    max: float | dict[int, float] | None

    def __call__(self, activation: Tensor, direction: Tensor, *, layer: int | None = None) -> Tensor:
        bounds = [None if bound is None else _bound_at(bound, layer) for bound in (self.min, self.max)]
        return _Clamp(*bounds)(activation, direction)

    @property
    def only_layers(self) -> frozenset[int]:
        mappings = [set(bound) for bound in (self.min, self.max) if isinstance(bound, dict)]
        return frozenset(set.intersection(*mappings))

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return _shown_clamp(self.min, self.max)


def _shown_clamp(*bounds: float | dict[int, float] | None) -> str:
    shown = [
        f"{name}={f'{len(bound)} bounds by layer' if isinstance(bound, dict) and len(bound) > 4 else bound}"
        for name, bound in zip(("min", "max"), bounds, strict=True)
        if bound is not None
    ]
    return f"clamp_operator({', '.join(shown)})"


def _bounds_by_layer(name: str, bounds: Mapping[int, float]) -> dict[int, float]:
    """Return bounds by layer, ascending. Raises TypeError or ValueError for what is no layer number or no number."""
    for layer in bounds:
        if not is_whole_number(layer):
            raise TypeError(f"{name} of clamp_operator must map layers to numbers, got the layer {layer!r}")
        if layer < 0:
            raise ValueError(f"{name} of clamp_operator must count layers from 0, got layer {layer}")
    return {
        layer: finite_number(bounds[layer], f"{name} of clamp_operator at layer {layer}") for layer in sorted(bounds)
    }


def _bound_at(bound: float | Mapping[int, float], layer: int | None) -> float:
    if not isinstance(bound, Mapping):
        return bound
    if layer is None or layer not in bound:
        raise ValueError(f"clamp_operator has bounds for layers {list(bound)}, got layer={layer}")
    return bound[layer]


@dataclass(frozen=True)
class _Rotation:
    angle: float

    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        exact, unit = wide(activation), unit_direction(wide(direction))
        unit_activation = unit_direction(exact)
        aside = unit - (unit * unit_activation).sum(dim=-1, keepdim=True) * unit_activation
        # For a direction along the activation only rounding error is left, which must not be scaled up to a plane.
        square = (aside * aside).sum(dim=-1, keepdim=True)
        has_plane = square > (4 * torch.finfo(activation.dtype).eps) ** 2
        aside = aside * torch.where(has_plane, square, 1).rsqrt()
        delta = (math.cos(self.angle) - 1) * exact + math.sin(self.angle) * _norm(exact) * aside
        return torch.where(has_plane, delta, 0).to(_promoted(activation, direction))

    def __repr__(self) -> str:
        return f"rotation_operator({self.angle})"


@dataclass(frozen=True)
class _NormPreserving:
    __wrapped__: PatchDeltaOperator | Callable[..., Tensor]  # so named, its signature is this one's too

    def __call__(self, activation: Tensor, direction: Tensor, **where: Any) -> Tensor:
        exact = wide(activation)
        steered = exact + self.__wrapped__(activation, direction, **where)
        norm = _norm(steered)
        delta = _norm(exact) / torch.where(norm > 0, norm, 1) * steered - exact
        return torch.where(norm > 0, delta, 0).to(_promoted(activation, direction))

    def __repr__(self) -> str:
        return f"norm_preserving_operator({self.__wrapped__!r})"

    def __getattr__(self, name: str) -> Any:
        if name in _ATTRIBUTES:
            return getattr(self.__wrapped__, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


# An operator may have these.
_ATTRIBUTES = ("only_layers", "rows", "counts_from_end", "needs_prompt_length")


def _promoted(activation: Tensor, direction: Tensor) -> torch.dtype:
    return torch.promote_types(activation.dtype, direction.dtype)


def _norm(exact: Tensor) -> Tensor:
    """Return the Euclidean norms ``(…, 1)``, with finite gradients at zero too."""
    # Dividing by the largest number first keeps the squares from vanishing or overflowing.
    largest = exact.detach().abs().amax(dim=-1, keepdim=True)
    scaled = exact / torch.where(largest > 0, largest, 1)
    square = (scaled * scaled).sum(dim=-1, keepdim=True)
    return torch.where(square > 0, largest * torch.where(square > 0, square, 1).sqrt(), 0)
