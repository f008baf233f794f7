"""Combine selectors: both, either, the others, and a share of one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering_vectors._arguments import finite_number
from steering_vectors._tokens.indices import TokenSelection, as_selector
from steering_vectors._tokens.positions import Selector, TokenPositions, selected


class CombinableSelector(ABC):
    """A selector that combines with others by ``&``, ``|``, ``~`` and ``*``.

    All selectors of this library do. The other side may be whatever ``tokens=`` takes: a list, a
    slice, a mask or a function. :func:`select` turns one of those into such a selector.

    - ``a & b``: the product of the weights. Of masks, the tokens that both select.
    - ``a | b``: of two weights, the one farther from 0. Of masks, the tokens that either selects.
    - ``~a``: the own tokens that it doesn't select; 1 − w for weights w from 0 to 1, and an error
      in the pass for others. Padding is never selected.
    - ``0.5 * a``: the weights, or 1 for a selected token, times a number.

    >>> at(0) | 0.5 * ~from_index(2)
    at([0]) | 0.5 * ~from_index(2)
    """

    @abstractmethod
    def __call__(self, positions: TokenPositions, /) -> Tensor:
        """Return a mask of the selected tokens, or the tokens' weights."""

    def __and__(self, other: TokenSelection) -> CombinableSelector:
        """Select the tokens that both select."""
        return _Both(self, _operand(other, "&"))

    def __rand__(self, other: TokenSelection) -> CombinableSelector:
        """Select the tokens that both select."""
        return _Both(_operand(other, "&"), self)

    def __or__(self, other: TokenSelection) -> CombinableSelector:
        """Select the tokens that either selects."""
        return _Either(self, _operand(other, "|"))

    def __ror__(self, other: TokenSelection) -> CombinableSelector:
        """Select the tokens that either selects."""
        return _Either(_operand(other, "|"), self)

    def __invert__(self) -> CombinableSelector:
        """Select the other own tokens."""
        return _Others(self)

    def __mul__(self, factor: float) -> CombinableSelector:
        """Scale the weights."""
        return _Scaled(self, finite_number(factor, "the factor of a selector"))

    def __rmul__(self, factor: float) -> CombinableSelector:
        """Scale the weights."""
        return self * factor


def lifted(tokens: TokenSelection) -> CombinableSelector:
    """Return a selector with operators. Raises the errors of :func:`as_selector`."""
    return tokens if isinstance(tokens, CombinableSelector) else _Lifted(as_selector(tokens))


class _Combined(CombinableSelector):
    """A selector made of other selectors, the ``parts``, that says of itself what they say together."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Selector, ...]:
        """The selectors that it is made of."""

    @property
    def rows(self) -> int | None:
        """The number of rows that the parts distinguish together; None if a part leaves that open."""
        said = [getattr(part, "rows", None) for part in self.parts]
        together = math.lcm(*(n for n in said if n is not None))
        return None if together == 1 and None in said else together

    @property
    def counts_from_end(self) -> bool | None:
        """True if a part counts from the end; None if a part leaves that open."""
        return _any_says("counts_from_end", self.parts)

    @property
    def needs_prompt_length(self) -> bool | None:
        """True if a part needs the prompt's length; None if a part leaves that open."""
        return _any_says("needs_prompt_length", self.parts)

    @property
    def needs_row_ids(self) -> bool:
        """True if a part needs the rows' token ids."""
        return bool(_any_says("needs_row_ids", self.parts))


@dataclass(frozen=True)
class _Lifted(_Combined):
    selector: Selector

    def __call__(self, positions: TokenPositions) -> Tensor:
        return self.selector(positions)

    @property
    def parts(self) -> tuple[Selector, ...]:
        return (self.selector,)

    def __repr__(self) -> str:
        return f"select({_shown(self.selector)})"


@dataclass(frozen=True)
class _Both(_Combined):
    one: Selector
    other: Selector

    def __call__(self, positions: TokenPositions) -> Tensor:
        one, other = (selected(part, positions) for part in self.parts)
        return one & other if one.dtype is other.dtype is torch.bool else one * other

    @property
    def parts(self) -> tuple[Selector, ...]:
        return self.one, self.other

    def __repr__(self) -> str:
        return " & ".join(_in_brackets(part, _Either) for part in self.parts)


@dataclass(frozen=True)
class _Either(_Combined):
    one: Selector
    other: Selector

    def __call__(self, positions: TokenPositions) -> Tensor:
        one, other = (selected(part, positions) for part in self.parts)
        if one.dtype is other.dtype is torch.bool:
            return one | other
        dtype = torch.promote_types(one.dtype, other.dtype)
        one, other = one.to(dtype), other.to(dtype)
        farther = torch.where(one.abs() >= other.abs(), one, other)
        # Where both are 0, gradients flow to both, so that either can be learned from 0.
        return torch.where((one == 0) & (other == 0), one + other, farther)

    @property
    def parts(self) -> tuple[Selector, ...]:
        return self.one, self.other

    def __repr__(self) -> str:
        return " | ".join(map(_shown, self.parts))


@dataclass(frozen=True)
class _Others(_Combined):
    selector: Selector

    def __call__(self, positions: TokenPositions) -> Tensor:
        weights, is_token = selected(self.selector, positions), positions.index >= 0
        if weights.dtype is torch.bool:
            return ~weights & is_token
        if not bool(((weights >= 0) & (weights <= 1)).all()):
            raise ValueError(
                f"~ means 1 - w for weights w from 0 to 1, but the selector {_shown(self.selector)} returned others, "
                f"from {float(weights.min()):g} to {float(weights.max()):g}"
            )
        return torch.where(is_token, 1 - weights, torch.zeros_like(weights))

    @property
    def parts(self) -> tuple[Selector, ...]:
        return (self.selector,)

    def __repr__(self) -> str:
        return f"~{_in_brackets(self.selector, _Either, _Both, _Scaled)}"


@dataclass(frozen=True)
class _Scaled(_Combined):
    selector: Selector
    factor: float

    def __call__(self, positions: TokenPositions) -> Tensor:
        weights = selected(self.selector, positions)
        return (weights.to(torch.float32) if weights.dtype is torch.bool else weights) * self.factor

    @property
    def parts(self) -> tuple[Selector, ...]:
        return (self.selector,)

    def __repr__(self) -> str:
        return f"{self.factor:g} * {_in_brackets(self.selector, _Either, _Both)}"


def _operand(tokens: TokenSelection, sign: str) -> Selector:
    if tokens is None or isinstance(tokens, (bool, int, float, str)):
        raise TypeError(
            f"{sign} combines a selector with another one, a list, a slice, a mask or a function, got {tokens!r}"
        )
    return as_selector(tokens)


def _any_says(name: str, parts: Sequence[Selector]) -> bool | None:
    said: list[Any] = [getattr(part, name, None) for part in parts]
    return True if any(said) else None if None in said else False


def _shown(selector: Selector) -> str:
    name = getattr(selector, "__name__", None)  # of a function
    return name if isinstance(name, str) else repr(selector)


def _in_brackets(selector: Selector, *kinds: type) -> str:
    shown = _shown(selector)
    return f"({shown})" if isinstance(selector, kinds) else shown
