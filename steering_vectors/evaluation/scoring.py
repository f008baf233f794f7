"""Score answers: the logits of given tokens after given prompts, under a steering and without.

Scores are those of each prompt and answer alone, in one pass without a cache. Faster ways are tried first: the blocks
below the steered layer run once for all multipliers, the cache of a prompt shared by all that is asked after it, and
padded rows. Each is compared with that single pass before it is used, and again for longer rows and for more padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from steering_vectors.evaluation.agreement import agree
from steering_vectors.evaluation.continuations import Continuation, begins_at_the_last_token, whole_rows
from steering_vectors.evaluation.lower_blocks import LowerBlocks
from steering_vectors.evaluation.manner import Steering
from steering_vectors.evaluation.running import (
    CACHES,
    Undone,
    device_of,
    dtype_of,
    evaluation_mode,
    length_of_change,
    padded,
    run,
    turn_of,
    vocabulary_of,
)

# The most logits of a pass, rows × tokens × vocabulary: 256 MB in float32.
_MOST_LOGITS = 2**26


@dataclass(frozen=True)
class Row:
    """One row to score: a continuation's number in its batch, and a multiplier."""

    number: int
    multiplier: float = 0.0


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """The log-probabilities ``(tokens,)`` of an answer's tokens, and ``(vocabulary,)`` of all that could come first."""

    tokens: Tensor
    first: Tensor


class Scorer:
    """A model that scores answers, and the ways in which it was seen to do so rightly.

    Raises ValueError for an encoder-decoder model.
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{type(model).__name__} is an encoder-decoder model; evaluation needs a decoder-only one")
        self.model = model
        self.lower_blocks = LowerBlocks(model)
        self._length_of_change = length_of_change(model)
        self._ways: list[_Way] = [
            *(_above_known_blocks, _after_shared_cache),
            *(_in_padded_rows, _in_equal_rows, _one_by_one),
        ]
        # The longest rows, and the most padding, with which ways were seen to be right. A model that takes padding in
        # does so without steering as well.
        self._lengths: dict[tuple[_Way, int | None], int] = {}
        self._paddings: dict[_Way, float] = {}

    def padded(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return prompts as ``model.generate`` takes them, padded on the left."""
        return padded(prompts, self.model)

    def evaluation_mode(self) -> Undone:
        """Return a context in which all modules are in evaluation mode."""
        return evaluation_mode(self.model)

    def ends_of_sequence(self) -> set[int]:
        """Return the token ids at which the model ends an answer."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def batch(self, continuations: Sequence[Continuation]) -> Batch:
        """Return continuations to be scored, several times over, by :meth:`logits`."""
        return Batch(self, continuations)

    @torch.no_grad()
    def logits(self, batch: Batch, rows: Sequence[Row], steering: Steering | None) -> list[tuple[int, Tensor]]:
        """Return each row's place in ``rows``, in any order, with the logits ``(answer, vocabulary)`` of its answer."""
        if all(row.multiplier == 0 for row in rows):
            steering = None  # the same, by any operator
        with turn_of(self.model), evaluation_mode(self.model):
            for way in self._ways_for(batch, rows):
                if way is _one_by_one or self._was_right(way, batch, rows, steering):
                    scored = way(self.model, batch, rows, steering)
                    found = None if scored is None else list(scored)
                else:
                    found = self._tried(way, batch, rows, steering)
                if found is not None:
                    return found
            raise AssertionError("rows can be scored one by one")

    def _ways_for(self, batch: Batch, rows: Sequence[Row]) -> list[_Way]:
        """Return the ways to try; only those of whole rows of one length if the longest row may change the others."""
        longest, _ = _extent(batch, rows)
        changed = longest > self._length_of_change
        return [way for way in self._ways if way in (_in_equal_rows, _one_by_one) or not changed]

    def _was_right(self, way: _Way, batch: Batch, rows: Sequence[Row], steering: Steering | None) -> bool:
        """Return True if the way was seen to be right for rows of about this length, and with about this padding."""
        longest, padding = _extent(batch, rows)
        short = longest <= 1.5 * self._lengths.get((way, self._below(steering)), 0)
        return short and padding <= 1.5 * self._paddings.get(_basis(way), 0)

    def _tried(
        self, way: _Way, batch: Batch, rows: Sequence[Row], steering: Steering | None
    ) -> list[tuple[int, Tensor]] | None:
        """Return what the way finds if its most padded row is what a single pass finds.

        None for rows that can't be scored this way, though others may be, and for a wrong way, which is
        not tried again.
        """
        try:
            scored = way(self.model, batch, rows, steering)
            found = None if scored is None else list(scored)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model can't do it this way; what is wrong with the rows, the next way raises too
            self._leave(way)
            return None
        if found is None:
            return None
        parts = [batch.continuations[row.number] for row in rows]
        most_padded = min(
            range(len(rows)),
            key=lambda place: (rows[place].multiplier == 0, len(parts[place].prompt), len(parts[place])),
        )
        ((_, expected),) = _one_by_one(self.model, batch, [rows[most_padded]], steering)
        if not agree(expected, dict(found)[most_padded], parts[most_padded].answer, dtype_of(self.model)):
            self._leave(way)
            return None
        longest, padding = _extent(batch, rows)
        key = way, self._below(steering)
        self._lengths[key] = max(longest, self._lengths.get(key, 0))
        self._paddings[_basis(way)] = max(padding, self._paddings.get(_basis(way), 0))
        return found

    def _leave(self, way: _Way) -> None:
        """Try a way no more, nor the one that begins with it."""
        self._ways = [other for other in self._ways if way not in (other, _basis(other))]

    def _below(self, steering: Steering | None) -> int | None:
        return None if steering is None else self.lower_blocks.below(steering.vector)


class Batch:
    """Continuations that are scored several times; the cache of their prompts is kept between."""

    def __init__(self, scorer: Scorer, continuations: Sequence[Continuation]) -> None:
        self._scorer = scorer
        self.continuations = list(continuations)
        prompts = {continuation.prompt: None for continuation in self.continuations}
        self.prompts = {prompt: place for place, prompt in enumerate(prompts)}
        self._cache: Any = None
        self._known: tuple[int, Tensor] | None = None  # what so many blocks return for all continuations

    def log_probabilities(self, rows: Sequence[Row], steering: Steering | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield each row's place with the log-probabilities ``(answer, vocabulary)``, in float32 or wider."""
        for place, logits in self._logits(rows, steering):
            yield place, logits.log_softmax(dim=-1)

    def scores(self, rows: Sequence[Row], steering: Steering | None = None) -> list[AnswerScores]:
        """Return the scores of each row's answer, on the CPU."""
        found: dict[int, AnswerScores] = {}
        for place, logits in self._logits(rows, steering):
            answer = torch.tensor(self.continuations[rows[place].number].answer, device=logits.device)
            tokens = logits.gather(-1, answer[:, None])[:, 0] - logits.logsumexp(dim=-1)
            found[place] = AnswerScores(tokens.cpu(), logits[0].log_softmax(dim=-1).cpu())
        return [found[place] for place in range(len(rows))]

    def _logits(self, rows: Sequence[Row], steering: Steering | None) -> Iterator[tuple[int, Tensor]]:
        """Yield each row's place with the logits ``(answer, vocabulary)``, in float32 or wider."""
        for part in _parts(rows, self.continuations, vocabulary_of(self._scorer.model)):
            for place, logits in self._scorer.logits(self, [rows[n] for n in part], steering):
                yield part[place], logits if logits.dtype == torch.float64 else logits.float()

    def cache(self) -> Any:
        """Return the cache of the prompts but for their last tokens, or None if the model has none to be shared."""
        if self._cache is None:
            beginnings = [prompt[:-1] for prompt in self.prompts]
            output = run(self._scorer.model, padded(beginnings, self._scorer.model), use_cache=True, keep=1)
            cache = next((output[name] for name in CACHES if output.get(name) is not None), False)
            # transformers 4 returns a tuple to those who pass no cache.
            kind: Any = DynamicCache
            self._cache = kind.from_legacy_cache(cache) if isinstance(cache, tuple) else cache
        return self._cache or None

    def after_cache(self, continuations: Sequence[Continuation]) -> Callable[[], Any]:
        """Return a pass of the last tokens of prompts, and the answers but for theirs, after copies of the cache."""
        model = self._scorer.model
        cache = copy.deepcopy(self.cache())
        places = torch.tensor([self.prompts[part.prompt] for part in continuations], device=device_of(model))
        cache.batch_select_indices(places)
        before = padded([prompt[:-1] for prompt in self.prompts], model)["attention_mask"][places]
        now = padded([(part.prompt[-1], *part.answer[:-1]) for part in continuations], model, left=False)
        inputs = {**now, "attention_mask": torch.cat([before, now["attention_mask"]], dim=1)}
        return partial(run, model, inputs, use_cache=True, cache=cache)

    def known_blocks(self, steering: Steering | None) -> _KnownBlocks | None:
        """Return a context in which the blocks below a steering return what they returned unsteered, for given rows.

        None where there are none. The outputs of one number of blocks are kept, and are a beginning for more.
        """
        blocks = self._scorer.lower_blocks
        count = 0 if steering is None else blocks.below(steering.vector)
        if not count:
            return None

        def returning(numbers: Sequence[int]) -> Undone:
            if self._known is None or self._known[0] != count:
                fewer = self._known if self._known is not None and self._known[0] < count else None
                self._known = count, blocks.output(count, self.after_cache(self.continuations), fewer)
            width = max(len(self.continuations[number].answer) for number in numbers)
            return blocks.returning(count, self._known[1][list(numbers), :width])

        return returning


def _extent(batch: Batch, rows: Sequence[Row]) -> tuple[int, float]:
    """Return the length of the longest row, and the most padding that a prompt gets for each of its tokens."""
    parts = [batch.continuations[row.number] for row in rows]
    shortest = min(len(part.prompt) for part in parts)
    return max(map(len, parts)), (max(map(len, batch.prompts)) - shortest) / shortest


def _basis(way: _Way) -> _Way:
    """Return the way on whose passes a way rests."""
    return _after_shared_cache if way is _above_known_blocks else way


# The context in which blocks return what is known of continuations, by their numbers, instead of running.
_KnownBlocks: TypeAlias = Callable[[Sequence[int]], Undone]
_Way = Callable[[nn.Module, Batch, Sequence[Row], "Steering | None"], "Iterator[tuple[int, Tensor]] | None"]


def _above_known_blocks(
    model: nn.Module, batch: Batch, rows: Sequence[Row], steering: Steering | None
) -> Iterator[tuple[int, Tensor]] | None:
    """Run only the blocks that a steering changes, after copies of the prompts' cache.

    None for rows without steering, and where the prompts' cache can't be shared.
    """
    known = batch.known_blocks(steering)
    return known and _after_shared_cache(model, batch, rows, steering, known)


def _after_shared_cache(
    model: nn.Module,
    batch: Batch,
    rows: Sequence[Row],
    steering: Steering | None,
    known: _KnownBlocks | None = None,
) -> Iterator[tuple[int, Tensor]] | None:
    """Run each prompt but for its last token once, unsteered, and the rest of all rows after copies of its cache.

    None for rows that are steered before their prompts' last tokens, and for prompts of a single token.
    """
    continuations = [batch.continuations[row.number] for row in rows]
    if min(len(prompt) for prompt in batch.prompts) < 2:
        return None
    selection = None
    if steering is not None:
        if steering.how.enter is not None:  # it may steer other tokens than those that it is given
            return None
        selection = steering.selection(padded([part.prompt for part in continuations], model))
        if not begins_at_the_last_token(selection, continuations, model):
            return None

    def scored() -> Iterator[tuple[int, Tensor]]:
        run_now = batch.after_cache(continuations)
        with ExitStack() as stack:
            if known is not None:
                stack.enter_context(known([row.number for row in rows]))
            if steering is not None:
                stack.enter_context(steering.apply(selection, [row.multiplier for row in rows]))
            logits = run_now().logits
        for place, part in enumerate(continuations):
            yield place, logits[place, : len(part.answer)]

    return scored()


def _in_padded_rows(
    model: nn.Module, batch: Batch, rows: Sequence[Row], steering: Steering | None
) -> Iterator[tuple[int, Tensor]]:
    """Run whole rows, with prompts that are padded on the left and answers on the right."""
    continuations = [batch.continuations[row.number] for row in rows]
    selection = None if steering is None else steering.selection(padded([c.prompt for c in continuations], model))
    keep = 1 + max(len(part.answer) for part in continuations)
    with nullcontext() if steering is None else steering.apply(selection, [row.multiplier for row in rows]):
        logits = run(model, whole_rows(continuations, model), use_cache=False, keep=keep).logits[:, -keep:]
    for place, part in enumerate(continuations):
        yield place, logits[place, : len(part.answer)]


def _in_equal_rows(
    model: nn.Module, batch: Batch, rows: Sequence[Row], steering: Steering | None
) -> Iterator[tuple[int, Tensor]]:
    """Run together the rows whose prompts are equally long, and their answers, so that none is padded."""
    by_lengths: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(rows):
        part = batch.continuations[row.number]
        by_lengths.setdefault((len(part.prompt), len(part.answer)), []).append(place)
    for places in by_lengths.values():
        for place, logits in _in_padded_rows(model, batch, [rows[n] for n in places], steering):
            yield places[place], logits


def _one_by_one(
    model: nn.Module, batch: Batch, rows: Sequence[Row], steering: Steering | None
) -> Iterator[tuple[int, Tensor]]:
    for place, row in enumerate(rows):
        for _, logits in _in_padded_rows(model, batch, [row], steering):
            yield place, logits


def _parts(rows: Sequence[Row], continuations: Sequence[Continuation], vocabulary: int) -> Iterator[list[int]]:
    """Yield places of rows that are run together, so that their logits stay of bounded size."""
    part: list[int] = []
    longest = 0
    for place, row in enumerate(rows):
        longest = max(longest, 1 + len(continuations[row.number].answer))
        if part and (len(part) + 1) * longest * vocabulary > _MOST_LOGITS:
            yield part
            part, longest = [], 1 + len(continuations[row.number].answer)
        part.append(place)
    if part:
        yield part
