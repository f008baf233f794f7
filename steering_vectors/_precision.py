"""Compute in float32 or wider, whatever the model's dtype."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the dtype itself if it is wider."""
    return torch.promote_types(dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 or wider."""
    return tensor.to(wide_dtype(tensor.dtype))


def autocast_devices() -> list[str]:
    """Return the types of devices on which ``torch.autocast`` is enabled."""
    return [device for device in _AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]


def without_autocast(function: Function) -> Function:
    """Return ``function`` wrapped to run outside ``torch.autocast``, which rounds products of float32.

    The caller's autocast is for the model's passes, not for statistics of what is read in them.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for device in autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]
