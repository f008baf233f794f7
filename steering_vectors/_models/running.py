"""Run a model, or its text decoder alone, over tokens, and read its layers."""

import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steering_vectors._locks import locked
from steering_vectors._models.anatomy import taken_arguments
from steering_vectors._models.hooks import Attached
from steering_vectors._models.sites import Site


class _AllRead(BaseException):
    """A signal that ends a pass once all its layers have been read."""


@torch.no_grad()
def read_pass(
    modules: Sequence[nn.Module],
    layers: Mapping[int, Site],
    inputs: Mapping[str, Any],
    read: Callable[[Tensor], Tensor],
    *,
    stop_early: bool,
) -> dict[int, Tensor]:
    """Return ``read(activation)`` of each layer in one pass of the first of the ``modules``, by layer number.

    The others are the modules inside it that take the same arguments, as in :attr:`Anatomy.pass_modules`.

    The pass runs without gradients and in evaluation mode. It doesn't run as compiled code, since each new length
    would be compiled again. With ``stop_early`` it ends after the last of the layers.

    Raises RuntimeError if a layer did not run.
    """
    found: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def note(layer: int, activation: Tensor) -> None:
        if threading.get_ident() != thread:  # another thread's pass
            return
        found[layer] = read(activation)
        if stop_early and len(found) == len(layers):
            raise _AllRead

    hooks = [site.hook(partial(note, layer)) for layer, site in layers.items()]
    with suppress(_AllRead), Attached([*hooks, _Evaluation(modules[0]), _Uncompiled()]):
        _call_once(modules, inputs)
    if missing := sorted(layers.keys() - found.keys()):
        raise RuntimeError(
            f"layers {missing} of {type(modules[0]).__name__} did not run in a pass of the model, so they have no "
            f"activations: choose other layers"
        )
    return found


def is_sharded(model: nn.Module) -> bool:
    """Return True if the model needs its passes to be run as a whole, as with FSDP and DeepSpeed."""
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return bool(names & {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"})


def has_experts(model: nn.Module) -> bool:
    """Return True if the model is a mixture of experts: a router sends each token to a few of its experts."""
    names = (f"{name.rpartition('.')[2]} {type(module).__name__}" for name, module in model.named_modules())
    return any("expert" in name.lower() for name in names)


def check_unsharded(model: nn.Module) -> None:
    """Raise ValueError if several processes hold the model together, each a part of it."""
    if is_sharded(model) or any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is sharded over processes (tensor parallel, FSDP or DeepSpeed), so no "
            f"process can run it on its share of the samples: leave process_group out, and pass all samples in each "
            f"process"
        )


def without_data_parallelism(model: nn.Module) -> nn.Module:
    """Return the model in a DistributedDataParallel, whose passes wait for other processes; else the model itself."""
    wrapped = (module.module for module in model.modules() if isinstance(module, DistributedDataParallel))
    return next(wrapped, model)


def _call_once(modules: Sequence[nn.Module], inputs: Mapping[str, Any]) -> None:
    """Run one pass over ``input_ids`` and the other inputs, without a cache and with few logits.

    Arguments that the modules' forward methods don't take are left out.
    """
    known = taken_arguments(modules)
    options = {"use_cache": False, "logits_to_keep": 1, "num_logits_to_keep": 1}
    kwargs = {name: value for name, value in {**inputs, **options}.items() if name in known}
    if "input_ids" in kwargs:
        modules[0](**kwargs)
    else:
        modules[0](inputs["input_ids"], **kwargs)


def stateful_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules with state from earlier passes: frequencies for the longest length, a recurrent state."""
    return [module for module in model.modules() if any(hasattr(module, name) for name in _STATES)]


@contextmanager
def kept_states(modules: Sequence[nn.Module]) -> Generator[None, None, None]:
    """Restore, on exit, the state that the modules keep from one pass to the next."""
    before = [(dict(module._buffers), _public_attributes(module)) for module in modules]
    try:
        yield
    finally:
        for module, (buffers, values) in zip(modules, before, strict=True):
            module._buffers.update(buffers)
            for name in _public_attributes(module).keys() - values.keys():
                delattr(module, name)
            vars(module).update(values)


# Dynamic NTK's longest length so far, the state of RecurrentGemma's blocks on transformers 4, and the distance by which
# a prompt's images move the positions of its answer.
_STATES = ("max_seq_len_cached", "recurrent_states", "conv1d_state", "rope_deltas")


def _public_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


# Modules to return to training mode → the passes that need them in evaluation mode. Threads may share a model.
_EVALUATED: "weakref.WeakKeyDictionary[nn.Module, set[_Evaluation]]" = weakref.WeakKeyDictionary()


class _Evaluation:
    """The evaluation mode of a model; an attachment. Removing it restores each module's mode."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())

    @property
    def is_attached(self) -> bool:
        return any(self in passes for passes in _EVALUATED.values())

    @locked
    def attach(self) -> None:
        for module in self._modules:
            if module.training or module in _EVALUATED:
                _EVALUATED.setdefault(module, set()).add(self)
                module.training = False

    @locked
    def remove(self) -> None:
        for module in self._modules:
            passes = _EVALUATED.get(module)
            if passes is not None:
                passes.discard(self)
                if not passes:
                    module.training = True
                    del _EVALUATED[module]


class _Uncompiled:
    """A time in which compiled code doesn't run; an attachment. PyTorch's stance applies to all threads."""

    _passes: ClassVar[set["_Uncompiled"]] = set()
    _stance: ClassVar[ExitStack] = ExitStack()

    @property
    def is_attached(self) -> bool:
        return self in self._passes

    @locked
    def attach(self) -> None:
        if not self._passes:
            self._stance.enter_context(torch.compiler.set_stance("force_eager"))
        self._passes.add(self)

    @locked
    def remove(self) -> None:
        self._passes.discard(self)
        if not self._passes:
            self._stance.close()
