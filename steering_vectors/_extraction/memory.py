"""Go on with smaller passes where the memory is full."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from steering_vectors._extraction.packs import Pack

T = TypeVar("T")


class Memory:
    """The sizes of passes for which the memory is too small, as far as that was seen."""

    def __init__(self) -> None:
        self.most_packs: int | None = None  # in a pass
        self._longest_pack: int | None = None  # in a pass of one pack

    def run(
        self, packs: list[Pack], run: Callable[[list[Pack]], T], split: Callable[[Pack], list[Pack]]
    ) -> Iterator[T]:
        """Yield what ``run`` returns for the packs: once, or for each of more and smaller passes.

        ``split`` makes smaller packs of one, whose passes it is halved into.
        """
        was_too_long = self._longest_pack is not None and len(packs) == 1 and len(packs[0]) > self._longest_pack
        were_too_many = self.most_packs is not None and len(packs) > self.most_packs
        smaller = _halves(packs, split) if was_too_long or were_too_many else []
        if len(smaller) < 2:
            try:
                result = run(packs)
            except RuntimeError as error:
                smaller = _halves(packs, split)
                if not is_out_of_memory(error) or len(smaller) < 2:
                    raise
                self._note(packs)
            else:
                yield result
                return
        for half in smaller:
            yield from self.run(half, run, split)

    def _note(self, packs: list[Pack]) -> None:
        self.most_packs = max(1, len(packs) // 2)
        if len(packs) == 1:
            self._longest_pack = len(packs[0]) // 2


def is_out_of_memory(error: Exception) -> bool:
    """Return True if an error of PyTorch's says that the memory is full."""
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()


def _halves(packs: list[Pack], split: Callable[[Pack], list[Pack]]) -> list[list[Pack]]:
    if len(packs) > 1:
        return [packs[: len(packs) // 2], packs[len(packs) // 2 :]]
    return [[pack] for pack in split(packs[0])]
