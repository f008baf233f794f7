"""Run directions through what a model does after its last block: its final norm and its head."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._models.activations import activation_of, with_activation
from steering_vectors._models.anatomy import Anatomy
from steering_vectors._models.hooks import Attached, Hook
from steering_vectors._models.running import kept_states, read_pass, stateful_modules
from steering_vectors._models.sites import Site


def logits_of(anatomy: Anatomy, rows: Tensor) -> Tensor:
    """Return the logits ``(n, vocabulary)`` of rows ``(n, hidden)`` that take the place of the last block's output.

    One pass over ``n`` prompts of one token is run for it, in which the model's own modules do all the rest. Raises
    ValueError if the last block's output is not one row of this width for each token, or if the model has no head.
    """
    last, device = anatomy.blocks[-1], anatomy.input_device
    thread = threading.get_ident()

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        if threading.get_ident() != thread:  # another thread's pass
            return None
        activation = activation_of(output)
        if activation.numel() != rows.numel() or activation.shape[-1] != rows.shape[-1]:
            raise ValueError(
                f"directions must be as wide as the last block's output {tuple(activation.shape)}, got "
                f"{rows.shape[-1]} numbers each"
            )
        # Cloned, since some models add to it in place.
        return with_activation(output, rows.to(activation, copy=True).reshape(activation.shape))

    def check(_module: nn.Module, _args: Any, output: Any) -> None:
        if threading.get_ident() == thread and not isinstance(getattr(output, "logits", None), Tensor):
            raise ValueError(f"{type(anatomy.model).__name__} has no language-model head, so directions have no logits")

    ids = torch.ones(len(rows), 1, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    hooks = [Hook(last, replace), Hook(anatomy.model, check, first=True)]
    with Attached(hooks), kept_states(stateful_modules(anatomy.model)):
        found = read_pass(anatomy.pass_modules, {0: Site(anatomy.model)}, inputs, _last_logits, stop_early=False)
    return found[0]


def _last_logits(logits: Tensor) -> Tensor:
    return logits[:, -1].float()
