"""The three families, operators, selectors and aggregators: each member with what it does, written out by hand.

Tests that walk a family take it from here, and tests/test_families.py tells of a member that is missing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from steering_vectors import (
    Aggregator,
    PatchDeltaOperator,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    after,
    at,
    clamp_operator,
    completion,
    from_index,
    generated,
    geometric_median_aggregator,
    logistic_aggregator,
    mean_aggregator,
    norm_preserving_operator,
    pca_aggregator,
    prompted,
    rotation_operator,
    select,
    winsorized_aggregator,
)


@dataclass(frozen=True)
class Operator:
    """An operator, made anew by ``make`` and shown as ``shown``.

    ``row_by_hand`` is its formula for one row ``(hidden,)`` and a direction ``(hidden,)``.
    """

    shown: str
    make: Callable[[], PatchDeltaOperator]
    row_by_hand: Callable[[Tensor, Tensor], Tensor]

    def by_hand(self, activation: Tensor, direction: Tensor) -> Tensor:
        """Return the steered activation ``(…, hidden)``, row by row, in the dtype of what is given."""
        rows = activation.reshape(-1, activation.shape[-1])
        return torch.stack([self.row_by_hand(row, direction.reshape(-1)) for row in rows]).reshape(activation.shape)


def unit_of(d: Tensor) -> Tensor:
    return d / d.norm() if bool(d.any()) else d


def ablated(h: Tensor, d: Tensor) -> Tensor:
    return h - torch.outer(unit_of(d), unit_of(d)) @ h


def clamped(low: float, high: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda h, d: ablated(h, d) + (h @ unit_of(d)).clamp(low, high) * unit_of(d) if bool(d.any()) else h


def turned(angle: float) -> Callable[[Tensor, Tensor], Tensor]:
    def turn(h: Tensor, d: Tensor) -> Tensor:
        own = unit_of(h)
        aside = unit_of(d) - (unit_of(d) @ own) * own
        if bool(aside.norm() < 1e-6):
            return h
        aside = aside / aside.norm()
        plane = torch.outer(own, own) + torch.outer(aside, aside)
        quarter = torch.outer(aside, own) - torch.outer(own, aside)
        return h + (math.sin(angle) * quarter + (math.cos(angle) - 1) * plane) @ h

    return turn


def at_the_norm_of_before(steered_by: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def scale(h: Tensor, d: Tensor) -> Tensor:
        steered = steered_by(h, d)
        return steered / steered.norm() * h.norm() if bool(steered.norm() > 1e-6 * h.norm()) else h

    return scale


# Each factory once, by its name: the laws run over these on every architecture.
OPERATORS: dict[str, Operator] = {
    "addition_operator": Operator("addition_operator()", addition_operator, lambda h, d: h + d),
    "ablation_operator": Operator("ablation_operator()", ablation_operator, ablated),
    "ablation_then_addition_operator": Operator(
        "ablation_then_addition_operator()", ablation_then_addition_operator, lambda h, d: ablated(h, d) + d
    ),
    "clamp_operator": Operator("clamp_operator(min=0.5, max=1.0)", lambda: clamp_operator(0.5, 1.0), clamped(0.5, 1.0)),
    "rotation_operator": Operator("rotation_operator(0.6)", lambda: rotation_operator(0.6), turned(0.6)),
    "norm_preserving_operator": Operator(
        "norm_preserving_operator(addition_operator())",
        lambda: norm_preserving_operator(addition_operator()),
        at_the_norm_of_before(lambda h, d: h + d),
    ),
}
# The same factories with other arguments.
OTHER_OPERATORS: dict[str, Operator] = {
    "clamp_operator(min)": Operator("clamp_operator(min=0.5)", lambda: clamp_operator(min=0.5), clamped(0.5, math.inf)),
    "clamp_operator(max)": Operator(
        "clamp_operator(max=-0.25)", lambda: clamp_operator(max=-0.25), clamped(-math.inf, -0.25)
    ),
    "clamp_operator(small)": Operator(
        "clamp_operator(min=-0.1, max=0.2)", lambda: clamp_operator(min=-0.1, max=0.2), clamped(-0.1, 0.2)
    ),
    "clamp_operator(equal)": Operator(
        "clamp_operator(min=1.5, max=1.5)", lambda: clamp_operator(1.5, 1.5), clamped(1.5, 1.5)
    ),
    "rotation_operator(past)": Operator("rotation_operator(-2.5)", lambda: rotation_operator(-2.5), turned(-2.5)),
    "norm_preserving_operator(ablation)": Operator(
        "norm_preserving_operator(ablation_operator())",
        lambda: norm_preserving_operator(ablation_operator()),
        at_the_norm_of_before(ablated),
    ),
}


@dataclass(frozen=True)
class Selection:
    """``tokens=`` for a padded batch of prompts.

    ``selects`` is the weight of the token at ``index`` in a row that began with a prompt of ``n`` and has these ids.
    """

    tokens: Callable[[dict[str, Tensor]], Any]
    selects: Callable[[int, int, list[int]], float]


def is_after(ids: list[int], index: int, opening: list[int], closing: list[int] | None = None) -> bool:
    """Follow a row from its first token to the one at ``index``, by hand."""
    is_open = False
    for end in range(1, index + 2):
        opens = ids[:end][-len(opening) :] == opening
        closes = closing is not None and ids[:end][-len(closing) :] == closing
        if opens and closes:
            is_open = len(opening) > len(closing or [])
        elif opens or closes:
            is_open = opens
    return is_open


def lengths(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["attention_mask"].sum(dim=1)


# Each factory at least once, as a call of it; and the other things that ``tokens=`` takes.
SELECTIONS: dict[str, Selection] = {
    "all": Selection(lambda inputs: None, lambda index, n, ids: True),
    "generated(inputs)": Selection(generated, lambda index, n, ids: index >= n - 1),
    "generated(lengths)": Selection(
        lambda inputs: generated(lengths(inputs).tolist()), lambda index, n, ids: index >= n - 1
    ),
    "prompted(inputs)": Selection(prompted, lambda index, n, ids: index < n - 1),
    "from_index(1)": Selection(lambda inputs: from_index(1), lambda index, n, ids: index >= 1),
    "from_index(per row)": Selection(
        lambda inputs: from_index((lengths(inputs) - 2).tolist()), lambda index, n, ids: index >= n - 2
    ),
    "at([0, 2, 6, 9])": Selection(lambda inputs: at([0, 2, 6, 9]), lambda index, n, ids: index in (0, 2, 6, 9)),
    "list": Selection(lambda inputs: [1, 4, 8], lambda index, n, ids: index in (1, 4, 8)),
    "slice": Selection(lambda inputs: slice(2, 9, 2), lambda index, n, ids: index in (2, 4, 6, 8)),
    "callable": Selection(
        lambda inputs: lambda positions: positions.index % 3 == 1, lambda index, n, ids: index % 3 == 1
    ),
    "generated(inputs, strength=…)": Selection(
        lambda inputs: generated(inputs, strength=lambda step: 0.5**step),
        lambda index, n, ids: 0.5 ** (index - n + 1) if index >= n - 1 else 0,
    ),
    # In each prompt something is selected, or the steering would warn.
    "after([12, 13]) | at(0)": Selection(
        lambda inputs: after([12, 13]) | at(0),
        lambda index, n, ids: index == 0 or is_after(ids, index, [12, 13]),
    ),
    "after(22, until=[24, 25]) | 0.5 * at(0)": Selection(
        lambda inputs: after(22, until=[24, 25]) | 0.5 * at(0),
        lambda index, n, ids: 1 if is_after(ids, index, [22], [24, 25]) else 0.5 * (index == 0),
    ),
    "select(list)": Selection(lambda inputs: select([1, 4]) | [8], lambda index, n, ids: index in (1, 4, 8)),
    "~generated(inputs) & slice": Selection(
        lambda inputs: ~generated(inputs) & slice(1, None), lambda index, n, ids: 1 <= index < n - 1
    ),
}
# Those that must see a cache's first pass.
FIRST_PASS: dict[str, Selection] = {
    "generated()": Selection(lambda inputs: generated(), lambda index, n, ids: index >= n - 1),
    "prompted()": Selection(lambda inputs: prompted(), lambda index, n, ids: index < n - 1),
    "completion()": Selection(lambda inputs: completion(), lambda index, n, ids: index >= n),
}


@dataclass(frozen=True)
class AggregatorCase:
    """An aggregator, made anew by ``make``, and its formula for rows ``(n, hidden)`` in float64.

    ``of_sets_by_hand`` is the one for two sets ``(n, hidden)`` and ``(m, hidden)``, if it takes them.
    """

    make: Callable[[], Aggregator]
    by_hand: Callable[[Tensor, Tensor], Tensor]
    of_sets_by_hand: Callable[[Tensor, Tensor], Tensor] | None = None
    has_norm_1: bool = False
    shown: str = ""


def first_component(positive: Tensor, negative: Tensor) -> Tensor:
    differences = positive - negative
    first = torch.linalg.svd(differences).Vh[0]
    return first if float(first @ differences.mean(dim=0)) >= 0 else -first


def normal(positive: Tensor, negative: Tensor) -> Tensor:
    n, half = len(positive), (positive - negative) / 2
    rows = torch.cat([half, -half]).numpy()
    regression = LogisticRegression(fit_intercept=False).fit(rows, [1] * n + [0] * n)
    return torch.nn.functional.normalize(torch.tensor(regression.coef_[0]), dim=0)


def normal_of_sets(positive: Tensor, negative: Tensor) -> Tensor:
    """No rows are centred: where there is an intercept, it makes no difference."""
    regression = LogisticRegression(tol=1e-8, max_iter=1000)
    regression.fit(torch.cat([positive, negative]).numpy(), [1] * len(positive) + [0] * len(negative))
    return torch.nn.functional.normalize(torch.tensor(regression.coef_[0]), dim=0)


def median_by_descent(rows: Tensor) -> Tensor:
    """The least sum of distances, found by a general optimizer; the distances are rounded off near 0."""
    point = rows.mean(dim=0).clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = ((rows - point).square().sum(dim=1) + 1e-12).sqrt().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return point.detach()


def winsorized_by_hand(rows: Tensor) -> Tensor:
    """A quarter of the values is cut at each end, column by column."""
    k, columns = len(rows) // 4, [sorted(column.tolist()) for column in rows.T]
    replaced = [[c[k]] * k + c[k : len(c) - k] + [c[len(c) - k - 1]] * k for c in columns]
    return torch.tensor([sum(column) / len(column) for column in replaced], dtype=torch.float64)


def each(statistic: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda positive, negative: statistic(positive) - statistic(negative)


def mean_of(rows: Tensor) -> Tensor:
    return rows.mean(dim=0)


# Each factory once, by its name.
AGGREGATORS: dict[str, AggregatorCase] = {
    "mean_aggregator": AggregatorCase(mean_aggregator, lambda p, n: (p - n).mean(dim=0), each(mean_of)),
    "pca_aggregator": AggregatorCase(pca_aggregator, first_component, has_norm_1=True),
    "logistic_aggregator": AggregatorCase(logistic_aggregator, normal, normal_of_sets, has_norm_1=True),
    "geometric_median_aggregator": AggregatorCase(
        geometric_median_aggregator, each(median_by_descent), each(median_by_descent)
    ),
    "winsorized_aggregator": AggregatorCase(
        lambda: winsorized_aggregator(0.25),
        each(winsorized_by_hand),
        each(winsorized_by_hand),
        shown="winsorized_aggregator(0.25)",
    ),
}
TAKE_SETS = [name for name, case in AGGREGATORS.items() if case.of_sets_by_hand is not None]
