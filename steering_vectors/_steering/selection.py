"""Find a steering's tokens and rows in the activations of each pass."""

import torch
from torch import Tensor

from steering_vectors._models import along_tokens, are_columns_first, expand_rows
from steering_vectors._passes import ForwardPass, PassTracker
from steering_vectors._tokens import Selector, TokenPositions, selected


class Selection:
    """The tokens that a steering selects in each pass, and the rows of its multipliers.

    A ``selector`` of None means all tokens. With ``columns_first``, activations are ``(seq, batch, hidden)``; if it is
    None, the first pass shows it that has another number of rows than of columns.
    """

    def __init__(self, tracker: PassTracker, selector: Selector | None, *, columns_first: bool | None) -> None:
        self._tracker = tracker
        self._selector = selector
        self._columns_first = columns_first
        self._any_selected: bool | None = None  # None until a selection is known
        self._any_selected_on: dict[torch.device, Tensor] = {}

    @property
    def was_empty(self) -> bool:
        """True if selections were made, and none held a token."""
        known = [] if self._any_selected is None else [self._any_selected]
        flags = [*self._any_selected_on.values(), *known]
        return bool(flags) and not any(bool(flag) for flag in flags)

    def weights_for(self, activation: Tensor) -> Tensor | bool:
        """Return the selection of this thread's current pass, broadcastable to ``activation``.

        The result is True for all tokens and False for none, where that is known without waiting for a device.
        """
        current = self._current_pass()
        weights = current.weights.get(activation.device)
        if weights is None:
            weights = self._select(current, activation.device)
        if isinstance(weights, bool):
            shape = current.positions.index.shape
            if activation.shape[:2] != shape:  # raises if the activation's tokens can't be identified
                self._along_tokens(activation.new_empty(*shape, 1), activation)
            return weights
        return self._along_tokens(weights[..., None], activation)

    def positions_for(self, activation: Tensor) -> TokenPositions:
        """Return the positions of this thread's current pass, on the activation's device."""
        return self._current_pass().positions_on(activation.device)

    def _along_tokens(self, values: Tensor, activation: Tensor) -> Tensor:
        """Return ``values (batch, seq, n)`` shaped to broadcast to the activation.

        Raises ValueError if it is unknown which axis is the batch's.
        """
        columns_first = self._columns_first
        if columns_first is None:
            batch, seq = values.shape[:2]
            columns_first = are_columns_first(activation, batch, seq)
            if columns_first is None:
                raise ValueError(
                    f"can't tell the rows from the columns in a pass of {batch} rows and {seq} columns through this "
                    f"model, which isn't one of transformers: run it on another number of rows or columns first, or "
                    f"steer all tokens, with the same multiplier for all rows"
                )
            if activation.ndim == 3 and batch != seq:
                self._columns_first = columns_first
        return along_tokens(values, activation, columns_first=columns_first)

    def _select(self, current: ForwardPass, device: torch.device) -> Tensor | bool:
        """Return the selection of a pass, and keep it for the pass's other layers.

        Weights that carry gradients are computed for each layer: gradient checkpointing reruns layers one by one, and
        each must build its part of the graph again.
        """
        assert self._selector is not None
        weights = next(iter(current.weights.values()), None)
        if weights is None:
            with torch.enable_grad():  # reentrant checkpointing runs a layer without gradients first
                weights = _all_or_none(selected(self._selector, current.positions))
            self._note_selected(weights)
        if isinstance(weights, Tensor):
            if weights.requires_grad:
                return weights.to(device)
            current.weights[weights.device] = weights
            weights = weights.to(device)
        current.weights[device] = weights
        return weights

    def rows_along(self, rows: Tensor, activation: Tensor) -> Tensor:
        """Return ``rows (rows, n)``, one for each multiplier, in a shape that broadcasts to ``activation``."""
        if activation.ndim == 3 and self._columns_first is False:
            return expand_rows(rows, activation.shape[0], "the multiplier")[:, None]
        batch, seq = self._current_pass().shape
        return self._along_tokens(expand_rows(rows, batch, "the multiplier")[:, None].expand(-1, seq, -1), activation)

    def _current_pass(self) -> ForwardPass:
        current = self._tracker.current
        if current is None:
            raise RuntimeError(
                "a steered layer ran outside a pass of the model, so its tokens are unknown: call the model, not its "
                "layers, and enable gradient checkpointing with the model's own method"
            )
        return current

    def _note_selected(self, weights: Tensor | bool) -> None:
        if isinstance(weights, bool) or weights.device.type == "cpu":
            self._any_selected = self._any_selected or weights is not False
        elif weights.requires_grad:
            self._any_selected = True
        else:
            some = (weights != 0).any()
            self._any_selected_on[weights.device] = some | self._any_selected_on.get(weights.device, some)


def _all_or_none(weights: Tensor) -> Tensor | bool:
    """Return True for all tokens and False for none, on the CPU only: reading other devices would wait for them.

    Weights that carry gradients stay as they are, since a weight of 0 has a gradient too.
    """
    if weights.device.type != "cpu" or weights.requires_grad:
        return weights
    if weights.dtype is torch.bool and bool(weights.all()):
        return True
    return weights if bool(weights.any()) else False
