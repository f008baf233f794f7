"""Share the work of one call among the processes of a torch.distributed group."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

_DIFFERENT = "the processes of the group were given different samples or arguments: make the same call in each"


class ElsewhereError(RuntimeError):
    """An error that all processes of a group raise if one of them fails, or if they received different arguments."""


class Contributions:
    """The values of a step: this process's as ``own``, and after the step all processes' as ``by_rank``."""

    own: Any
    by_rank: list[Any]


class Processes:
    """The processes that make the same call together; a single one without a group.

    If one process fails, or their arguments differ, all of them raise: a value that one passes to :meth:`exchange`
    reaches all.
    """

    def __init__(self, group: Any = None) -> None:
        """Check the group. Raises TypeError if it is no process group, and ValueError if this process isn't in it."""
        if group is not None and group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this process is not in process_group: make the call only in the processes of the group")
        if group is not None and not isinstance(group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group must be a group such as torch.distributed.group.WORLD, got {type(group).__name__}"
            )
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.count = 1 if group is None else distributed.get_world_size(group)

    def share(self, count: int) -> range:
        """Return this process's share of ``count`` things: contiguous, disjoint from others, equal to within one."""
        start, stop = (count * rank // self.count for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def exchange(self, step: str, value: Any, error: BaseException | None = None) -> list[Any]:
        """Return the values that the processes pass at a step, by rank.

        Raises ``error`` if there is one. Raises ElsewhereError if another process has one, or is at another step.
        """
        messages: list[Any] = [None] * self.count
        failure = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(messages, (failure, step, value), group=self._group)
        if error is not None:
            raise error
        failures = {rank: failure for rank, (failure, _, _) in enumerate(messages) if failure is not None}
        if failures:
            raise ElsewhereError(f"training failed in another process; errors by rank: {failures}")
        if len({step for _, step, _ in messages}) > 1:
            raise ElsewhereError(_DIFFERENT)
        return [value for _, _, value in messages]

    @contextmanager
    def together(self, step: str) -> Iterator[Contributions]:
        """Run a step that all processes take; afterwards each process has the values of all.

        If one process raises in the block, all raise.
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
        """Raise ElsewhereError unless all processes pass the same value at this step."""
        if self.count > 1 and len({*self.exchange(step, value)}) > 1:
            raise ElsewhereError(_DIFFERENT)
