"""Change activations at layers and tokens while a model runs.

A request is checked in full and becomes a plan. Attaching the plan returns a handle, whose removal ends the steering.
One hook per module runs all of its changes, in the order in which they were entered.
Operators and selectors are plain callables, and none of them gets special treatment here.
"""

from steering_vectors._steering.active import (
    active_patches,
    check_not_steered_by_row,
    is_steered_by_token,
    is_steered_by_token_or_row,
    may_be_steered_by_row,
    patches_of_this_thread,
)
from steering_vectors._steering.attaching import AttachedTrace, changes_of
from steering_vectors._steering.change import width_message
from steering_vectors._steering.handle import SteeringContext, SteeringPatchHandle, attach
from steering_vectors._steering.multiplier import Numbers, as_multiplier
from steering_vectors._steering.plan import (
    CALL_HINTS,
    Place,
    Steering,
    checked_steering,
    config_for,
    steering_alone,
    steering_of,
    warn_of_doubts,
)
from steering_vectors._steering.stream_parts import parts_inside
from steering_vectors._steering.token_indices import one_selection

__all__ = [
    "CALL_HINTS",
    "AttachedTrace",
    "Numbers",
    "Place",
    "Steering",
    "SteeringContext",
    "SteeringPatchHandle",
    "active_patches",
    "as_multiplier",
    "attach",
    "changes_of",
    "check_not_steered_by_row",
    "checked_steering",
    "config_for",
    "is_steered_by_token",
    "is_steered_by_token_or_row",
    "may_be_steered_by_row",
    "one_selection",
    "parts_inside",
    "patches_of_this_thread",
    "steering_alone",
    "steering_of",
    "warn_of_doubts",
    "width_message",
]
