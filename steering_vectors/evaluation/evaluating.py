"""Evaluate a vector on items, beside controls and baselines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

from torch import nn

from steering_vectors._arguments import with_hints
from steering_vectors._progress import progress_bar
from steering_vectors.evaluation.controls import Controls, check_controls, control_vectors, with_system_prompt
from steering_vectors.evaluation.items import EvaluationItem, ItemPrompt, as_items
from steering_vectors.evaluation.manner import Apply, Manner
from steering_vectors.evaluation.measuring import Question, continuations_of_texts
from steering_vectors.evaluation.neutral_texts import NEUTRAL_TEXTS
from steering_vectors.evaluation.plan import Plan
from steering_vectors.evaluation.propensity import Propensity, name_of, text_propensity
from steering_vectors.evaluation.result import Evaluation
from steering_vectors.evaluation.rows import SYSTEM_PROMPT, VARIANT, VECTOR, item_rows
from steering_vectors.steering_operators import PatchDeltaOperator
from steering_vectors.steering_vector import SteeringVector
from steering_vectors.token_selection import generated

Variant = str | Iterable[EvaluationItem | tuple[ItemPrompt, str, str]]


@with_hints(missing="the arguments begin with model, tokenizer, vector, items", layer="choose layers by vector[16]")
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    items: Iterable[EvaluationItem | tuple[ItemPrompt, str, str]],
    *,
    multipliers: Sequence[float] = (-2, -1, 0, 1, 2),
    tokens: Any = generated,
    operator: PatchDeltaOperator | None = None,
    apply: Apply | None = None,
    propensity: Propensity = text_propensity(),
    texts: Iterable[Any] | None = None,
    controls: Controls | None = Controls(),
    training_samples: Any = None,
    system_prompt: str | None = None,
    variants: Mapping[str, Variant] | None = None,
    score: Callable[[Any, str], float] | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    seed: int = 0,
    show_progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure how a vector moves the model's preference between two answers, and what that costs.

    Each item's propensity is measured at each multiplier. Its steerability is the least-squares
    slope of propensity over the multipliers. Means hide items that move the wrong way, so those
    are counted (arXiv 2407.12404). Random directions move something too, so a few are measured as
    controls, with a vector whose training labels are permuted. The model is in evaluation mode while
    it runs, and afterwards as it was. Evaluations of one model in several threads take turns.

    Intervals are 95 % intervals of the mean over items, by 10,000 resamples of the items. They cover
    the choice of the items, and not that of the training samples, nor of the prompts' wording. With
    few controls, the strongest of them is only a rough bound.

    Args:
        model: The model to steer, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        vector: The vector.
        items: The items, each an :class:`EvaluationItem` or ``(prompt, matching, not_matching)``.
            They should be none of the training samples.
        multipliers: The multipliers, at least two different ones.
        tokens: The tokens to steer, as in :meth:`~steering_vectors.SteeringVector.apply`, or a function from the
            batch's prompts, as ``model.generate`` takes them, to a selector. By default
            :func:`~steering_vectors.generated` steers from each prompt's last token on.
        operator: The operator, as in :meth:`~steering_vectors.SteeringVector.apply`.
        apply: A callable ``(vector, multipliers, tokens)``, with a multiplier for each row of the
            batch, that returns the context in which the model is steered, in place of
            ``vector.apply``. It can't be given with an operator. For instance,
            ``lambda vector, on, tokens: ablate_everywhere(model, vector, rows=[m > 0 for m in on])``
            with ``multipliers=[0, 1]`` and ``tokens=None``. At multiplier 0 the model must be as it
            always is.
        propensity: The callable that computes a propensity from the answers' log-probabilities.
        texts: Neutral texts on which the cost is measured: KL(unsteered ‖ steered) at each token
            from the second on, of which the first is never counted. By default a few that come with
            the library; an empty list measures none.
        controls: The controls, or None for none.
        training_samples: The samples on which the vector was trained, for the control with permuted
            labels. It is trained by :func:`~steering_vectors.train_steering_vector` with the default arguments, or
            with those in ``controls.training``.
        system_prompt: An instruction to the unsteered model, for comparison: what a prompt alone
            does.
        variants: Other phrasings of the items by name, each as many items in the same order, or a
            system prompt to put before the items. A vector that fails under one isn't robust.
        score: A callable ``(prompt, answer) → number``, such as a judge or a classifier. If given,
            the model also answers each prompt at each multiplier, and the mean score is reported.
        max_new_tokens: The length of these answers in tokens.
        batch_size: The number of items in a pass, each with all multipliers.
        seed: The seed of the controls and intervals.
        show_progress: True to show a progress bar.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If there are no items, if an item's answers are equal, empty or have no tokens
            after the prompt, without two different multipliers, if a text has fewer than three
            tokens, if the vector doesn't fit the model, or if log-probabilities are NaN or a
            propensity or a score is not finite.

    >>> items = [("I say", " yes", " no"), ("We say", " good", " bad")]
    >>> result = evaluate(model, tokenizer, vector, items, multipliers=[-1, 1], texts=[])
    >>> result.rows[0].condition
    'vector'
    """
    how = Manner(tokens, operator, apply)
    plan = Plan(model, tokenizer, how, propensity, multipliers, batch_size, seed, chat_template_kwargs)
    plan.check(vector, score)
    check_controls(controls)
    given = as_items(items)
    questions = plan.questions(given)
    otherwise = _asked_otherwise(plan, given, variants, system_prompt)
    neutral = continuations_of_texts(tokenizer, NEUTRAL_TEXTS if texts is None else texts, chat_template_kwargs)
    vectors = {VECTOR: vector, **control_vectors(controls, model, tokenizer, vector, training_samples, seed)}
    with progress_bar(total=len(given) + len(neutral), desc="Evaluating", disable=not show_progress) as bar:
        measured, costs = plan.items(questions, vectors, bar), plan.texts(neutral, vectors, bar)
    rows = plan.rows(measured, costs, vector, otherwise, unsteered=controls is not None)
    answers = () if score is None else plan.answers(given, vector, score, max_new_tokens)
    by_item = item_rows(given, measured[VECTOR], plan.multipliers)
    return Evaluation(rows, by_item, name_of(propensity), len(neutral), seed, answers)


def _asked_otherwise(
    plan: Plan, items: Sequence[EvaluationItem], variants: Mapping[str, Variant] | None, system_prompt: str | None
) -> dict[str, list[Question]]:
    """Return the questions of the items' variants, and of the items after a system prompt, by their rows' names."""
    others = variants_of(variants, items)
    if system_prompt is not None:
        if not isinstance(system_prompt, str):
            raise TypeError(f"system_prompt must be a text, got {type(system_prompt).__name__}")
        others[SYSTEM_PROMPT] = list(with_system_prompt(items, system_prompt))
    return {name: plan.questions(listed, name) for name, listed in others.items()}


def variants_of(
    variants: Mapping[str, Variant] | None, items: Sequence[EvaluationItem]
) -> dict[str, list[EvaluationItem]]:
    """Return the items of each variant by the name of its row.

    Raises TypeError for anything but a mapping, and ValueError unless a variant has as many items as ``items``.
    """
    if not isinstance(variants, (Mapping, NoneType)):
        raise TypeError(
            f"variants must be a mapping from names to a system prompt or to items, such as "
            f"{{'formal': 'Answer formally.'}}, got {type(variants).__name__}"
        )
    return {f"{VARIANT}{name}": _variant(name, variant, items) for name, variant in (variants or {}).items()}


def _variant(name: str, variant: Variant, items: Sequence[EvaluationItem]) -> list[EvaluationItem]:
    if isinstance(variant, str):
        return list(with_system_prompt(items, variant))
    try:
        found = as_items(variant)
    except (TypeError, ValueError) as error:
        raise type(error)(f"variant {name!r}: {error}") from error
    if len(found) != len(items):
        raise ValueError(f"variant {name!r} has {len(found)} items, but there are {len(items)}: phrase each one anew")
    return found
