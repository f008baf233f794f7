"""The multiplier of a direction: one number, or one for each row of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A multiplier as users pass it.
Numbers: TypeAlias = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class Multiplier:
    """A factor on the direction, made by :func:`as_multiplier`.

    ``value`` is one number, a tensor ``(rows,)`` with one number for each row of a batch, or a tensor that gradients
    flow to, whose numbers may change between passes.

    The other fields follow from it. They are kept since torch.compile recompiles for other booleans, but not for
    another value. ``changes_nothing`` is True if all numbers are 0 and stay so, ``leaves_rows`` if some row's number is
    0 and stays so.
    """

    value: float | Tensor
    by_row: bool
    is_learned: bool
    changes_nothing: bool
    leaves_rows: bool

    @property
    def largest(self) -> float:
        """The largest number without its sign."""
        return float(self.value.abs().max()) if isinstance(self.value, Tensor) else abs(self.value)

    def times(self, direction: Tensor) -> Tensor:
        """Return the product ``(hidden,)`` or ``(rows, hidden)``. A row whose number is 0 gets the direction."""
        if not isinstance(self.value, Tensor) or not self.by_row:
            return self.value * direction
        rows = self.value
        if self.leaves_rows:  # an operator might return NaN for zeros, which would spoil the other rows' gradients
            rows = torch.where(rows == 0, 1, rows)
        return rows.to(direction.dtype).to(direction.device)[:, None] * direction.reshape(1, -1)

    def is_zero(self, device: torch.device) -> Tensor:
        """Return True where the number is 0: a scalar tensor, or ``(rows,)``."""
        return torch.as_tensor(self.value, device=device) == 0

    def __repr__(self) -> str:
        if not isinstance(self.value, Tensor):
            return repr(self.value)
        return repr(self.value.tolist()) if self.value.numel() <= 4 else f"{self.value.numel()} numbers"


def as_multiplier(given: Any) -> Multiplier:
    """Check a multiplier that a user passed.

    Raises TypeError unless it is one number, or one for each row, and ValueError unless all are finite.
    """
    wanted = "multiplier must be one number, or a sequence or 1-D tensor with one number for each row"
    if isinstance(given, Mapping):
        raise TypeError(
            f"{wanted}, got {type(given).__name__}; for one number for each layer, use vector.scaled({given!r})"
        )
    if isinstance(given, (str, bytes)):
        raise TypeError(f"{wanted}, got {given!r}")
    try:
        numbers = _as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}, got {type(given).__name__}") from error
    if numbers.ndim > 1 or numbers.is_complex():
        raise TypeError(f"{wanted}, got {type(given).__name__} of shape {tuple(numbers.shape)}")
    if numbers.numel() == 0:
        raise ValueError("multiplier is empty: pass one number, or one for each row")
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
    if isinstance(given, Tensor):
        return given
    learned = [n for n in given if isinstance(n, Tensor) and n.requires_grad] if isinstance(given, Sequence) else []
    if learned:
        return torch.stack([torch.as_tensor(number, device=learned[0].device) for number in given])
    return torch.as_tensor(given, dtype=torch.float64, device="cpu")
