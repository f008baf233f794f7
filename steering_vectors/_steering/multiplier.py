"""The multiplier of a direction: one number, or one for each row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

# What users give as a multiplier.
Numbers: TypeAlias = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A factor on the direction, as :func:`as_multiplier` makes it.

    ``value`` is one number, a tensor ``(rows,)`` of one for each row of a batch, or a tensor that gradients flow to,
    whose numbers may change between passes.

    The rest follows from it. It is kept here since code that torch.compile makes is made anew for other booleans, but
    not for another value. ``changes_nothing``: all is 0, and stays so. ``leaves_rows``: some row's number is 0, and
    stays so.
    """

    value: float | Tensor
    by_row: bool
    is_learned: bool
    changes_nothing: bool
    leaves_rows: bool

    def times(self, direction: Tensor) -> Tensor:
        """Return the product ``(hidden,)`` or ``(rows, hidden)``; for a row that is left alone, the direction."""
        if not isinstance(self.value, Tensor) or not self.by_row:
            return self.value * direction
        rows = self.value
        if self.leaves_rows:  # an operator might make NaN of zeros, whose gradients spoil those of other rows
            rows = torch.where(rows == 0, 1, rows)
        return rows.to(direction.dtype).to(direction.device)[:, None] * direction.reshape(1, -1)

    def is_zero(self, device: torch.device) -> Tensor:
        """Return a mask of the numbers that are 0: one number, or ``(rows,)``."""
        return (torch.as_tensor(self.value) == 0).to(device)

    def __repr__(self) -> str:
        if not isinstance(self.value, Tensor):
            return repr(self.value)
        return repr(self.value.tolist()) if self.value.numel() <= 4 else f"{self.value.numel()} numbers"


def as_multiplier(given: Any) -> Multiplier:
    """Check a multiplier that a user gave.

    Raises TypeError unless it is one number, or one for each row, and ValueError unless all are finite.
    """
    wanted = "multiplier must be one number, or a sequence or 1-D tensor of one for each row"
    if isinstance(given, (str, bytes)):
        raise TypeError(f"{wanted}, got {given!r}")
    try:
        numbers = _as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}, got {type(given).__name__}") from error
    if numbers.ndim > 1 or numbers.is_complex():
        raise TypeError(f"{wanted}, got {type(given).__name__} of shape {tuple(numbers.shape)}")
    if numbers.numel() == 0:
        raise ValueError("multiplier is empty: give one number, or one for each row")
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"multiplier must be finite, got {given}")
    if numbers.requires_grad:
        return Multiplier(numbers, numbers.ndim == 1, is_learned=True, changes_nothing=False, leaves_rows=False)
    numbers = numbers.detach().cpu().double()
    is_zero, by_row = numbers == 0, numbers.numel() > 1
    return Multiplier(
        numbers if by_row else float(numbers),
        by_row,
        is_learned=False,
        changes_nothing=bool(is_zero.all()),
        leaves_rows=by_row and bool(is_zero.any()),
    )


def _as_tensor(given: Any) -> Tensor:
    """Return the numbers as a tensor, with their gradients."""
    if isinstance(given, Sequence) and any(isinstance(number, Tensor) and number.requires_grad for number in given):
        return torch.stack([torch.as_tensor(number) for number in given])
    return given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=torch.float64)
