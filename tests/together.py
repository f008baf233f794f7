"""Threads that run together, and switch as often as they can."""

import sys
import threading
from collections.abc import Sequence


def run_together(threads: Sequence[threading.Thread]) -> None:
    """Start the threads, and wait until all have ended."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
