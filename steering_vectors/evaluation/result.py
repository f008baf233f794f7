"""The result of an evaluation: its rows, a table of them, and a verdict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steering_vectors._html import block, table
from steering_vectors.evaluation.answers import AnswerRow, show_answers
from steering_vectors.evaluation.files import read_json, write_json
from steering_vectors.evaluation.propensity import UNITS
from steering_vectors.evaluation.rows import VARIANT, VECTOR, ConditionRow, ItemRow
from steering_vectors.evaluation.tables import paragraph, signed, text_table


def verdict(rows: Sequence[ConditionRow]) -> str:
    """Return one line on a vector and its controls, which begins with ``"steers:"`` or ``"does not steer:"``.

    A vector steers if the interval of its slope lies above zero and above that of every control, of
    either sign: a control that moves the items the other way moves them as well. Rows without a
    slope, and variants of the items, don't count. A single item has no interval, so it is too few.

    Args:
        rows: The rows of an evaluation, of which the first is the vector's.

    Raises:
        ValueError: If there is no row of a vector.

    >>> vector = ConditionRow("vector", (-1.0, 1.0), (-0.8, 0.8), 0.8, 0.7, 0.9)
    >>> verdict([vector, ConditionRow("random 1", (-1.0, 1.0), (0.0, 0.0), 0.01, -0.02, 0.05)])
    "steers: its slope is +0.80 [+0.70, +0.90], the strongest control's +0.01"
    """
    if not rows or rows[0].condition != VECTOR or rows[0].slope is None:
        raise ValueError("a verdict needs the row of a vector, and it must be the first")
    vector, *others = rows
    assert vector.slope_low is not None
    assert vector.slope_high is not None
    controls = [row for row in others if row.slope is not None and not row.condition.startswith(VARIANT)]
    found = f"its slope is {_interval(vector)}"
    if vector.slope_high < 0:
        return f"does not steer: it steers the other way, {found}"
    if not vector.slope_low > 0:  # also for NaN
        return f"does not steer: {found}, which reaches zero"
    if vector.items == 1:
        return f"does not steer: one item is too few to tell, {found}"
    if not controls:
        return f"steers: {found}; no control was measured"
    strongest = max(controls, key=_reach)
    if not vector.slope_low > _reach(strongest):
        return f"does not steer: {found}, which reaches that of {strongest.condition}, {_interval(strongest)}"
    return f"steers: {found}, the strongest control's {strongest.slope:+.2f}"


def _reach(row: ConditionRow) -> float:
    """Return how far from zero a control's interval reaches, to either side."""
    assert row.slope_low is not None
    assert row.slope_high is not None
    return max(abs(row.slope_low), abs(row.slope_high))


def _interval(row: ConditionRow) -> str:
    return f"{row.slope:+.2f} [{row.slope_low:+.2f}, {row.slope_high:+.2f}]"


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`. Printed, it is a table with a verdict below.

    Attributes:
        rows: A row for each condition. The first one is the vector.
        items: The items under the vector.
        propensity: The propensity, as printed.
        texts: The number of texts on which the costs were measured.
        seed: The seed of the controls and intervals.
        answers: The answers at each multiplier and their scores, if a score was asked for.

    >>> row = ConditionRow("vector", (-1.0, 1.0), (-0.8, 0.8), 0.8, 0.7, 0.9, 0.0, items=16)
    >>> print(Evaluation((row,), (), "text_propensity()", texts=0, seed=0))
    condition     at -1    at +1   slope [95 % interval]   reversed
    vector        -0.80    +0.80   +0.80 [+0.70, +0.90]     0 of 16
    <BLANKLINE>
    ...
    steers: its slope is +0.80 [+0.70, +0.90]; no control was measured
    """

    rows: tuple[ConditionRow, ...]
    items: tuple[ItemRow, ...]
    propensity: str
    texts: int
    seed: int
    answers: tuple[AnswerRow, ...] = ()

    @property
    def verdict(self) -> str:
        """One line that begins with ``"steers:"`` or ``"does not steer:"``, as :func:`verdict` returns it."""
        return verdict(self.rows)

    def __str__(self) -> str:
        parts = [text_table(*self._table()), *map(paragraph, self._notes())]
        if self.answers:
            parts.append(show_answers(self.answers))
        return "\n\n".join([*parts, paragraph(self.verdict)])

    def _repr_html_(self) -> str:
        columns, lines = self._table()
        return block("Evaluation", table(columns, lines), f"<p>{self.verdict}</p>")

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the evaluation as JSON, and write it to a file if a path is given, whole or not at all.

        Args:
            path: The file, which is replaced if it exists.
        """
        return write_json(asdict(self), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Evaluation:
        """Return an evaluation from what :meth:`to_json` returned or wrote.

        Args:
            source: The JSON, or the path of a file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it isn't the JSON of an evaluation.
        """
        found = read_json(source, "an evaluation")
        try:
            return cls(
                rows=tuple(ConditionRow(**_tuples(row)) for row in found["rows"]),
                items=tuple(ItemRow(**_tuples(row)) for row in found["items"]),
                answers=tuple(AnswerRow(**_tuples(row)) for row in found.get("answers", ())),
                **{name: found[name] for name in ("propensity", "texts", "seed")},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not the JSON of an evaluation: {error}") from error

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame, with a line for each condition and multiplier.

        Raises:
            ImportError: If pandas isn't installed.
        """
        from steering_vectors.evaluation.tables import data_frame

        lines = []
        for row in self.rows:
            shared = {name: value for name, value in asdict(row).items() if not isinstance(value, tuple)}
            for place, multiplier in enumerate(row.multipliers):
                lines.append({**shared, "multiplier": multiplier, **_at(row, place)})
        return data_frame(lines)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        multipliers = self.rows[0].multipliers
        ends = sorted(
            {min(multipliers), max(multipliers)} | {m for row in self.rows for m in row.multipliers if m == 0}
        )
        columns = ["condition", *(f"at {signed(m)}" for m in ends), "slope [95 % interval]", "reversed"]
        shown = _nearest_to_one(multipliers)
        if self.texts:
            columns += [f"KL {signed(multipliers[shown])}", "p95"]
        return columns, [self._line(row, ends, shown) for row in self.rows]

    def _line(self, row: ConditionRow, ends: Sequence[float], shown: int) -> list[str]:
        at = dict(zip(row.multipliers, row.propensities, strict=True))
        steered = row.slope is not None
        cells = [row.condition, *(f"{at[m]:+.2f}" if m in at else "" for m in ends), _interval(row) if steered else ""]
        cells.append(f"{round((row.anti_steerable or 0) * row.items)} of {row.items}" if steered else "")
        if self.texts:
            cells += [f"{values[shown]:.2f}" if values else "" for values in (row.kl_mean, row.kl_p95)]
        return cells

    def _notes(self) -> list[str]:
        unit = UNITS.get(self.propensity)
        notes = [
            f"Columns 'at': mean propensity at a multiplier, {self.propensity}{f', {unit}' if unit else ''}. Slope: "
            f"its change per unit of the multiplier. Reversed: items that move the other way."
        ]
        if self.texts:
            shown = self.rows[0].multipliers[_nearest_to_one(self.rows[0].multipliers)]
            notes.append(
                f"KL: what steering at {signed(shown)} changes in the predictions of {self.texts} neutral texts, in "
                f"nats per token: the mean and the 95th percentile."
            )
        variants = [row for row in self.rows if row.condition.startswith(VARIANT)]
        if variants:
            worst = min(variants, key=lambda row: row.slope or 0.0)
            notes.append(f"Worst variant: {worst.condition.removeprefix(VARIANT)}, with slope {_interval(worst)}.")
        return notes


def _at(row: ConditionRow, place: int) -> dict[str, float | None]:
    """Return all that was measured at one of a row's multipliers, by the names of columns."""
    costs = {name: getattr(row, name) for name in ("kl_mean", "kl_p95", "first_kl", "nll_change")}
    ends = {"propensity_low": row.propensities_low, "propensity_high": row.propensities_high}
    columns = {"propensity": row.propensities, **ends, **costs}
    return {name: values[place] if values else None for name, values in columns.items()}


def _nearest_to_one(multipliers: Sequence[float]) -> int:
    """Return the place of the multiplier nearest to 1, at which costs are shown."""
    return min(range(len(multipliers)), key=lambda place: (not multipliers[place], abs(multipliers[place] - 1)))


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) and name != "prompt" else value for name, value in row.items()
    }
