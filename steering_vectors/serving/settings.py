"""The operator's settings, from the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The folder of vectors, and the permissions that the operator gives."""

    folder: str
    capacity: int
    loading: bool
    untried_models: bool

    @classmethod
    def of_environment(cls) -> Settings:
        """Return the settings. Raises ValueError for a variable that has no meaning."""
        capacity = os.environ.get("STEERING_VECTORS_CAPACITY", "64")
        if not (capacity.isascii() and capacity.isdecimal() and 1 <= int(capacity) <= 100_000):
            raise ValueError(f"STEERING_VECTORS_CAPACITY must be a whole number of at least 1, got {capacity!r}")
        return cls(
            folder=os.environ["STEERING_VECTORS_DIR"],
            capacity=int(capacity),
            loading=_switch("STEERING_VECTORS_LOADING"),
            untried_models=_switch("STEERING_VECTORS_UNTRIED_MODELS"),
        )


def _switch(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"
