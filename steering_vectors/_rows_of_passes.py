"""Join the rows of passes to sequences, and cut their text into tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from steering_vectors._extraction import shared_prefix

T = TypeVar("T")
# Of each row of a pass: its token ids (None if the model got embeddings), their indices, and a value for each.
PassRows = tuple[list[list[int | None]], list[list[int]], list[list[T]]]


def joined_rows(passes: Sequence[PassRows[T]]) -> Iterator[tuple[list[int | None], list[T]]]:
    """Yield the rows that went through the model, with a value for each token; padding has the index -1.

    A pass that continues a cache continues the cache's row.
    """
    rows: list[list[tuple[int | None, T]]] = []
    for ids, index, values in passes:
        if len(rows) != len(ids):
            yield from map(_apart, rows)
            rows = [[] for _ in ids]
        for number, (row_ids, row_index, row_values) in enumerate(zip(ids, index, values, strict=True)):
            tokens = [(i, v) for i, n, v in zip(row_ids, row_index, row_values, strict=True) if n >= 0]
            first = next((n for n in row_index if n >= 0), 0)
            before = [token for token, _ in rows[number]]
            is_new = first == 0 and [token for token, _ in tokens][: len(before)] != before
            if is_new and before:
                yield _apart(rows[number])
            rows[number] = rows[number][:first] + tokens
    yield from map(_apart, rows)


def _apart(row: Sequence[tuple[int | None, T]]) -> tuple[list[int | None], list[T]]:
    return [token for token, _ in row], [value for _, value in row]


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token.

    The row is decoded as a whole, since a token alone may lose its space or be part of a character.
    """
    text = tokenizer.decode(ids)
    pieces, begin = [], 0
    for n in range(len(ids)):
        end = len(text) if n + 1 == len(ids) else shared_prefix(text, tokenizer.decode(ids[: n + 1]))
        pieces.append(text[begin : max(begin, end)])
        begin = max(begin, end)
    return pieces
