"""One lock for all that several threads change: the hooks of modules, and the passes that run."""

import os
import threading

# Reentrant, since a finalizer or a signal handler may take it again in the thread that holds it. Nothing waits for
# anything else while it holds the lock, so a fork waits for it briefly and never inherits it from another thread.
LOCK = threading.RLock()

if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
