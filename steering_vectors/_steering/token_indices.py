"""Selectors from lists of token indices, slices and masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from steering_vectors._arguments import check_takes, is_whole_number
from steering_vectors._models import expand_rows
from steering_vectors.token_selection import (
    Selector,
    TokenPositions,
    from_index,
    integer,
    is_one_of,
)

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


def one_selection(
    min_token_index: int | None, token_indices: TokenSelection | None, tokens: TokenSelection | None
) -> Selector | None:
    """Return the selector for the three arguments by which ``apply`` takes one; None means all tokens.

    Raises ValueError if more than one is given. The other errors are those of :func:`as_selector`.
    """
    given = {"min_token_index": min_token_index, "token_indices": token_indices, "tokens": tokens}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} were given: choose one of them")
    if min_token_index is not None:
        first = integer(min_token_index, "min_token_index")
        return from_index(first) if first >= 0 else _Slice(first, None, 1)
    selection = token_indices if tokens is None else tokens
    return None if selection is None else as_selector(selection)


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
