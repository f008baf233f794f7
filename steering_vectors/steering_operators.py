"""Operators: from an activation and a direction to the change of the activation.

An operator is any callable that gets the activation ``(batch, seq, hidden)`` and the direction times the multiplier,
of a shape that broadcasts to it, both in the activation's dtype, and returns what is to be added to the activation. The
result is computed for all tokens and added to the selected ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

PatchDeltaOperator: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def addition_operator() -> PatchDeltaOperator:
    """Add the direction: ``h + d``. The default.

    Source: activation addition, arXiv 2308.10248; contrastive activation addition, arXiv 2312.06681.

    >>> addition_operator()(torch.ones(1, 1, 2), torch.tensor([0.0, 3.0]))
    tensor([0., 3.])
    """
    return _Addition()


def ablation_operator() -> PatchDeltaOperator:
    """Take away the activation's part along the direction: ``h − (h·u)u`` with ``u = d / ‖d‖``.

    The length and sign of the direction do nothing here, and so neither does the size of the multiplier: it only
    matters whether it is 0. A direction of zeros changes nothing.

    Source: directional ablation, arXiv 2406.11717, equation 4.

    >>> ablation_operator()(torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.0, 3.0]))
    tensor([[[-0., -2.]]])
    """
    return _Ablation()


def ablation_then_addition_operator() -> PatchDeltaOperator:
    """Replace the activation's part along the direction by the direction: ``h − (h·u)u + d`` with ``u = d / ‖d‖``.

    Afterwards the projection on ``u`` is ``‖d‖``, whatever it was before. A direction of zeros changes nothing.

    >>> ablation_then_addition_operator()(torch.tensor([[[1.0, 2.0]]]), torch.tensor([0.0, 3.0]))
    tensor([[[0., 1.]]])
    """
    return _AblationThenAddition()


@dataclass(frozen=True)
class _Addition:
    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        return direction

    def __repr__(self) -> str:
        return "addition_operator()"


@dataclass(frozen=True)
class _Ablation:
    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        unit = _unit(direction)
        return -(activation * unit).sum(dim=-1, keepdim=True) * unit

    def __repr__(self) -> str:
        return "ablation_operator()"


@dataclass(frozen=True)
class _AblationThenAddition:
    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        return direction + _Ablation()(activation, direction)

    def __repr__(self) -> str:
        return "ablation_then_addition_operator()"


def _unit(direction: Tensor) -> Tensor:
    """The direction at norm 1, or zeros for zeros, with finite gradients there too."""
    wide = direction.to(torch.promote_types(direction.dtype, torch.float32))  # squares overflow float16
    # Dividing by the largest number first keeps tiny directions from vanishing in their squares.
    largest = wide.detach().abs().amax(dim=-1, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, 1)
    square = (scaled * scaled).sum(dim=-1, keepdim=True)
    unit = scaled * torch.where(square > 0, square, 1).rsqrt()
    return torch.where(square > 0, unit, 0).to(direction.dtype)
