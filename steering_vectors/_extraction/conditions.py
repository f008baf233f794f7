"""Describe the conditions under which a model runs: what was learnt of it holds as long as they are the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from steering_vectors._models import Anatomy


@dataclass(frozen=True)
class Steered:
    """The steerings that are attached to a model.

    ``by_token``: some select tokens, so that the tokens' order in a pass matters. ``perhaps_by_row``: some may
    distinguish the rows of a batch.
    """

    by: Sequence[object] = ()
    by_token: bool = False
    perhaps_by_row: bool = False


def conditions_of(anatomy: Anatomy, steered: Steered) -> tuple[object, ...]:
    """Return a value that is another one as soon as the model may run otherwise.

    It sees weights that are replaced or changed in place, their dtypes and devices, hooks and steerings, the modules'
    switches (a PEFT adapter that is turned off), the config with its kind of attention, and autocast.
    """
    modules = [
        (type(module), list(module._forward_hooks), list(module._forward_pre_hooks), _switches(vars(module)))
        for module in anatomy.model.modules()
    ]
    weights = [(weight.dtype, weight.device, weight.shape, _version(weight)) for weight in anatomy.model.parameters()]
    config = repr(getattr(anatomy.text_config, "__dict__", None))
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]
    return steered, modules, weights, config, autocast


def _switches(attributes: dict[str, Any]) -> list[object]:
    """Return what is on or off, names of adapters and the like, and a forward that is the module's alone.

    Numbers are left out, since they may count passes.
    """
    switches: list[object] = [attributes.get("forward")]
    for name, value in attributes.items():
        kind = type(value)
        if kind is list:
            switches.extend(item for item in value if type(item) is str)
        elif (kind is bool and name != "training") or kind is str:
            switches.append(value)
    return switches


def _version(weight: nn.Parameter) -> int:
    return 0 if weight.is_inference() else weight._version
