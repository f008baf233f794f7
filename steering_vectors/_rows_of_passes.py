"""Record the passes of a model, join their rows to sequences, and cut their text into tokens."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

from steering_vectors._extraction import shared_prefix
from steering_vectors._models import Attachment, anatomy_of
from steering_vectors._passes import Need, PassTracker

T = TypeVar("T")
R = TypeVar("R", bound="Recorder")
# Of each row of a pass: its token ids (None if the model got embeddings), their indices, and a value for each.
PassRows = tuple[list[list[int | None]], list[list[int]], list[list[T]]]


class Recorder(ABC):
    """Record of a model's passes, which are noted inside its block. It keeps no model alive.

    ``name`` is what it is called in its error, and ``made_by`` the call that makes one.
    """

    def __init__(self, model: nn.Module, name: str, made_by: str) -> None:
        self._model = weakref.ref(model)
        self._called = name, made_by
        self._tracker: PassTracker | None = None

    @abstractmethod
    def _attachments(self, model: nn.Module) -> Sequence[Attachment]:
        """Return what notes the passes. It may not keep the record, which would then stay attached when dropped."""

    def __enter__(self: R) -> R:
        model = self._model()
        if model is None:
            name, made_by = self._called
            raise RuntimeError(f"the model of this {name} no longer exists: make a new {name} with {made_by}")
        self._tracker = PassTracker(anatomy_of(model).pass_modules, Need.POSITIONS)
        self._tracker.start(self._attachments(model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def __del__(self) -> None:
        self._stop()  # after an interrupt while the block was left

    def _stop(self) -> None:
        tracker = getattr(self, "_tracker", None)
        if tracker is not None:
            try:
                tracker.stop()
            except BaseException:  # an interrupt: what it left undone is done now
                tracker.stop()
                raise


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
