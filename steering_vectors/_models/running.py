"""Run a model, or its text decoder alone, over tokens, and read layers on the way."""

import inspect
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steering_vectors._models.anatomy import anatomy_of, parameters_of
from steering_vectors._models.hooks import activation_of, after_forward, attach_all, remove_all


class _AllRead(BaseException):
    """Ends a pass whose layers have all been read."""


def read_pass(
    module: nn.Module,
    layers: Mapping[int, nn.Module],
    inputs: Mapping[str, Any],
    read: Callable[[Tensor], Tensor],
    *,
    stop_early: bool,
) -> dict[int, Tensor]:
    """What ``read`` makes of each layer's activation in one pass of ``module``, by layer number.

    The pass runs without gradients, in evaluation mode, and not as compiled code, which would be made anew for each
    length. With ``stop_early`` it ends after the last of the layers.

    Raises RuntimeError if a layer did not run.
    """
    found: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def note(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() != thread:  # somebody else's pass
            return
        found[layer] = read(activation_of(output))
        if stop_early and len(found) == len(layers):
            raise _AllRead

    handles = attach_all(partial(after_forward, part, partial(note, layer)) for layer, part in layers.items())
    try:
        with _evaluation(module), torch.no_grad(), _UNCOMPILED:
            _call_once(module, inputs)
    except _AllRead:
        pass
    finally:
        remove_all(handles)
    if missing := sorted(layers.keys() - found.keys()):
        raise RuntimeError(f"layers {missing} of {type(module).__name__} did not run in a pass of the model")
    return found


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's state depends on its passes being run as a whole: FSDP, DeepSpeed."""
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return bool(names & {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"})


def check_unsharded(model: nn.Module) -> None:
    """Raise ValueError for a model that several processes hold together, each a part of it."""
    if is_sharded(model) or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is sharded over processes (tensor parallel, FSDP or DeepSpeed), so they can't "
            f"each run it on samples of their own: leave process_group out, and give each process all samples"
        )


def without_data_parallelism(model: nn.Module) -> nn.Module:
    """The model in a DistributedDataParallel, whose passes wait for the other processes; else the model itself."""
    wrapped = (module.module for module in model.modules() if isinstance(module, DistributedDataParallel))
    return next(wrapped, model)


def _call_once(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """One pass over ``input_ids`` and ``attention_mask``, without a cache and with few logits.

    Arguments that the model's forward method doesn't know are left out.
    """
    known: set[str] = set()
    for module in anatomy_of(model).pass_modules:
        parameters = parameters_of(module)
        known |= parameters.keys()
        # A wrapper such as PEFT's hands on what it doesn't know itself.
        if inspect.Parameter.VAR_KEYWORD not in parameters.values():
            break
    options = {"use_cache": False, "logits_to_keep": 1, "num_logits_to_keep": 1}
    kwargs = {name: value for name, value in {**inputs, **options}.items() if name in known}
    if "input_ids" in kwargs:
        model(**kwargs)
    else:
        model(inputs["input_ids"], **kwargs)


def stateful_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that keep something from one pass to the next: frequencies for its length, a recurrent state."""
    return [module for module in model.modules() if any(hasattr(module, name) for name in _STATES)]


@contextmanager
def kept_states(modules: Sequence[nn.Module]) -> Generator[None, None, None]:
    """What the modules keep from one pass to the next is after the block what it was before."""
    before = [(dict(module._buffers), _own_values(module)) for module in modules]
    try:
        yield
    finally:
        for module, (buffers, values) in zip(modules, before, strict=True):
            module._buffers.update(buffers)
            for name in _own_values(module).keys() - values.keys():
                delattr(module, name)
            vars(module).update(values)


# Dynamic NTK's longest length so far, and what RecurrentGemma's blocks keep on transformers 4.
_STATES = ("max_seq_len_cached", "recurrent_states", "conv1d_state")


def _own_values(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


# How many passes keep a module in evaluation mode that is to be in training mode: threads may share a model.
_EVALUATED: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@contextmanager
def _evaluation(model: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode for the length of the block; each module's own mode comes back."""
    with _LOCK:
        training = [module for module in model.modules() if module.training or module in _EVALUATED]
        for module in training:
            _EVALUATED[module] = _EVALUATED.get(module, 0) + 1
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in training:
                _EVALUATED[module] -= 1
                if not _EVALUATED[module]:
                    del _EVALUATED[module]
                    module.training = True


class _Uncompiled:
    """A block in which torch.compile's code doesn't run. PyTorch's stance is the process's: threads share one."""

    def __init__(self) -> None:
        self._blocks = 0
        self._stance = ExitStack()

    def __enter__(self) -> None:
        with _LOCK:
            if self._blocks == 0 and hasattr(torch.compiler, "set_stance"):  # since PyTorch 2.6
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._blocks += 1

    def __exit__(self, *_error: object) -> None:
        with _LOCK:
            self._blocks -= 1
            if self._blocks == 0:
                self._stance.close()


_UNCOMPILED = _Uncompiled()
