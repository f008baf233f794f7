"""Bars that show how far long work is: tqdm's, or those of a program that draws its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_drawn_by: ContextVar[Callable[..., Any] | None] = ContextVar("drawn_by", default=None)


def progress_bar(**options: Any) -> Any:
    """Return a bar with the options of tqdm, a context manager with ``update``."""
    if draw := _drawn_by.get():
        return draw(**options)
    from tqdm.auto import tqdm

    return tqdm(**options)


@contextmanager
def bars_drawn_by(draw: Callable[..., Any]) -> Iterator[None]:
    """Within the block, let ``draw``, which takes the options of tqdm, return all bars."""
    token = _drawn_by.set(draw)
    try:
        yield
    finally:
        _drawn_by.reset(token)
