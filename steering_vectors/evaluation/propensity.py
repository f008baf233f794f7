"""Propensities: how far the model prefers the answer that matches the behaviour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from steering_vectors.evaluation.items import EvaluationItem, ItemPrompt

# Units of the propensities below, as printed.
UNITS = {"text_propensity()": "nats per token", "choice_propensity()": "nats"}
_QUESTION = "{prompt}\n\nChoices:\n (A) {a}\n (B) {b}\n\nAnswer: ("


class Propensity(Protocol):
    """Any callable from two answers' log-probabilities to a number that grows with the behaviour.

    A function or a lambda will do. It may have the attribute below.

    Attributes:
        asked: A function from an item to the items that are scored in its place. The item's
            propensity is the mean of theirs. Without it, the item itself is scored.

    >>> def total(matching, not_matching):
    ...     return matching.sum() - not_matching.sum()
    >>> float(total(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0])))
    1.0
    """

    def __call__(self, matching: Tensor, not_matching: Tensor, /) -> Any:
        """Return the propensity, from the log-probabilities ``(tokens,)`` of each answer's tokens."""


def text_propensity() -> Propensity:
    """Compare the texts of both answers, in nats per token.

    The propensity is the mean log-probability per token of the matching answer minus that of the
    other. It works for models of every size (arXiv 2410.17245).

    >>> text_propensity()(torch.tensor([-1.0, -2.0]), torch.tensor([-4.0]))
    2.5
    """
    return _TextPropensity()


def choice_propensity() -> Propensity:
    """Compare the letters of two choices that are shown to the model, in nats.

    Each item is asked twice, with the matching answer as (A) and as (B), and the propensity is the
    mean of the two log-odds: a liking for one of the letters cancels out. It is for models that can
    answer multiple-choice questions (arXiv 2312.06681, 2407.12404).

    >>> item = EvaluationItem("Do you like it?", "Yes", "No")
    >>> choice_propensity().asked(item)[1].matching
    'B'
    """
    return _ChoicePropensity()


def name_of(propensity: Propensity) -> str:
    """Return the name of a function, and how any other propensity is printed."""
    return str(getattr(propensity, "__name__", repr(propensity)))


def asked_items(propensity: Propensity, item: EvaluationItem) -> Sequence[EvaluationItem]:
    """Return the items that are scored in place of ``item``."""
    asked: Callable[[EvaluationItem], Sequence[EvaluationItem]] | None = getattr(propensity, "asked", None)
    return [item] if asked is None else asked(item)


@dataclass(frozen=True)
class _TextPropensity:
    def __call__(self, matching: Tensor, not_matching: Tensor) -> float:
        return float(matching.mean() - not_matching.mean())

    def __repr__(self) -> str:
        return "text_propensity()"


@dataclass(frozen=True)
class _ChoicePropensity:
    def __call__(self, matching: Tensor, not_matching: Tensor) -> float:
        return float(matching.sum() - not_matching.sum())

    def asked(self, item: EvaluationItem) -> list[EvaluationItem]:
        first = _with_choices(item.prompt, item.matching, item.not_matching)
        second = _with_choices(item.prompt, item.not_matching, item.matching)
        return [EvaluationItem(first, "A", "B"), EvaluationItem(second, "B", "A")]

    def __repr__(self) -> str:
        return "choice_propensity()"


def _with_choices(prompt: ItemPrompt, a: str, b: str) -> ItemPrompt:
    """Return a prompt that shows both choices and ends where a letter is due."""
    choices = {"a": a.strip(), "b": b.strip()}
    if isinstance(prompt, str):
        return _QUESTION.format(prompt=prompt, **choices)
    question, _, start = _QUESTION.rpartition("\n\n")
    *before, last = prompt
    if last["role"] == "assistant":
        raise ValueError("choice_propensity() asks its question in the user's turn, but the chat ends with an answer")
    return [
        *before,
        {**last, "content": question.format(prompt=_text_of(last), **choices)},
        {"role": "assistant", "content": start},
    ]


def _text_of(message: Mapping[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
