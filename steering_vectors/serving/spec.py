"""Requests' steering as one string: vectors by name, their multipliers, and which tokens they steer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["KEY", "Spec", "check_name", "parse", "request"]

# The key of a request's string in extra_args and in vllm_xargs.
KEY = "steering"
SELECTIONS = ("all", "generated")
_LONGEST = 4096
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_EXAMPLE = "write it as 'formal:1.5,french:-0.5' or 'formal:1.5@generated'"


@dataclass(frozen=True)
class Spec:
    """The steering of one request: pairs of names and multipliers, and the tokens that they steer."""

    multipliers: tuple[tuple[str, float], ...]
    tokens: str = "all"

    def __str__(self) -> str:
        written = ",".join(f"{name}:{multiplier!r}" for name, multiplier in self.multipliers)
        return written if self.tokens == "all" else f"{written}@{self.tokens}"


def request(multipliers: Mapping[str, float], *, tokens: str = "all") -> dict[str, str]:
    """Return the dictionary that steers one request: vLLM's ``extra_args``, or ``vllm_xargs`` over HTTP.

    vLLM isn't needed for that. Each direction is multiplied and added to the output of its decoder
    block, as :meth:`SteeringVector.apply <steering_vectors.SteeringVector.apply>` does; several
    vectors act in sum.

    Args:
        multipliers: A mapping from names of vectors to finite numbers. A vector's name is that of its
            file in the server's folder, without ``.safetensors``.
        tokens: ``"all"``, or ``"generated"`` for those from the prompt's last token on, whose output
            decides the first token of the answer.

    Raises:
        TypeError: If a name is no string or a multiplier no number.
        ValueError: If there are no vectors, if a name or a selection can't be one, if a multiplier
            isn't finite, or if the text would be longer than 4,096 characters.

    >>> request({"formal": 1.5, "french": -0.5}, tokens="generated")
    {'steering': 'formal:1.5,french:-0.5@generated'}
    """
    if not isinstance(multipliers, Mapping):
        raise TypeError(f"multipliers must be a mapping from names to numbers, got {type(multipliers).__name__}")
    pairs = []
    for name, multiplier in multipliers.items():
        if not isinstance(name, str):
            raise TypeError(f"a vector's name must be a string, got {name!r}")
        if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
            raise TypeError(f"the multiplier of {name!r} must be a number, got {multiplier!r}")
        try:
            finite = math.isfinite(float(multiplier))
        except OverflowError:  # an int beyond the floats
            finite = False
        if not finite:
            raise ValueError(f"the multiplier of {name!r} must be finite, got {multiplier!s:.40}")
        pairs.append((name, float(multiplier)))
    text = str(Spec(tuple(pairs), tokens))
    parse(text)
    return {KEY: text}


def parse(text: object) -> Spec:
    """Return the steering that a request's string asks for.

    Raises ValueError, with the reason, for anything else.
    """
    if not isinstance(text, str):
        raise ValueError(f"steering must be a string, got {type(text).__name__}: {_EXAMPLE}")
    if len(text) > _LONGEST:
        raise ValueError(f"steering has {len(text)} characters, and at most {_LONGEST} are allowed")
    vectors, at, tokens = text.partition("@")
    if at and tokens not in SELECTIONS:
        raise ValueError(f"steering selects {_short(tokens)}: expected {' or '.join(map(repr, SELECTIONS))} after '@'")
    multipliers: dict[str, float] = {}
    for part in vectors.split(","):
        name, colon, number = part.partition(":")
        if not colon:
            raise ValueError(f"steering has {_short(part)} without a multiplier: {_EXAMPLE}")
        check_name(name)
        if name in multipliers:
            raise ValueError(
                f"steering names the vector {name!r} twice: write it once, with the sum of the multipliers"
            )
        multipliers[name] = _multiplier(name, number)
    return Spec(tuple(multipliers.items()), tokens or "all")


def check_name(name: str) -> None:
    """Raise ValueError for what can't be the name of a vector."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{_short(name)} can't be the name of a vector: expected 1 to 128 letters, digits, dots, dashes or "
            f"underscores"
        )


def _multiplier(name: str, number: str) -> float:
    value = float(number) if _NUMBER.fullmatch(number) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"the multiplier of {name!r} must be a finite number, got {_short(number)}")
    return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
