"""The steering of a request once it is admitted: hashes of vectors instead of names, and the requests that use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from steering_vectors.serving.bank import Multipliers
from steering_vectors.serving.spec import KEY, parse
from steering_vectors.serving.store import StoredVector

__all__ = ["Bound", "Catalog"]

_BOUND = "steering_bound"


@dataclass(frozen=True)
class Bound:
    """The steering of a request: hashes of vectors with their multipliers, and the tokens that they steer."""

    multipliers: Multipliers
    tokens: str
    # The request's text. It differs once the request's arguments are changed in place.
    text: str = field(default="", compare=False)

    def __deepcopy__(self, _memo: object) -> Bound:
        """Return the same object, so that a copy of a request keeps its vectors loaded."""
        return self

    @classmethod
    def of(cls, arguments: Mapping[str, Any] | None) -> Bound | None:
        """Return the steering in a request's extra arguments, or None for a request without.

        Raises RuntimeError if the arguments ask for steering and were never admitted.
        """
        if not arguments or KEY not in arguments:
            return None
        if _BOUND not in arguments:
            raise RuntimeError(f"a request with {KEY}={arguments[KEY]!r} went around its admission")
        found = arguments[_BOUND]
        if isinstance(found, cls):
            return found
        # In another process it is plain values.
        return cls(tuple((key, multiplier) for key, multiplier in found["multipliers"]), found["tokens"], found["text"])

    def start(self, prompt_length: int) -> int:
        """Return the index of the first steered token."""
        return prompt_length - 1 if self.tokens == "generated" else 0

    def block_key(self, prompt_length: int, begin: int, end: int) -> tuple[str, str] | None:
        """Return what tells a block of cached tokens, ``begin`` to ``end``, from one that was steered otherwise.

        It is None before the first steered token: such a block is that of the unsteered prompt. In the block where
        steering begins, the key has the token at which it does; later blocks inherit that from the ones before.
        """
        first = self.start(prompt_length)
        if not self.multipliers or end <= first:
            return None
        return KEY, f"{self.multipliers!r}@{max(first - begin, 0)}"


class Catalog:
    """The vectors that a server serves by name, and the admitted requests that use them.

    A request keeps its vectors by their hashes, whatever becomes of their names, for as long as its arguments, or
    copies of them, are held.
    """

    def __init__(
        self, vectors: Iterable[StoredVector], *, layers: Sequence[int], capacity: int, largest: float
    ) -> None:
        """Serve ``vectors`` at some of ``layers``, in a dtype whose largest number is ``largest``."""
        self.vectors = {vector.name: vector for vector in vectors}
        self.loaded = {vector.hash for vector in self.vectors.values()}
        self.layers, self.capacity, self._largest = list(layers), capacity, largest
        self._admitted: WeakValueDictionary[int, Bound] = WeakValueDictionary()  # by id()

    def has_admitted(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether a request's extra arguments are admitted, and their text is the one that was."""
        bound = arguments.get(_BOUND)
        return isinstance(bound, Bound) and self._admitted.get(id(bound)) is bound and bound.text == arguments[KEY]

    def admit(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request's extra arguments with its steering by hashes.

        Raises ValueError, with the reason, for a bad text, for an unknown vector, and for numbers that are too large.
        """
        if not isinstance(arguments.get(_BOUND), Bound | None):
            raise ValueError(f"{_BOUND} can't be set by a request: write {KEY}='NAME:MULTIPLIER'")
        spec = parse(arguments[KEY])
        sums: dict[str, float] = {}
        size = 0.0
        for name, multiplier in spec.multipliers:
            if name not in self.vectors:
                raise ValueError(f"there is no steering vector {name!r}: {self._shown()}")
            vector = self.vectors[name]
            sums[vector.hash] = sums.get(vector.hash, 0.0) + multiplier
            size += abs(multiplier) * vector.largest
        if size > self._largest:
            raise ValueError(f"steering adds numbers up to {size:.3g}: the model's dtype ends at {self._largest:.3g}")
        multipliers = tuple(sorted((key, multiplier) for key, multiplier in sums.items() if multiplier))
        bound = Bound(multipliers, spec.tokens, arguments[KEY])
        self._admitted[id(bound)] = bound
        return {**arguments, _BOUND: bound}

    def unused(self) -> set[str]:
        """Return the hashes of loaded vectors that have no name any more and that no admitted request holds."""
        held = {key for bound in list(self._admitted.values()) for key, _ in bound.multipliers}
        return self.loaded - held - {vector.hash for vector in self.vectors.values()}

    def described(self) -> dict[str, Any]:
        """Return plain values that say what is served."""
        vectors = {
            name: {"layers": sorted(vector.directions), "hash": vector.hash} for name, vector in self.vectors.items()
        }
        return {"vectors": vectors, "layers": self.layers, "capacity": self.capacity, "loaded": len(self.loaded)}

    def _shown(self) -> str:
        names = ", ".join(map(repr, sorted(self.vectors)[:20]))
        more = len(self.vectors) - 20
        return f"this server has {names or 'none'}{f' and {more} more' if more > 0 else ''}"
