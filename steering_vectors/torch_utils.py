"""A helper function that users of version 0.12.2 import."""

from __future__ import annotations

from torch import nn


def get_module(model: nn.Module, name: str) -> nn.Module:
    """Return the module of ``model`` with this dotted name.

    Args:
        model: The module to search.
        name: The name, as in ``model.named_modules()``.

    Raises:
        LookupError: If there is no such module.

    >>> get_module(model, "transformer.h.0").__class__.__name__
    'GPT2Block'
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise LookupError(f"{type(model).__name__} has no module {name!r}") from error
