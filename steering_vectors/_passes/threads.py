"""Tell threads apart, and find the modules that a thread is running."""

import sys
import threading

from torch import nn

_THREAD = threading.local()


def this_thread() -> object:
    """Return a mark of the calling thread that no other thread ever has; thread ids are reused."""
    mark: object = getattr(_THREAD, "mark", None)
    if mark is None:
        mark = _THREAD.mark = object()
    return mark


def calls_in_progress(thread_id: int) -> list[nn.Module]:
    """Return the modules that a thread is calling now, outermost first; none if the thread has ended."""
    calls: list[nn.Module] = []
    frame = sys._current_frames().get(thread_id)
    while frame is not None:
        if "_call_impl" in frame.f_code.co_name and frame.f_code.co_name != "_wrapped_call_impl":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module):
                calls.append(module)
        frame = frame.f_back
    return calls[::-1]
