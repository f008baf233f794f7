"""Run a model over padded rows, with the arguments that it takes."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from steering_vectors._locks import locked

# Names of the cache in a model's arguments and outputs, the newest first.
CACHES = ("cache", "past_key_values")


def padded(rows: Sequence[Sequence[int]], model: nn.Module, *, left: bool = True) -> dict[str, Tensor]:
    """Return ids and mask ``(rows, width)``. Padding has the id 0, which is seen by no token."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long, device="cpu")
    mask = torch.zeros(len(rows), width, dtype=torch.long, device="cpu")
    for place, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[place, columns] = torch.tensor(row, dtype=torch.long, device="cpu")
        mask[place, columns] = 1
    device = device_of(model)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def run(model: nn.Module, inputs: Mapping[str, Any], *, use_cache: bool, keep: int = 0, cache: Any = None) -> Any:
    """Run one pass, with the arguments that the model takes, for at least the last ``keep`` logits; 0 for all."""
    takes = _parameters_of(model)
    mask, now = inputs["attention_mask"], inputs["input_ids"].shape[1]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -now:]
    options = {"position_ids": positions, "logits_to_keep": keep, "num_logits_to_keep": keep, "use_cache": use_cache}
    known = {name: value for name, value in {**inputs, **options, "return_dict": True}.items() if name in takes}
    if cache is not None:
        known[next((name for name in CACHES if name in takes), CACHES[-1])] = cache
    elif bool(mask.all()):
        known.pop("attention_mask", None)
    return model(**known)


def _parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the model's forward, or of the one inside a wrapper that passes arguments on."""
    wrapper: Any = getattr(model, "_orig_mod", model)  # of torch.compile
    inner = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else getattr(wrapper, "module", wrapper)
    return inspect.signature(inner.forward).parameters


def vocabulary_of(model: nn.Module) -> int:
    return int(getattr(_text_config(model), "vocab_size", 0) or 32_000)


def length_of_change(model: nn.Module) -> float:
    """Return the length beyond which a pass's longest row changes what shorter ones give; infinity for none.

    Some rotary embeddings go by the longest row: longrope and dynamic NTK.
    """
    config = _text_config(model)
    given = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    ropes = [rope for rope in given if isinstance(rope, Mapping)]
    ropes += [inner for rope in ropes for inner in rope.values() if isinstance(inner, Mapping)]
    names = ("original_max_position_embeddings", "max_position_embeddings")
    lengths = [
        next((int(length) for name in names if (length := rope.get(name) or getattr(config, name, None))), 0)
        for rope in ropes
        if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope", "su")
    ]
    return min(lengths, default=inf)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def device_of(model: Any) -> torch.device:
    device: torch.device = next(model.get_input_embeddings().parameters()).device
    return device


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
if hasattr(os, "register_at_fork"):  # a forked process has none of the threads that hold a lock
    os.register_at_fork(after_in_child=_TURNS.clear)


@locked
def turn_of(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the lock that a thread holds while it changes the model and runs it, so that evaluations take turns."""
    turn: AbstractContextManager[Any] = _TURNS.setdefault(model, threading.RLock())
    return turn


class Undone:
    """A block before which something is done to the model, and after which it is undone.

    An interrupt at any moment leaves nothing: ``undo`` may be called before all is done, and again.
    """

    def __init__(self, do: Callable[[], None], undo: Callable[[], None]) -> None:
        self._do, self._undo = do, undo

    def __enter__(self) -> None:
        self._do()

    def __exit__(self, *_error: object) -> None:
        self._undo()
        self._undo = _nothing

    def __del__(self) -> None:
        self._undo()  # after an interrupt while the block was entered or left


def _nothing() -> None:
    pass


def evaluation_mode(model: nn.Module) -> Undone:
    """Return a block in which all modules are in evaluation mode; each is put back on exit."""
    training = [module for module in model.modules() if module.training]

    def put(state: bool) -> None:
        for module in training:
            module.training = state

    return Undone(partial(put, False), partial(put, True))
