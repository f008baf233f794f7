"""One lock for all that several threads change: the hooks of modules, and the passes that run."""

import os
import threading
from contextlib import ContextDecorator

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
