"""Share the work of one call among the processes of a torch.distributed group."""

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import distributed, nn

from steering_vectors._running import is_sharded

T = TypeVar("T")


class ElsewhereError(RuntimeError):
    """What all processes of a group raise for the failure of one of them, or for a difference between them."""


class Processes:
    """The processes that make the same call together; one alone without a group.

    Each failure, and each difference between what they were given, is an error in all of them: what any of them says in
    :meth:`exchange` reaches all.
    """

    def __init__(self, group: Any, model: nn.Module) -> None:
        """Raises ValueError for a model that the processes hold together, each a part of it."""
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.count = 1 if group is None else distributed.get_world_size(group)
        if group is not None and (is_sharded(model) or any(hasattr(p, "device_mesh") for p in model.parameters())):
            raise ValueError(
                f"{type(model).__name__} is sharded over processes (tensor parallel, FSDP or DeepSpeed), so they can't "
                f"each run it on samples of their own: leave process_group out, and give each process all samples"
            )

    def share(self, whole: Sequence[T]) -> Sequence[T]:
        """The part of this process, contiguous; the parts differ in length by one at most, and nothing is in two."""
        start, end = (len(whole) * rank // self.count for rank in (self.rank, self.rank + 1))
        return whole[start:end]

    def exchange(self, value: Any, error: BaseException | None = None) -> list[Any]:
        """What each process says, by rank. Raises the process's own ``error``, or ElsewhereError for another's."""
        if self._group is None:
            if error is not None:
                raise error
            return [value]
        said: list[Any] = [None] * self.count
        told = None if error is None else f"{type(error).__name__}: {error}"
        distributed.all_gather_object(said, (told, value), group=self._group)
        if error is not None:
            raise error
        failed = {rank: told for rank, (told, _) in enumerate(said) if told is not None}
        if failed:
            raise ElsewhereError(f"training failed in another process: {failed}")
        return [value for _, value in said]
