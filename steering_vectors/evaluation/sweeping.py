"""Sweep layers and multipliers, choose on one half of the items, and report on the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._arguments import finite_number, with_hints
from steering_vectors._progress import progress_bar
from steering_vectors._version import __version__
from steering_vectors.evaluation.cells import Cells, hash_of, hash_of_model, hash_of_vector
from steering_vectors.evaluation.continuations import Continuation
from steering_vectors.evaluation.controls import Controls, check_controls, control_vectors
from steering_vectors.evaluation.evaluating import Variant, variants_of
from steering_vectors.evaluation.items import EvaluationItem, ItemPrompt, as_items
from steering_vectors.evaluation.manner import Manner
from steering_vectors.evaluation.measuring import ItemBatch, Question, continuations_of_texts
from steering_vectors.evaluation.neutral_texts import NEUTRAL_TEXTS
from steering_vectors.evaluation.plan import Plan
from steering_vectors.evaluation.propensity import Propensity, name_of, text_propensity
from steering_vectors.evaluation.statistics import bootstrap_interval
from steering_vectors.evaluation.sweep_result import PointRow, Sweep, SweepRow, best_row
from steering_vectors.steering_operators import PatchDeltaOperator
from steering_vectors.steering_vector import SteeringVector
from steering_vectors.token_selection import generated


@with_hints(missing="the arguments begin with model, tokenizer, vector, items", layer="the argument is layers=")
def sweep(
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    items: Iterable[EvaluationItem | tuple[ItemPrompt, str, str]],
    *,
    layers: int | Iterable[int] | None = None,
    multipliers: Sequence[float] = (-2, -1, 0, 1, 2),
    max_kl: float | None = None,
    tokens: Any = generated,
    operator: PatchDeltaOperator | None = None,
    propensity: Propensity = text_propensity(),
    texts: Iterable[Any] | None = None,
    controls: Controls | None = Controls(),
    training_samples: Any = None,
    variants: Mapping[str, Variant] | None = None,
    path: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    show_progress: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Sweep:
    """Measure each layer of a vector alone at each multiplier, and choose the one that steers best.

    A random half of the items chooses: the row with the largest gain in propensity whose cost is
    within ``max_kl``. The other half reports, since the best of many is partly luck. Controls are
    measured at the chosen layer and multiplier, on the items that were held out.

    All multipliers share a batch. Where steering begins at the prompts' last tokens, prompts are
    computed once for all layers and multipliers, and of the answers, the blocks below a steered layer
    once for all its multipliers.

    Args:
        model: The model to steer, which must be decoder-only.
        tokenizer: The model's tokenizer, or a processor that has one.
        vector: The vector.
        items: The items, as in :func:`evaluate`: at least two.
        layers: The layers, of those that the vector has. None sweeps all.
        multipliers: The multipliers.
        max_kl: The most that is allowed at the 95th percentile of KL(unsteered ‖ steered) per
            token, in nats, or None.
        tokens: The tokens to steer, as in :func:`evaluate`.
        operator: The operator, as in :meth:`~steering_vectors.SteeringVector.apply`.
        propensity: The propensity, as in :func:`evaluate`.
        texts: Neutral texts, as in :func:`evaluate`.
        controls: The controls, as in :func:`evaluate`.
        training_samples: The training samples, as in :func:`evaluate`.
        variants: Other phrasings of the items, as in :func:`evaluate`, measured at the chosen layer
            and multiplier.
        path: A JSON file for what was measured. A sweep that was stopped goes on from there when it
            is called again with the same arguments.
        batch_size: The number of items in a pass, each with all multipliers.
        seed: The seed of the halves, the controls and the intervals.
        show_progress: True to show a progress bar.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Raises:
        LookupError: If the vector lacks one of the layers.
        TypeError: If an argument has the wrong type.
        ValueError: As in :func:`evaluate`, for fewer than two items, for ``max_kl`` without texts,
            and if the file at ``path`` belongs to another sweep, or if there is to be one while the model
            is steered otherwise.

    >>> items = [("I say", " yes", " no"), ("We say", " good", " bad")]
    >>> result = sweep(model, tokenizer, vector, items, multipliers=[-1, 1], texts=[])
    >>> [(row.layer, row.multiplier) for row in result.rows]
    [(1, -1.0), (1, 1.0)]
    """
    how = Manner(tokens, operator)
    plan = Plan(model, tokenizer, how, propensity, _with_none(multipliers), batch_size, seed, chat_template_kwargs)
    swept = _layers_of(plan, vector, layers)
    check_controls(controls)
    given = as_items(items)
    halves = _halves(len(given), seed)
    questions = plan.questions(given)
    otherwise = {name: plan.questions(listed, name) for name, listed in variants_of(variants, given).items()}
    neutral = continuations_of_texts(tokenizer, NEUTRAL_TEXTS if texts is None else texts, chat_template_kwargs)
    budget = _budget(max_kl, neutral)
    grid = _Grid(plan, swept, questions, neutral, _cells(path, model, swept, questions, neutral, plan))
    rows = grid.rows(halves, seed, show_progress)
    chosen = best_row(rows, budget)
    points: tuple[PointRow, ...] = ()
    if chosen is not None:
        vectors = control_vectors(controls, model, tokenizer, swept[chosen.layer], training_samples, seed)
        points = tuple(grid.points(chosen, vectors, otherwise, halves[1]))
    return Sweep(rows, chosen, points, budget, len(halves[0]), len(halves[1]), len(neutral), name_of(propensity))


def _layers_of(plan: Plan, vector: SteeringVector, layers: int | Iterable[int] | None) -> SteeringVector:
    """Return the vector of the layers to sweep, each checked alone, as it is steered."""
    if not isinstance(vector, SteeringVector):
        raise TypeError(f"vector must be a SteeringVector, got {type(vector).__name__}")
    swept = vector if layers is None else vector[layers]
    if not swept.layers:
        plan.check(swept)
    for layer in swept.layers:
        plan.check(swept[layer])
    return swept


def _with_none(multipliers: Sequence[float]) -> Sequence[float]:
    """Return the multipliers, each once, with that of no steering, from which gains are measured."""
    listed = isinstance(multipliers, Iterable) and not isinstance(multipliers, (str, bytes, Mapping))
    return list(dict.fromkeys([0.0, *multipliers])) if listed else multipliers


def _budget(max_kl: float | None, texts: Sequence[Continuation]) -> float | None:
    if max_kl is None:
        return None
    if not texts:
        raise ValueError("a budget max_kl needs texts on which KL is measured: leave texts out for the library's")
    budget = finite_number(max_kl, "max_kl")
    if budget <= 0:
        raise ValueError(f"max_kl must be more than 0, got {budget:g}")
    return budget


def _cells(
    path: str | os.PathLike[str] | None,
    model: nn.Module,
    vector: SteeringVector,
    questions: Sequence[Question],
    texts: Sequence[Continuation],
    plan: Plan,
) -> Cells:
    """Return the cells that are finished, with hashes of all on which they depend.

    Raises ValueError for a file while the model is steered otherwise, on which the cells would depend, too.
    """
    from steering_vectors import active_patches  # the package itself, which is not there yet when this is imported

    if path is not None and (steered := active_patches(model)):
        raise ValueError(
            f"the model is steered already, by {steered[0]!r}, and a file can't tell by what: end that steering, or "
            f"leave path out"
        )
    settings = {
        "model": hash_of_model(model),
        "vector": hash_of_vector(vector),
        "set of items": hash_of(questions),
        "set of texts": hash_of(texts),
        "setting of multipliers, tokens, operator, propensity or batch_size": hash_of(plan.settings(), __version__),
    }
    return Cells(path, settings)


def _halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of the items that choose, and of those that are held out."""
    if count < 2:
        raise ValueError("a sweep needs at least two items: one half chooses, and the other reports")
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


@dataclass(frozen=True, eq=False)
class _Grid:
    """The cells of a sweep: batches of items and of texts × layers, each at all multipliers."""

    plan: Plan
    vector: SteeringVector
    questions: Sequence[Question]
    texts: Sequence[Continuation]
    cells: Cells

    def _measure(self, show_progress: bool) -> None:
        """Measure the cells that aren't finished. Those that are stay in the file, also after an interrupt."""
        jobs: list[tuple[str, int, Callable[[Sequence[int]], Iterator[tuple[int, Tensor]]]]] = [
            *(("items", n, partial(self._items, part)) for n, part in enumerate(self._item_parts())),
            *(("texts", n, partial(self._texts, part)) for n, part in enumerate(self._text_parts())),
        ]
        total = len(jobs) * len(self.vector.layers)
        with progress_bar(total=total, desc="Sweeping", unit="cell", disable=not show_progress) as bar:
            try:
                for kind, number, measured in jobs:
                    missing = [layer for layer in self.vector.layers if _cell(kind, number, layer) not in self.cells]
                    bar.update(len(self.vector.layers) - len(missing))
                    for layer, values in measured(missing):
                        self.cells[_cell(kind, number, layer)] = values
                        bar.update()
            finally:
                self.cells.write()

    def rows(self, halves: tuple[Tensor, Tensor], seed: int, show_progress: bool) -> tuple[SweepRow, ...]:
        """Measure what isn't finished, and return a row for each layer and multiplier but 0."""
        self._measure(show_progress)
        return tuple(self._rows(halves, seed))

    def points(
        self,
        chosen: SweepRow,
        vectors: Mapping[str, SteeringVector],
        otherwise: Mapping[str, Sequence[Question]],
        half: Tensor,
    ) -> Iterator[PointRow]:
        """Yield a row for each control, and for the vector under each variant, at the chosen layer and multiplier."""
        batches = self._held_out(self.questions, half) if vectors else []
        for name, control in vectors.items():
            yield _point(self.plan, name, control, chosen.multiplier, batches)
        for name, asked in otherwise.items():
            yield _point(self.plan, name, self.vector[chosen.layer], chosen.multiplier, self._held_out(asked, half))

    def _held_out(self, questions: Sequence[Question], half: Tensor) -> list[ItemBatch]:
        numbers = set(half.tolist())
        asked = [question for question in questions if question.item in numbers]
        return [self.plan.item_batch(part) for part in self.plan.parts_of_items(asked)]

    def _rows(self, halves: tuple[Tensor, Tensor], seed: int) -> Iterator[SweepRow]:
        item_parts, text_parts = range(len(self._item_parts())), range(len(self._text_parts()))
        for layer in self.vector.layers:
            propensities = torch.cat([self.cells[_cell("items", n, layer)] for n in item_parts])
            gains = propensities[:, 1:] - propensities[:, :1]  # (items, multipliers)
            costs = [self.cells[_cell("texts", n, layer)] for n in text_parts]
            kl = torch.cat(costs, dim=1) if costs else None  # (multipliers, tokens)
            for place, multiplier in enumerate(self.plan.multipliers):
                if multiplier:
                    gain, cost = gains[:, place], None if kl is None else kl[place]
                    yield _row(layer, multiplier, gain, cost, halves, seed)

    def _item_parts(self) -> list[list[Question]]:
        return self.plan.parts_of_items(self.questions)

    def _text_parts(self) -> list[Sequence[Continuation]]:
        return self.plan.parts_of_texts(self.texts)

    def _items(self, part: Sequence[Question], layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield layers with the items' propensities, unsteered and at each multiplier."""
        batch = self.plan.item_batch(part) if layers else None
        for layer in layers:
            assert batch is not None
            yield (
                layer,
                batch.scores(self.plan.steering(self.vector[layer]), [0.0, *self.plan.multipliers]).propensities,
            )

    def _texts(self, part: Sequence[Continuation], layers: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield layers with the KL of the texts' tokens at each multiplier."""
        batch = self.plan.text_batch(part) if layers else None
        for layer in layers:
            assert batch is not None
            yield layer, batch.scores(self.plan.steering(self.vector[layer]), self.plan.multipliers).kl


def _cell(kind: str, number: int, layer: int) -> str:
    return f"layer {layer}, {kind} {number}"


def _row(
    layer: int, multiplier: float, gains: Tensor, kl: Tensor | None, halves: tuple[Tensor, Tensor], seed: int
) -> SweepRow:
    choosing, held_out = (gains[half] for half in halves)
    low, high = bootstrap_interval(held_out, seed)
    return SweepRow(
        layer,
        multiplier,
        gain=float(choosing.mean()),
        held_out_gain=float(held_out.mean()),
        held_out_low=low,
        held_out_high=high,
        reversed=float((gains * multiplier < 0).double().mean()),
        kl_mean=None if kl is None else float(kl.mean()),
        kl_p95=None if kl is None else float(kl.quantile(0.95)),
    )


def _point(
    plan: Plan, condition: str, vector: SteeringVector, multiplier: float, batches: Sequence[ItemBatch]
) -> PointRow:
    """Return a row of the chosen layer and multiplier, measured on the items that were held out."""
    scores = torch.cat([batch.scores(plan.steering(vector), [0.0, multiplier]).propensities for batch in batches])
    gains = scores[:, 1] - scores[:, 0]
    low, high = bootstrap_interval(gains, plan.seed)
    return PointRow(condition, float(gains.mean()), low, high)
