"""Evaluation items: a prompt, the answer that shows the behaviour, and one that doesn't."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

ItemPrompt: TypeAlias = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EvaluationItem:
    """A prompt with an answer that matches the behaviour, and one that doesn't.

    The answer to a text follows it as it is, so it should begin with a space if it needs one. The
    answer to a chat is the assistant's next turn.

    Args:
        prompt: A text or a list of chat messages.
        matching: The text of an answer that shows the behaviour.
        not_matching: The text of an answer that doesn't.

    >>> EvaluationItem("The film was", " wonderful.", " terrible.").matching
    ' wonderful.'
    """

    prompt: ItemPrompt
    matching: str
    not_matching: str


NAMES = tuple(field.name for field in fields(EvaluationItem))


def as_items(items: Iterable[Any]) -> list[EvaluationItem]:
    """Return the items as :class:`EvaluationItem`. Raises TypeError or ValueError for anything else, and for none."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise TypeError(f"items must be a list or another iterable of items, got {type(items).__name__}")
    found = [_as_item(item, f"item {number}") for number, item in enumerate(items)]
    if not found:
        raise ValueError("items is empty: give at least one (prompt, matching, not_matching)")
    return found


def _as_item(item: Any, name: str) -> EvaluationItem:
    expected = "an item is (prompt, matching, not_matching)"
    if isinstance(item, Mapping):
        if set(item) != set(NAMES):
            raise ValueError(f"{name} has the keys {sorted(map(str, item))}; it needs {', '.join(NAMES)}")
        item = EvaluationItem(**item)
    elif isinstance(item, (tuple, list)) and not isinstance(item, EvaluationItem):
        if len(item) == 2:
            raise ValueError(f"{name} has two parts, as training pairs have; {expected}")
        if len(item) != 3:
            raise ValueError(f"{name} has {len(item)} parts; {expected}")
        item = EvaluationItem(*item)
    if not isinstance(item, EvaluationItem):
        raise TypeError(f"{name} is a {type(item).__name__}; {expected}")
    _check_answers(item, name)
    return item


def _check_answers(item: EvaluationItem, name: str) -> None:
    for side in ("matching", "not_matching"):
        answer = getattr(item, side)
        if not isinstance(answer, str):
            raise TypeError(f"{name}: {side} must be a text, got {type(answer).__name__}")
        if not answer:
            raise ValueError(f"{name}: {side} is empty")
    if item.matching == item.not_matching:
        raise ValueError(f"{name}: both answers are {item.matching!r}, so it can't tell anything apart")
