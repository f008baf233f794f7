"""The range of a vector's slider: as far as its strength is sensible, and somewhat further."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BEYOND = 2.0  # times as far, to see text break


@dataclass(frozen=True)
class Range:
    """A slider from ``-limit`` to ``limit``, and where it stands first."""

    limit: float
    step: float
    start: float
    info: str = ""


def range_up_to(limit: float) -> Range:
    """Return a range with round numbers that ends at ``limit`` or a little beyond, and starts in its middle.

    Raises ValueError unless the limit is finite and more than 0.
    """
    if not (limit > 0 and math.isfinite(limit)):
        raise ValueError(f"the range of strengths must be more than 0, got {limit:g}")
    digits = 1 - math.floor(math.log10(limit))
    step = round(10.0**-digits, max(digits, 0))
    end = round(math.ceil(round(limit / step, 6)) * step, max(digits, 0))
    return Range(end, step, round(round(limit / 2 / step) * step, max(digits, 0)))


def calibrated_range(
    model: Any,
    tokenizer: Any,
    vector: Any,
    texts: Sequence[str] | None,
    *,
    max_kl: float = 1.0,
    show_progress: bool = False,
) -> Range:
    """Return a range of twice the multiplier that ``calibrate`` finds, which starts at it.

    At 1 nat per token, text usually stays whole, and changes. Raises ValueError if no multiplier meets the budget.
    """
    from steering_vectors import generated
    from steering_vectors.evaluation import calibrate

    try:
        found = calibrate(
            model, tokenizer, vector, texts, max_kl=max_kl, tokens=generated, show_progress=show_progress
        ).multiplier
    except ValueError as error:
        raise ValueError(
            f"a vector can't be calibrated: set the sliders' range with --range NUMBER ({error})"
        ) from error
    made = range_up_to(_BEYOND * found)
    return Range(made.limit, made.step, made.start, f"{found:.2g} changes predictions by {max_kl:g} nat per token.")
