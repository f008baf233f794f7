"""Generate answers at several multipliers, score them, and measure how fluent they are."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch

from steering_vectors.evaluation.continuations import Continuation
from steering_vectors.evaluation.items import ItemPrompt
from steering_vectors.evaluation.manner import Steering
from steering_vectors.evaluation.running import turn_of
from steering_vectors.evaluation.scoring import Row, Scorer
from steering_vectors.evaluation.statistics import bootstrap_interval
from steering_vectors.evaluation.tables import paragraph, signed, text_table
from steering_vectors.prompts import prompt_ids


@dataclass(frozen=True)
class AnswerRow:
    """The answers at one multiplier.

    Attributes:
        multiplier: The multiplier.
        prompts: The items' prompts.
        answers: The answer to each.
        scores: The score of each answer.
        score: The mean score.
        score_low: The lower end of its interval: 95 %, by 10,000 resamples of the items.
        score_high: Its upper end.
        log_likelihood: The mean log-probability per token of the answers under the unsteered model,
            in nats. Loops are likely.
        distinct_2: The share of pairs of neighbouring words that are distinct, as the answers' mean.
        compression: The ratio of an answer's length to its compressed length, as the answers' mean.
            Loops compress well.
    """

    multiplier: float
    prompts: tuple[ItemPrompt, ...]
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    score: float
    score_low: float
    score_high: float
    log_likelihood: float
    distinct_2: float
    compression: float


def generated_answers(
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[ItemPrompt],
    chat_template_kwargs: Mapping[str, Any] | None,
    steering: Steering,
    multipliers: Sequence[float],
    score: Callable[[Any, str], float],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> tuple[AnswerRow, ...]:
    """Return the answers to prompts at each multiplier, from batches that hold all of a prompt's multipliers."""
    texts: dict[float, list[str]] = {multiplier: [] for multiplier in multipliers}
    likelihoods: dict[float, list[float]] = {multiplier: [] for multiplier in multipliers}
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        tokens = [tuple(prompt_ids(tokenizer, one, chat_template_kwargs=chat_template_kwargs)) for one in part]
        rows = [(ids, multiplier) for ids in tokens for multiplier in texts]
        answers = _generate(scorer, tokenizer, rows, steering, max_new_tokens)
        for (ids, multiplier), answer in zip(rows, answers, strict=True):
            texts[multiplier].append(tokenizer.decode(answer, skip_special_tokens=True))
            if answer:
                batch = scorer.batch([Continuation(ids, tuple(answer))])
                likelihoods[multiplier].append(float(batch.scores([Row(0)])[0].tokens.mean()))
    return tuple(_answer_row(m, prompts, texts[m], likelihoods[m], score, seed) for m in texts)


def _generate(
    scorer: Scorer, tokenizer: Any, rows: Sequence[tuple[tuple[int, ...], float]], steering: Steering, length: int
) -> list[list[int]]:
    """Return the answers' token ids, greedily generated, up to the end of sequence."""
    inputs = scorer.padded([ids for ids, _ in rows])
    ends = scorer.ends_of_sequence()
    selection = steering.selection(inputs)
    steered = steering.apply(selection, [multiplier for _, multiplier in rows])
    with torch.no_grad(), turn_of(scorer.model), scorer.evaluation_mode(), steered:
        output = scorer.model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=length, do_sample=False, pad_token_id=next(iter(ends), 0)
        )
    found = []
    for row in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        found.append(row[:end])
    return found


def _answer_row(
    multiplier: float,
    prompts: Sequence[ItemPrompt],
    answers: Sequence[str],
    likelihoods: Sequence[float],
    score: Callable[[Any, str], float],
    seed: int,
) -> AnswerRow:
    scores = [_scored(score, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    values = torch.tensor(scores, dtype=torch.float64, device="cpu")
    low, high = bootstrap_interval(values, seed)
    return AnswerRow(
        multiplier,
        tuple(prompts),
        tuple(answers),
        tuple(scores),
        float(values.mean()),
        low,
        high,
        _mean(likelihoods),
        _mean([distinct_2(answer) for answer in answers]),
        _mean([compression(answer) for answer in answers]),
    )


def _scored(score: Callable[[Any, str], float], prompt: ItemPrompt, answer: str) -> float:
    found = score(prompt, answer)
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise TypeError(f"score must return a number, but returned {found!r} for the answer {answer!r}") from error
    if not isfinite(value):
        raise ValueError(f"score must return a finite number, but returned {value} for the answer {answer!r}")
    return value


def distinct_2(text: str) -> float:
    """Return the share of pairs of neighbouring words that are distinct; 1 for a text that has none."""
    words = text.split()
    pairs = list(pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def compression(text: str) -> float:
    """Return the ratio of a text's length in bytes to its length when compressed."""
    written = text.encode()
    return len(written) / len(zlib.compress(written, 9))


def show_answers(rows: Sequence[AnswerRow]) -> str:
    """Return a table of what was generated at each multiplier."""
    columns = ["answers", "score [95 % interval]", "log-likelihood", "distinct-2", "compression"]
    lines = [
        [
            f"at {signed(row.multiplier)}",
            f"{row.score:.2f} [{row.score_low:.2f}, {row.score_high:.2f}]",
            f"{row.log_likelihood:.2f}",
            f"{row.distinct_2:.2f}",
            f"{row.compression:.2f}",
        ]
        for row in rows
    ]
    note = paragraph(
        "Log-likelihood: of the answers under the unsteered model, in nats per token. Loops are likely, have few "
        "distinct pairs of words, and compress well."
    )
    return f"{text_table(columns, lines)}\n\n{note}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
