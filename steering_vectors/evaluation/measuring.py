"""Measure propensities on items, and what steering costs on neutral texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log, nan
from typing import Any

import torch
from torch import Tensor

from steering_vectors.evaluation.continuations import Continuation
from steering_vectors.evaluation.items import EvaluationItem
from steering_vectors.evaluation.manner import Steering
from steering_vectors.evaluation.propensity import Propensity, asked_items
from steering_vectors.evaluation.scoring import AnswerScores, Row, Scorer
from steering_vectors.prompts import answer_ids, prompt_ids

# A likelier first token than this is decided: no steering of this size moves it, so its KL says nothing.
_DECIDED = 0.95
# The tokens of a text that are read before its costs count: the first one is steered by no selector that spares it.
_BEGINNING = 2


@dataclass(frozen=True)
class Question:
    """Both answers to one question of an item, as token ids."""

    item: int
    matching: Continuation
    not_matching: Continuation


@dataclass(frozen=True, eq=False)
class ItemScores:
    """Propensities ``(items, multipliers)``, and the KL at the first tokens of answers, NaN where that is decided."""

    propensities: Tensor
    first_kl: Tensor


@dataclass(frozen=True, eq=False)
class TextScores:
    """For each token of the texts, its KL and the change of its negative log-likelihood, ``(multipliers, tokens)``.

    Both are in nats.
    """

    kl: Tensor
    nll_change: Tensor


def questions_of(
    tokenizer: Any,
    items: Sequence[EvaluationItem],
    propensity: Propensity,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Question]:
    """Return the questions that items ask, tokenized. Raises ValueError, with the item's number, for a bad one."""
    found = []
    kwargs = {"chat_template_kwargs": chat_template_kwargs}
    for number, item in enumerate(items):
        try:
            for asked in asked_items(propensity, item):
                first, second = (
                    Continuation(*map(tuple, answer_ids(tokenizer, asked.prompt, answer, **kwargs)))
                    for answer in (asked.matching, asked.not_matching)
                )
                if first == second:
                    raise ValueError(f"both answers have the same tokens, {asked.matching!r}")
                found.append(Question(number, first, second))
        except (TypeError, ValueError) as error:
            raise type(error)(f"item {number}: {error}") from error
    return found


def continuations_of_texts(
    tokenizer: Any, texts: Iterable[Any], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[Continuation]:
    """Return texts as continuations of their first two tokens. Raises ValueError for texts that have no more."""
    if isinstance(texts, (str, Mapping)) or not isinstance(texts, Iterable):
        raise TypeError(f"texts must be a list or another iterable of texts, got {type(texts).__name__}")
    found = []
    for number, text in enumerate(texts):
        ids = tuple(prompt_ids(tokenizer, text, chat_template_kwargs=chat_template_kwargs))
        if len(ids) <= _BEGINNING:
            raise ValueError(
                f"text {number} has {len(ids)} token{'s' * (len(ids) != 1)}: give texts of several words, since costs "
                f"are counted from the third token on"
            )
        found.append(Continuation(ids[:_BEGINNING], ids[_BEGINNING:]))
    return found


class ItemBatch:
    """Items that are measured together, under one steering after the other.

    Prompts are computed once for all steerings and multipliers, if steering begins at their last tokens.
    """

    def __init__(self, scorer: Scorer, questions: Sequence[Question], propensity: Propensity) -> None:
        self._questions, self._propensity = questions, propensity
        self._batch = scorer.batch(
            [side for question in questions for side in (question.matching, question.not_matching)]
        )
        self._unsteered = self._batch.scores([Row(number) for number in range(len(self._batch.continuations))])
        self.count = len({question.item for question in questions})

    def scores(self, steering: Steering | None, multipliers: Sequence[float]) -> ItemScores:
        """Return the items' scores at each multiplier. Raises ValueError, with the item's number, for NaN."""
        numbers = range(len(self._batch.continuations))
        steered = [] if steering is None else [m for m in dict.fromkeys(multipliers) if m]
        found = self._batch.scores([Row(number, m) for m in steered for number in numbers], steering)
        by_multiplier = {m: found[n * len(numbers) : (n + 1) * len(numbers)] for n, m in enumerate(steered)}
        at_each = [by_multiplier.get(multiplier, self._unsteered) for multiplier in multipliers]
        for multiplier, answers in zip(multipliers, at_each, strict=True):
            self._check(answers, multiplier)
        values: dict[int, list[Tensor]] = {}
        for place, question in enumerate(self._questions):
            values.setdefault(question.item, []).append(self._values(place, multipliers, at_each))
        means = torch.stack([torch.stack(of_item).nanmean(dim=0) for of_item in values.values()])
        return ItemScores(means[:, 0], means[:, 1])

    def _values(self, place: int, multipliers: Sequence[float], at_each: Sequence[Sequence[AnswerScores]]) -> Tensor:
        """Return a question's propensities and the KL at its first token, ``(2, multipliers)``."""
        first = self._unsteered[2 * place].first
        decided = bool(first.max() > log(_DECIDED))
        sides = [(answers[2 * place], answers[2 * place + 1]) for answers in at_each]
        propensities = [self._value(place, m, *side) for m, side in zip(multipliers, sides, strict=True)]
        costs = [nan if decided else float(kl_divergence(first, matching.first)) for matching, _ in sides]
        return torch.tensor([propensities, costs], dtype=torch.float64, device="cpu")

    def _value(self, place: int, multiplier: float, matching: AnswerScores, other: AnswerScores) -> float:
        found = self._propensity(matching.tokens, other.tokens)
        where = f"item {self._questions[place].item}: its propensity at multiplier {multiplier:g}"
        try:
            value = float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{where} must be a number, but propensity returned {found!r}") from error
        if not isfinite(value):
            least = min(float(answer.tokens.min()) for answer in (matching, other))
            raise ValueError(
                f"{where} must be finite, but is {value}: the least log-probability of its answers' tokens is {least:g}"
            )
        return value

    def _check(self, answers: Sequence[AnswerScores], multiplier: float) -> None:
        for place, answer in enumerate(answers):
            if bool(answer.tokens.isnan().any()):
                raise ValueError(
                    f"item {self._questions[place // 2].item}: the log-probabilities of an answer are NaN at "
                    f"multiplier {multiplier:g}: look at the model's logits for this prompt"
                )


class TextBatch:
    """Texts that are measured together, under one steering after the other."""

    def __init__(self, scorer: Scorer, texts: Sequence[Continuation]) -> None:
        self._batch = scorer.batch(texts)
        unsteered = self._batch.log_probabilities([Row(number) for number in range(len(texts))])
        self._unsteered = {number: _Distributions.of(found) for number, found in unsteered}
        self.count = len(texts)

    def scores(self, steering: Steering, multipliers: Sequence[float]) -> TextScores:
        """Return the texts' costs at each multiplier."""
        steered = [multiplier for multiplier in dict.fromkeys(multipliers) if multiplier]
        rows = [Row(number, multiplier) for multiplier in steered for number in range(self.count)]
        found: dict[tuple[float, int], Tensor] = {}  # (2, tokens)
        for place, log_probabilities in self._batch.log_probabilities(rows, steering):
            row = rows[place]
            before = self._unsteered[row.number]
            difference = before.logarithms - log_probabilities
            answer = torch.tensor(self._batch.continuations[row.number].answer, device=difference.device)[:, None]
            change = difference.gather(-1, answer)[:, 0]
            found[row.multiplier, row.number] = torch.stack([before.mean_of(difference), change]).cpu()
        none = {number: torch.zeros(2, len(part.logarithms), device="cpu") for number, part in self._unsteered.items()}
        at_each = [
            torch.cat([found.get((m, number), none[number]).double() for number in range(self.count)], dim=1)
            for m in multipliers
        ]
        kl, change = torch.stack(at_each, dim=1)
        return TextScores(kl, change)


@dataclass(frozen=True, eq=False)
class _Distributions:
    """Distributions over the vocabulary ``(…, vocabulary)``, kept where each is compared with several others."""

    logarithms: Tensor
    probabilities: Tensor
    has_zeros: bool

    @classmethod
    def of(cls, log_probabilities: Tensor) -> _Distributions:
        return cls(log_probabilities, log_probabilities.exp(), bool(log_probabilities.isneginf().any()))

    def mean_of(self, difference: Tensor) -> Tensor:
        """Return the mean over the vocabulary, at least 0: rounding never makes a KL negative."""
        terms = self.probabilities * difference
        if self.has_zeros:
            terms = terms.where(self.probabilities > 0, 0)  # a token that can't come counts nothing
        return terms.sum(dim=-1).clamp(min=0)


def kl_divergence(before: Tensor, after: Tensor) -> Tensor:
    """Return KL(before ‖ after) in nats of log-probabilities ``(…, vocabulary)``."""
    return _Distributions.of(before).mean_of(before - after)
