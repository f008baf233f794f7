"""Look up the steerings of a model."""

from __future__ import annotations

from torch import nn

from steering_vectors._models import INPUT, OUTPUT, check_model
from steering_vectors._steering.attaching import changes_of
from steering_vectors._steering.handle import SteeringPatchHandle
from steering_vectors._tokens import goes_by_row_or_end


def active_patches(model: nn.Module) -> list[SteeringPatchHandle]:
    """Return the steerings attached to ``model``'s modules, in the order in which they were entered.

    Running a notebook cell twice attaches its steering twice, which doubles the effect.

    >>> active_patches(model)
    []
    """
    check_model(model)
    changes = (change for module in model.modules() for side in (OUTPUT, INPUT) for change in changes_of(module, side))
    owners = {change.owner for change in changes}
    return sorted((handle for handle in owners if handle.is_on), key=lambda handle: handle.order)


def patches_of_this_thread(model: nn.Module) -> list[SteeringPatchHandle]:
    """Return the active patches without those that steer other threads' passes only."""
    return [handle for handle in active_patches(model) if handle.concerns_this_thread]


def is_steered_by_token(model: nn.Module) -> bool:
    """Return True if a steering goes by the tokens' positions, so that their order in a pass matters."""
    return any(patch.locating for patch in patches_of_this_thread(model))


def is_steered_by_token_or_row(model: nn.Module) -> bool:
    """Return True if a steering goes by the tokens' positions or treats rows differently."""
    return any(patch.locating or patch.multiplier.by_row for patch in patches_of_this_thread(model))


def check_not_steered_by_row(model: nn.Module) -> None:
    """Raise ValueError if a steering depends on the rows of a batch or on their padding.

    Training forms its own batches, so the rows aren't the caller's.
    """
    for patch in patches_of_this_thread(model):
        if patch.multiplier.by_row or any(map(goes_by_row_or_end, patch.locating)):
            raise ValueError(
                f"the model is steered row by row or from a row's end, but training forms its own batches: remove "
                f"{patch!r} first, or select tokens by their index and use one multiplier for all rows"
            )


def may_be_steered_by_row(model: nn.Module) -> bool:
    """Return True if it is left open whether what gets positions distinguishes rows or counts from their ends."""
    return any(goes_by_row_or_end(one) is None for patch in patches_of_this_thread(model) for one in patch.locating)
