"""Selectors from lists of token indices, slices and masks."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steering_vectors._arguments import check_takes, is_whole_number
from steering_vectors._models import expand_rows
from steering_vectors._tokens.positions import Selector, TokenPositions

TokenSelection: TypeAlias = Selector | Sequence[int] | slice | Tensor


def as_selector(tokens: TokenSelection) -> Selector:
    """Return the selector for a list, slice, mask tensor or callable.

    In lists and slices, numbers from 0 on count own tokens. Negative numbers count columns from the end of each pass.
    A mask ``(seq,)`` or ``(batch, seq)`` is by column; columns beyond it are not selected.

    Raises TypeError for anything else. Raises ValueError for a mask that holds numbers other than 0 and 1 or has
    another number of dimensions, and for a slice with a step below 1.
    """
    if isinstance(tokens, Tensor):
        return _column_mask(tokens)
    if callable(tokens):
        check_takes(tokens, 1, "a selector", "from_index(1)")
        return tokens
    if isinstance(tokens, slice):
        start, stop = (None if n is None else integer(n, "a slice of tokens") for n in (tokens.start, tokens.stop))
        step = 1 if tokens.step is None else integer(tokens.step, "a slice of tokens")
        if step < 1:
            raise ValueError(f"a slice of tokens needs a step of at least 1, got {tokens}")
        return _Slice(start, stop, step)
    if isinstance(tokens, Sequence) and not isinstance(tokens, str):
        return _Indices(tuple(integer(n, "token_indices") for n in tokens))
    one = f": for one token, pass a list, [{tokens!r}]" if is_whole_number(tokens) else ""
    raise TypeError(
        f"tokens must be a selector such as generated(inputs), a list of token indices, a slice or a mask tensor, "
        f"got {type(tokens).__name__}{one}"
    )


@dataclass(frozen=True)
class _Indices:
    """A list of token indices, which count own tokens or, where negative, columns from the end of each pass."""

    indices: tuple[int, ...]
    rows = 1
    needs_prompt_length = False

    @property
    def counts_from_end(self) -> bool:
        return min(self.indices, default=0) < 0

    def __repr__(self) -> str:
        return str(list(self.indices))

    def __call__(self, positions: TokenPositions) -> Tensor:
        from_start = is_one_of(positions.index, tuple(n for n in self.indices if n >= 0))
        if not self.counts_from_end:
            return from_start
        _check_one_text(positions)
        return from_start | is_one_of(_from_end(positions), tuple(n for n in self.indices if n < 0))


@dataclass(frozen=True)
class _Slice:
    """A slice of tokens, with bounds that count as in :class:`_Indices`."""

    start: int | None
    stop: int | None
    step: int
    rows = 1
    needs_prompt_length = False

    @property
    def counts_from_end(self) -> bool:
        return min(self.start or 0, self.stop or 0) < 0

    def __repr__(self) -> str:
        return repr(slice(self.start, self.stop, self.step))

    def __call__(self, positions: TokenPositions) -> Tensor:
        if self.counts_from_end:
            _check_one_text(positions)
        index, from_end = positions.index, _from_end(positions)
        start = 0 if self.start is None else max(self.start, -index.shape[1])  # as Python clamps it
        counted = from_end - start if start < 0 else index - start
        mask = (counted >= 0) & (counted % self.step == 0)
        if start >= 0:
            mask = mask & (index >= 0)
        if self.stop is not None:
            mask = mask & ((index if self.stop >= 0 else from_end) < self.stop)
        return mask


@dataclass(frozen=True, eq=False)
class _ColumnMask:
    mask: Tensor  # (rows, columns + 1), bool; the last column is used for all columns beyond
    copies: dict[torch.device, Tensor] = field(default_factory=dict)
    counts_from_end = needs_prompt_length = False

    def __call__(self, positions: TokenPositions) -> Tensor:
        _check_one_text(positions)
        device = positions.index.device
        if device not in self.copies:
            self.copies[device] = self.mask.to(device)
        mask = expand_rows(self.copies[device], positions.index.shape[0], "the mask of tokens")
        return mask[:, positions.column.clamp(max=mask.shape[1] - 1)]

    @property
    def rows(self) -> int:
        return self.mask.shape[0]

    def __repr__(self) -> str:
        rows, columns = self.mask.shape
        return f"mask of shape {(rows, columns - 1)}"


def _column_mask(mask: Tensor) -> _ColumnMask:
    if mask.ndim not in (1, 2) or mask.numel() == 0:
        raise ValueError(f"a mask of tokens must have the shape (seq,) or (batch, seq), got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("a mask of tokens must hold only 0 and 1; to select tokens by index, pass a list")
    rows = mask.detach().bool().reshape(-1, mask.shape[-1])
    return _ColumnMask(torch.nn.functional.pad(rows, (0, 1)))


def _check_one_text(positions: TokenPositions) -> None:
    if positions.several_texts:
        raise ValueError(
            "negative numbers and masks count columns of the pass, which mean nothing in rows that hold several texts: "
            "steer by token indices from 0"
        )


def _from_end(positions: TokenPositions) -> Tensor:
    """Return the columns counted from the end of the pass, as negative numbers: ``(batch, seq)``."""
    seq = positions.index.shape[1]
    return torch.arange(-seq, 0, device=positions.index.device).expand_as(positions.index)


def per_row(numbers: int | tuple[int, ...], positions: TokenPositions, what: str) -> Tensor | Any:
    if isinstance(numbers, int) or len(numbers) == 1:
        return numbers if isinstance(numbers, int) else numbers[0]
    rows = _rows_on(numbers, positions.index.device)
    return expand_rows(rows, positions.index.shape[0], what)[:, None]


@lru_cache(maxsize=64)  # a decoding step must not copy from host to device
def _rows_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


def is_one_of(values: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Return a mask, of the same shape, of the ``values`` that are among ``numbers``."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    for number in numbers:
        mask = mask | (values == number)
    return mask


def integer(value: object, what: str) -> int:
    """Return ``value`` as an int. Raises TypeError unless it is one whole number."""
    if isinstance(value, bool):
        raise TypeError(f"{what} takes token indices, got {value}; for a mask, pass a tensor")
    if not is_whole_number(value):
        raise TypeError(f"{what} takes whole numbers, got {value!r}")
    return operator.index(value)  # type: ignore[arg-type]
