"""Measure vectors on items and texts, all in the same way: the same model, tokens, operator and multipliers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from steering_vectors._arguments import check_takes, finite_number, is_whole_number
from steering_vectors.evaluation.answers import AnswerRow, generated_answers
from steering_vectors.evaluation.continuations import Continuation
from steering_vectors.evaluation.items import EvaluationItem
from steering_vectors.evaluation.manner import Manner, Steering
from steering_vectors.evaluation.measuring import (
    ItemBatch,
    ItemScores,
    Question,
    TextBatch,
    TextScores,
    questions_of,
)
from steering_vectors.evaluation.propensity import Propensity
from steering_vectors.evaluation.rows import (
    SYSTEM_PROMPT,
    UNSTEERED,
    VECTOR,
    ConditionRow,
    condition_row,
    joined_items,
    joined_texts,
    unsteered_row,
)
from steering_vectors.evaluation.scoring import Scorer
from steering_vectors.steering_vector import SteeringVector


class Plan:
    """A model and the way in which vectors are measured on it.

    Raises TypeError or ValueError for arguments that don't fit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        how: Manner,
        propensity: Propensity,
        multipliers: Sequence[float] | None,
        batch_size: int,
        seed: int,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        if not is_whole_number(batch_size) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not is_whole_number(seed):
            raise TypeError(f"seed must be a whole number, got {seed!r}")
        check_takes(propensity, 2, "propensity", "text_propensity()")
        how.check()
        self.multipliers = () if multipliers is None else tuple(checked_multipliers(multipliers))
        self._model, self._tokenizer, self._scorer = model, tokenizer, Scorer(model)
        self._how, self._propensity = how, propensity
        self._batch_size, self.seed = batch_size, seed
        self._template_kwargs = chat_template_kwargs

    def settings(self) -> tuple[object, ...]:
        """Return all but the model and the data on which a measurement depends."""
        return self.multipliers, self._how, self._propensity, self._batch_size

    def check(self, vector: SteeringVector, score: object = None) -> None:
        """Raise TypeError or ValueError unless the vector fits the model, and a score, if any, can be called."""
        if score is not None:
            check_takes(score, 2, "score", "lambda prompt, answer: len(answer)")
        if not isinstance(vector, SteeringVector):
            raise TypeError(f"vector must be a SteeringVector, got {type(vector).__name__}")
        vector.patch(self._model, operator=self._how.operator, this_thread_only=True).remove()

    def questions(self, items: Sequence[EvaluationItem], name: str = "") -> list[Question]:
        """Return the questions of items. Raises ValueError, with the name of the list and the item, for a bad one."""
        try:
            return questions_of(self._tokenizer, items, self._propensity, self._template_kwargs)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}, {error}" if name else str(error)) from error

    def parts_of_items(self, questions: Sequence[Question]) -> list[list[Question]]:
        """Return the questions of a batch of items at a time."""
        by_item: dict[int, list[Question]] = {}
        for question in questions:
            by_item.setdefault(question.item, []).append(question)
        numbers = list(by_item)
        starts = range(0, len(numbers), self._batch_size)
        return [[q for n in numbers[start : start + self._batch_size] for q in by_item[n]] for start in starts]

    def parts_of_texts(self, texts: Sequence[Continuation]) -> list[Sequence[Continuation]]:
        """Return a batch of texts at a time."""
        return [texts[start : start + self._batch_size] for start in range(0, len(texts), self._batch_size)]

    def item_batch(self, questions: Sequence[Question]) -> ItemBatch:
        """Return items to be measured together."""
        return ItemBatch(self._scorer, questions, self._propensity)

    def text_batch(self, texts: Sequence[Continuation]) -> TextBatch:
        """Return texts to be measured together."""
        return TextBatch(self._scorer, texts)

    def items(
        self, questions: Sequence[Question], vectors: Mapping[str, SteeringVector], bar: Any = None
    ) -> dict[str, ItemScores]:
        """Return the items' scores under each vector at each multiplier, and unsteered."""
        steerings = {name: self.steering(vector) for name, vector in vectors.items()}
        found: dict[str, list[ItemScores]] = {name: [] for name in [*vectors, UNSTEERED]}
        for batch in map(self.item_batch, self.parts_of_items(questions)):
            for name, steering in {**steerings, UNSTEERED: None}.items():
                found[name].append(batch.scores(steering, self.multipliers))
            if bar is not None:
                bar.update(batch.count)
        return {name: joined_items(parts) for name, parts in found.items()}

    def texts(
        self, texts: Sequence[Continuation], vectors: Mapping[str, SteeringVector], bar: Any = None
    ) -> dict[str, TextScores | None]:
        """Return the costs of each vector on texts at each multiplier, or None without texts."""
        found: dict[str, list[TextScores]] = {name: [] for name in vectors}
        for batch in map(self.text_batch, self.parts_of_texts(texts)):
            for name, vector in vectors.items():
                found[name].append(batch.scores(self.steering(vector), self.multipliers))
            if bar is not None:
                bar.update(batch.count)
        return {name: joined_texts(parts) for name, parts in found.items()}

    def rows(
        self,
        measured: Mapping[str, ItemScores],
        costs: Mapping[str, TextScores | None],
        vector: SteeringVector,
        otherwise: Mapping[str, Sequence[Question]],
        *,
        unsteered: bool,
    ) -> tuple[ConditionRow, ...]:
        """Return the rows of what was measured, and of the vector on items that are asked otherwise.

        The items after a system prompt are measured without steering.
        """
        rows = [self._row(name, measured[name], costs[name]) for name in costs]
        for name, asked in otherwise.items():
            if name == SYSTEM_PROMPT:
                rows.append(unsteered_row(name, self.items(asked, {})[UNSTEERED].propensities[:, 0], self.seed))
            else:
                rows.append(self._row(name, self.items(asked, {VECTOR: vector})[VECTOR], None))
        if unsteered:
            rows.append(unsteered_row(UNSTEERED, measured[UNSTEERED].propensities[:, 0], self.seed))
        return tuple(rows)

    def answers(
        self,
        items: Iterable[EvaluationItem],
        vector: SteeringVector,
        score: Callable[[Any, str], float],
        max_new_tokens: int,
    ) -> tuple[AnswerRow, ...]:
        """Return what the model answers at each multiplier, scored."""
        return generated_answers(
            self._scorer,
            self._tokenizer,
            [item.prompt for item in items],
            self._template_kwargs,
            self.steering(vector),
            self.multipliers,
            score,
            max_new_tokens=max_new_tokens,
            batch_size=self._batch_size,
            seed=self.seed,
        )

    def _row(self, condition: str, items: ItemScores, texts: TextScores | None) -> ConditionRow:
        """Return a condition's row."""
        return condition_row(condition, self.multipliers, items, texts, self.seed)

    def steering(self, vector: SteeringVector) -> Steering:
        """Return a vector's steering of the model."""
        return Steering(self._model, vector, self._how)


def checked_multipliers(multipliers: Sequence[float]) -> list[float]:
    """Return multipliers as floats. Raises ValueError unless two of them differ."""
    if isinstance(multipliers, (str, bytes, Mapping)) or not isinstance(multipliers, Iterable):
        raise TypeError(f"multipliers must be a list of numbers, got {multipliers!r}")
    numbers = [finite_number(number, "a multiplier") for number in multipliers]
    if len(set(numbers)) < 2:
        raise ValueError(f"a change shows between at least two different multipliers, got {numbers}")
    return numbers
