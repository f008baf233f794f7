"""One lock for all that several threads change, which no forked process inherits taken."""

import functools
import os
import threading
from collections.abc import Callable
from contextlib import ContextDecorator, nullcontext
from typing import Any, TypeVar

T = TypeVar("T")

# Reentrant, since a finalizer or a signal handler may take it again in the thread that holds it. Nothing waits for
# anything else while it holds the lock, so a fork waits for it briefly and never inherits it from another thread.
_LOCK = threading.RLock()

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


class _Locked(ContextDecorator):
    """A decorator of functions that run under the lock.

    No line of this package runs between taking the lock and the function, or between the function and releasing it, so
    an interrupt can't leave the lock taken.
    """

    __enter__ = staticmethod(_LOCK.acquire)
    __exit__ = staticmethod(_LOCK.__exit__)


locked = _Locked()


class computed_once(functools.cached_property[T]):  # noqa: N801  # used like the class that it is made from
    """A cached property without a lock.

    On Python 3.10 and 3.11, all cached properties of a class share a lock, which a forked process may inherit taken.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        super().__init__(function)
        self.lock = nullcontext()
