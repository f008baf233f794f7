"""Share the work of one call among the processes of a torch.distributed group."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

_DIFFERENT = "the processes of the group were given different samples or arguments: each must make the same call"


class ElsewhereError(RuntimeError):
    """What all processes of a group raise for the failure of one of them, or for a difference between them."""


class Contributions:
    """The values of a step, which each process makes for itself: its ``own``, and then all ``by_rank``."""

    own: Any
    by_rank: list[Any]


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

    @contextmanager
    def together(self, step: str) -> Iterator[Contributions]:
        """Run a step that all processes take; afterwards each has what every one contributed.

        Whatever one process raises in the block, all raise.
        """
        made = Contributions()
        try:
            yield made
        except ElsewhereError:
            raise
        except BaseException as error:
            if self._group is not None:
                self.exchange(step, None, error)
            raise
        made.by_rank = [made.own] if self._group is None else self.exchange(step, made.own)

    def check_alike(self, step: str, value: str) -> None:
        """Raise ElsewhereError unless all processes say the same at this step."""
        if self.count > 1 and len({*self.exchange(step, value)}) > 1:
            raise ElsewhereError(_DIFFERENT)
