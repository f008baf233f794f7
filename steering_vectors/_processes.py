"""Share the work of one call among the processes of a torch.distributed group."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")

_DIFFERENT = "the processes of the group were given different samples or arguments: each must make the same call"


class ElsewhereError(RuntimeError):
    """What all processes of a group raise for the failure of one of them, or for a difference between them."""


class Processes:
    """The processes that make the same call together; one alone without a group.

    Each failure, and each difference between what they were given, is an error in all of them: what any of them says in
    :meth:`exchange` reaches all.
    """

    def __init__(self, group: Any = None) -> None:
        """Raises TypeError for what is no process group, and ValueError for one that this process isn't in."""
        if group is not None and group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in process_group: only those that are make the call")
        if group is not None and not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group must be a group such as torch.distributed.group.WORLD, got {type(group).__name__}"
            )
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.count = 1 if group is None else distributed.get_world_size(group)

    def share(self, count: int) -> range:
        """Which of so many things are this process's: contiguous, one more or less than another's, none in two."""
        start, stop = (count * rank // self.count for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def exchange(self, step: str, value: Any, error: BaseException | None = None) -> list[Any]:
        """What each process says at a step, by rank.

        Raises the process's own ``error``, or ElsewhereError for another's and where another is at another step.
        """
        said: list[Any] = [None] * self.count
        told = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(said, (told, step, value), group=self._group)
        if error is not None:
            raise error
        failed = {rank: told for rank, (told, _, _) in enumerate(said) if told is not None}
        if failed:
            raise ElsewhereError(f"training failed in another process: {failed}")
        if len({step for _, step, _ in said}) > 1:
            raise ElsewhereError(_DIFFERENT)
        return [value for _, _, value in said]

    def together(self, step: str, compute: Callable[[], T]) -> list[T]:
        """What each process computes, by rank; what one raises, all raise."""
        if self._group is None:
            return [compute()]
        try:
            value, error = compute(), None
        except ElsewhereError:
            raise
        except BaseException as raised:
            value, error = None, raised
        return self.exchange(step, value, error)

    def check_alike(self, step: str, value: str) -> None:
        """Raise ElsewhereError unless all processes say the same at this step."""
        if self.count > 1 and len({*self.exchange(step, value)}) > 1:
            raise ElsewhereError(_DIFFERENT)
