"""Replace functions of vLLM, each only if its signature is the one that was proven."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["check_version", "patch"]

_VERSIONS = ("0.32",)
_WAY_OUT = "unset STEERING_VECTORS_DIR to serve without steering"


def check_version(version: str) -> None:
    """Raise RuntimeError for a version of vLLM with which steering was not proven."""
    if not version.startswith(tuple(f"{known}." for known in _VERSIONS)):
        raise RuntimeError(
            f"steering vectors are served by vLLM {' or '.join(_VERSIONS)}, and this is {version}: install vLLM "
            f"{_VERSIONS[-1]}, or {_WAY_OUT}"
        )


def patch(owner: Any, name: str, parameters: str, wrapped: Callable[[Any], Any]) -> None:
    """Replace a function by ``wrapped(function)``, once, if its parameters are those that are expected.

    Raises RuntimeError if they aren't.
    """
    original = getattr(owner, name, None)
    if getattr(original, "_steers", False):
        return
    found = " ".join(inspect.signature(original).parameters) if original else "nothing"
    if found != parameters:
        raise RuntimeError(
            f"{owner.__name__}.{name} of this vLLM takes ({found}), expected ({parameters}): it is not a version "
            f"with which steering was proven; {_WAY_OUT}"
        )
    changed: Any = wrapped(original)
    changed._steers = True
    setattr(owner, name, changed)
