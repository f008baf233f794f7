"""Find sequences of token ids in rows, up to each token of a pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from steering_vectors._arguments import is_whole_number
from steering_vectors._tokens.indices import integer
from steering_vectors._tokens.positions import TokenPositions


def is_open(positions: TokenPositions, opening: Sequence[int], closing: Sequence[int] | None) -> Tensor:
    """Return a mask ``(batch, seq)`` of the tokens up to which ``opening`` was the last of the two sequences to end.

    If both end at the same token, the longer one counts as the last. Padding is passed over, and of several texts in
    one row each is looked at alone. Raises ValueError if the pass doesn't show the rows' token ids.
    """
    if positions.row_ids is None:
        raise ValueError(
            "the pass doesn't show the rows' token ids, row_ids: a selector that calls after() must say "
            "needs_row_ids = True of itself"
        )
    is_token = positions.row_ids >= 0
    columns = is_token.shape[1]
    # Each row's tokens without the padding, which is put into one more column.
    place = torch.where(is_token, is_token.cumsum(dim=1) - 1, columns)  # (batch, columns)
    ids = _without_padding(positions.row_ids, place)
    begin = torch.zeros_like(ids)  # the place of the first token of a token's text
    if positions.several_texts:
        begin = _without_padding(place - positions.index, place)
    opened = _last_end(ids, begin, opening)
    is_inside = opened >= begin
    if closing is not None:
        closed = _last_end(ids, begin, closing)
        is_inside &= (opened >= closed) if len(opening) > len(closing) else (opened > closed)
    seq = positions.index.shape[1]
    return is_inside.gather(1, place)[:, -seq:] & (positions.index >= 0)


def _without_padding(values: Tensor, place: Tensor) -> Tensor:
    """Return ``(batch, columns + 1)``: the values at their places, and -1 behind them."""
    batch, columns = values.shape
    return values.new_full((batch, columns + 1), -1).scatter(1, place, values)


def _last_end(ids: Tensor, begin: Tensor, sequence: Sequence[int]) -> Tensor:
    """Return for each token the place of the last one so far at which the sequence ended, or -1."""
    columns, length = ids.shape[1], len(sequence)
    ends = torch.zeros_like(ids, dtype=torch.bool)
    if length <= columns:
        ends[:, length - 1 :] = True
        for offset, token in enumerate(sequence):
            n = columns - length + 1
            ends[:, length - 1 :] &= (ids[:, offset : offset + n] == token) & (
                begin[:, offset : offset + n] == begin[:, length - 1 :]
            )
    place = torch.arange(columns, device=ids.device)
    return torch.where(ends, place, -1).cummax(dim=1).values


def token_ids(tokens: int | Sequence[int], what: str) -> tuple[int, ...]:
    """Return token ids as a tuple. Raises TypeError or ValueError for anything else than one id or some of them."""
    if isinstance(tokens, (str, bytes)) or tokens is None:
        raise TypeError(
            f"{what} takes token ids, got {tokens!r}: for a special token, pass tokenizer.convert_tokens_to_ids(…), "
            f"and for other text tokenizer(…, add_special_tokens=False)['input_ids']"
        )
    if isinstance(tokens, Iterable) and not is_whole_number(tokens):
        ids = tuple(integer(token, what) for token in tokens)
    else:
        ids = (integer(tokens, what),)
    if not ids or min(ids) < 0:
        raise ValueError(f"{what} needs token ids, which are numbers from 0, got {tokens!r}")
    return ids
