"""Tell threads apart, and find the modules that this thread is running."""

import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType

from torch import nn

_LOCAL = threading.local()


class _Life:
    """An object that only a thread's own storage refers to, so that it exists as long as the thread."""


class Thread:
    """A mark of a thread that no other thread ever has; thread ids are reused."""

    def __init__(self, life: _Life) -> None:
        self._life = weakref.ref(life)

    @property
    def has_ended(self) -> bool:
        """True once the thread has ended, also in a forked process, which only the forking thread enters."""
        return self._life() is None


def this_thread() -> Thread:
    """Return the mark of the calling thread."""
    mark: Thread | None = getattr(_LOCAL, "mark", None)
    if mark is None:
        _LOCAL.life = _Life()
        mark = _LOCAL.mark = Thread(_LOCAL.life)
    return mark


def calls_in_progress() -> list[nn.Module]:
    """Return the modules that this thread is calling now, outermost first.

    Another thread's can't be known: Python may crash when it follows the frames of a thread that goes on running.
    """
    return list(_running())[::-1]


def calls_and_generations() -> Iterator[nn.Module]:
    """Yield the modules that this thread is calling, or whose ``generate`` it is running, innermost first."""
    return _running("generate")


def _running(*methods: str) -> Iterator[nn.Module]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_name
        # Compiled code calls modules by functions whose names are longer. The variables of other functions are left
        # alone: looking at them would keep alive what they hold, such as a cache.
        if name in methods or ("_call_impl" in name and name != "_wrapped_call_impl"):
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                yield module
        frame = frame.f_back
