"""Apply a vector to rows that are scored: with which operator, and to which of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from steering_vectors._arguments import check_takes
from steering_vectors.steering_operators import PatchDeltaOperator
from steering_vectors.steering_vector import SteeringVector

Apply: TypeAlias = Callable[[SteeringVector, list[float], Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Manner:
    """The way in which vectors are applied.

    ``tokens`` is a selection, or a function from a batch's prompts to one, such as ``generated``. With ``enter``, that
    is called in place of ``vector.apply``.
    """

    tokens: Any = None
    operator: PatchDeltaOperator | None = None
    enter: Apply | None = None

    def check(self) -> None:
        """Raise TypeError for an ``apply`` that can't be called, and ValueError for one beside an operator."""
        if self.enter is not None:
            check_takes(self.enter, 3, "apply", "lambda vector, multipliers, tokens: vector.apply(model)")
            if self.operator is not None:
                raise ValueError("operator and apply were given: choose one of them")


@dataclass(frozen=True, eq=False)
class Steering:
    """A vector and the way in which it is applied to rows, each with a multiplier."""

    model: nn.Module
    vector: SteeringVector
    how: Manner = Manner()

    def selection(self, prompts: Mapping[str, Tensor]) -> Any:
        """Return the selection for a batch with these prompts."""
        tokens = self.how.tokens
        if not callable(tokens):
            return tokens
        try:
            made = tokens(prompts)
        except (AttributeError, TypeError):  # a selector reads positions, which a mapping hasn't
            return tokens
        return made if callable(made) or isinstance(made, (slice, list)) else tokens

    def apply(self, selection: Any, multipliers: Sequence[float]) -> AbstractContextManager[Any]:
        """Return the context in which rows with these multipliers are steered."""
        numbers = list(multipliers)
        if self.how.enter is not None:
            return self.how.enter(self.vector, numbers, selection)
        return self.vector.apply(
            self.model, operator=self.how.operator, multiplier=numbers, tokens=selection, this_thread_only=True
        )
