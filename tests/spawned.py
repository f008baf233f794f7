"""The work of a process that a test starts, in a module that imports little."""

from typing import Any

import torch

from steering_vectors import SteeringVector


def send_logits(model: Any, direction: list[float], connection: Any) -> None:
    """Sends the logits of the model that it was given, and of that model steered there."""
    assert all("steering" not in name for module in model.modules() for name in vars(module))
    got = []
    for multiplier in (0.0, 1.0):
        with SteeringVector({1: torch.tensor(direction)}).apply(model, multiplier=multiplier), torch.no_grad():
            got.append(model(torch.tensor([[11, 12, 13, 14, 15]])).logits.tolist())
    connection.send(got)
