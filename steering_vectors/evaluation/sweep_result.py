"""The result of a sweep: a row for each layer and multiplier, the chosen one, and its controls."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from steering_vectors._arguments import finite_number
from steering_vectors._html import block, table
from steering_vectors.evaluation.files import read_json, write_json
from steering_vectors.evaluation.propensity import UNITS
from steering_vectors.evaluation.tables import data_frame, paragraph, signed, text_table


@dataclass(frozen=True)
class SweepRow:
    """One layer at one multiplier.

    Attributes:
        layer: The layer, steered alone.
        multiplier: The multiplier.
        gain: The mean over the choosing half of the items of the change of propensity.
        held_out_gain: The same over the other half.
        held_out_low: The lower end of its interval: 95 %, by 10,000 resamples of the items.
        held_out_high: Its upper end.
        reversed: The share of all items whose propensity changes against the sign of the
            multiplier.
        kl_mean: The mean over the texts' tokens of KL(unsteered ‖ steered), in nats; None without
            texts.
        kl_p95: The 95th percentile of the same.
    """

    layer: int
    multiplier: float
    gain: float
    held_out_gain: float
    held_out_low: float
    held_out_high: float
    reversed: float
    kl_mean: float | None = None
    kl_p95: float | None = None


@dataclass(frozen=True)
class PointRow:
    """A control or a variant of the items at the chosen layer and multiplier.

    Attributes:
        condition: The name, such as ``"random 1"``, or ``"variant: …"``.
        gain: The mean change of propensity over the half of the items that was held out.
        low: The lower end of its interval: 95 %, by 10,000 resamples of the items.
        high: Its upper end.
    """

    condition: str
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Sweep:
    """The result of :func:`sweep`. Printed, it is a table of layers and multipliers with a verdict below.

    Attributes:
        rows: A row for each layer and multiplier but 0, in order.
        chosen: The row with the largest gain within the budget, or None if there is none.
        points: The controls, and the variants, at the chosen layer and multiplier.
        max_kl: The budget on the 95th percentile of KL, in nats, or None for none.
        choosing: The number of items by which the row was chosen.
        held_out: The number of the other items, on which it is reported.
        texts: The number of texts on which KL was measured.
        propensity: The propensity, as printed.

    >>> Sweep((), None, (), max_kl=0.5, choosing=8, held_out=8, texts=8).verdict
    'does not steer: no layer and multiplier raises the propensity within the budget'
    """

    rows: tuple[SweepRow, ...]
    chosen: SweepRow | None
    points: tuple[PointRow, ...]
    max_kl: float | None
    choosing: int
    held_out: int
    texts: int
    propensity: str = "text_propensity()"

    def best(self, max_kl: float | None = None) -> SweepRow | None:
        """Return the row with the largest gain on the choosing half, or None if no gain is positive.

        Args:
            max_kl: The budget on the 95th percentile of KL, in nats; by default that of the sweep.

        Raises:
            ValueError: If there is a budget, and KL was not measured.
        """
        return best_row(self.rows, self.max_kl if max_kl is None else finite_number(max_kl, "max_kl"))

    @property
    def verdict(self) -> str:
        """One line that begins with ``"steers:"`` or ``"does not steer:"``.

        The chosen row steers if, on the items held out, the interval of its gain lies above zero
        and above those of all controls, of either sign. At a negative multiplier, the vector steers
        the other way. A single item has no interval, so it is too few.
        """
        if self.chosen is None:
            return "does not steer: no layer and multiplier raises the propensity within the budget"
        row = self.chosen
        found = f"its gain is {_interval(row.held_out_gain, row.held_out_low, row.held_out_high)}"
        if not row.held_out_low > 0:  # also for NaN
            return f"does not steer: on items held out, {found}, which reaches zero"
        if row.multiplier < 0 or self.held_out == 1:
            why = "it steers the other way" if row.multiplier < 0 else "one item held out is too few to tell"
            return f"does not steer: {why}, {found} at {signed(row.multiplier)}"
        controls = [point for point in self.points if not point.condition.startswith("variant: ")]
        if not controls:
            return f"steers: on items held out, {found}; no control was measured"
        strongest = max(controls, key=lambda point: max(abs(point.low), abs(point.high)))
        reach = max(abs(strongest.low), abs(strongest.high))
        if row.held_out_low <= reach:
            span = _interval(strongest.gain, strongest.low, strongest.high)
            return f"does not steer: on items held out, {found}, which reaches that of {strongest.condition}, {span}"
        return f"steers: on items held out, {found}, the strongest control's {strongest.gain:+.2f}"

    def __str__(self) -> str:
        return "\n\n".join([text_table(*self._table()), *map(paragraph, self._notes()), paragraph(self.verdict)])

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{note}</p>" for note in [*self._notes(), self.verdict])
        return block("Sweep", table(*self._table()), notes)

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame. Raises ImportError if pandas isn't installed."""
        return data_frame([{field.name: getattr(row, field.name) for field in fields(row)} for row in self.rows])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the sweep as JSON, and write it to a file if a path is given, whole or not at all.

        Args:
            path: The file, which is replaced if it exists.
        """
        return write_json(asdict(self), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Sweep:
        """Return a sweep from what :meth:`to_json` returned or wrote.

        Args:
            source: The JSON, or the path of a file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it isn't the JSON of a sweep.
        """
        found: Mapping[str, Any] = read_json(source, "a sweep")
        try:
            return cls(
                **{
                    **found,
                    "rows": tuple(SweepRow(**row) for row in found["rows"]),
                    "points": tuple(PointRow(**row) for row in found["points"]),
                    "chosen": None if found["chosen"] is None else SweepRow(**found["chosen"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not the JSON of a sweep: {error}") from error

    def _table(self) -> tuple[list[str], list[list[str]]]:
        columns = ["layer", "multiplier", "gain", "held out [95 % interval]", "reversed"]
        if self.texts:
            columns += ["KL", "p95"]
        lines = []
        for row in self.rows:
            cells = [
                f"{row.layer}{' *' if row == self.chosen else ''}",
                signed(row.multiplier),
                f"{row.gain:+.2f}",
                _interval(row.held_out_gain, row.held_out_low, row.held_out_high),
                f"{row.reversed:.0%}",
            ]
            lines.append(cells + ([f"{row.kl_mean:.2f}", f"{row.kl_p95:.2f}"] if self.texts else []))
        return columns, lines

    def _notes(self) -> list[str]:
        unit = UNITS.get(self.propensity)
        notes = [
            f"Gain: the mean change of {self.propensity}{f', in {unit}' if unit else ''}, over {self.choosing} items, "
            f"by which a row is chosen; held out: over {self.held_out} others. Reversed: items that move the other way."
        ]
        if self.texts:
            budget = "" if self.max_kl is None else f" At most {self.max_kl:g} at the 95th percentile is allowed."
            notes.append(f"KL: nats per token on {self.texts} neutral texts, mean and 95th percentile.{budget}")
        if self.chosen is not None:
            notes.append(f"* chosen: layer {self.chosen.layer} at {signed(self.chosen.multiplier)}.")
        variants = [point for point in self.points if point.condition.startswith("variant: ")]
        if variants:
            worst = min(variants, key=lambda point: point.gain)
            span = _interval(worst.gain, worst.low, worst.high)
            notes.append(f"Worst variant: {worst.condition.removeprefix('variant: ')}, with gain {span}.")
        return notes


def best_row(rows: tuple[SweepRow, ...], max_kl: float | None) -> SweepRow | None:
    """Return the row with the largest gain on the choosing half within a budget, or None if no gain is positive."""
    if max_kl is not None and any(row.kl_p95 is None for row in rows):
        raise ValueError("a budget max_kl needs texts on which KL was measured, and there were none")
    open_rows = [row for row in rows if row.gain > 0 and (max_kl is None or (row.kl_p95 or 0.0) <= max_kl)]
    return max(open_rows, key=lambda row: row.gain, default=None)


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"
