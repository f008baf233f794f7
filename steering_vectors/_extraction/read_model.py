"""Read tokens of a model's layers in one pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._models import (
    Anatomy,
    Attention,
    Site,
    by_tokens,
    has_experts,
    kept_states,
    read_pass,
    stateful_modules,
)
from steering_vectors._precision import autocast_devices, wide


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt's token ids, and the tokens to read: one position, or several whose weighted mean is taken.

    ``weights``, one per position, sum to 1; None for a single position, whose row keeps the model's dtype. ``inputs``
    are all that the model gets for a prompt with images, and None for one without.
    """

    input_ids: list[int]
    positions: Sequence[int]
    weights: Sequence[float] | None = None
    inputs: Mapping[str, Any] | None = None

    def at(self, position: int) -> "ReadPrompt":
        """Return the same prompt, of which a single position is read."""
        return replace(self, positions=[position], weights=None)


class ReadModel:
    """A model and the layers that are read of it."""

    def __init__(self, anatomy: Anatomy, layers: Mapping[int, Site]) -> None:
        self.anatomy = anatomy
        self.layers = layers
        self.attention = Attention(anatomy.text_config)
        self._stateful = stateful_modules(anatomy.model)

    @property
    def rounding_decides(self) -> bool:
        """True for a mixture of experts in half precision, where rounding may send a token to another expert."""
        weights = (weight for weight in self.anatomy.model.parameters() if weight.is_floating_point())
        is_half = bool(autocast_devices()) or any(weight.dtype.itemsize < 4 for weight in weights)
        return is_half and has_experts(self.anatomy.model)

    def read(
        self, module: nn.Module, inputs: Mapping[str, Any], reads: "Reads", *, stop_early: bool
    ) -> dict[int, Tensor]:
        """Return the rows of one pass of ``module``, by layer."""
        before = self.anatomy.virtual_tokens
        batch, seq = inputs["input_ids"].shape

        def read(activation: Tensor) -> Tensor:
            return reads(by_tokens(activation, batch, before + seq)[:, before:])

        around = self.anatomy.pass_modules
        with kept_states(self._stateful):
            return read_pass(around[around.index(module) :], self.layers, inputs, read, stop_early=stop_early)

    def alone(self, input_ids: Sequence[int], positions: Sequence[int], *, stop_early: bool) -> dict[int, Tensor]:
        """Return the activations ``(positions, hidden)`` of a prompt that is run as its user would run it, by layer."""
        reads = Reads()
        for position in positions:
            reads.add(0, [position], None)
        inputs = as_inputs([input_ids], [len(input_ids)], self.anatomy.input_device)
        return self.read(self.anatomy.model, inputs, reads, stop_early=stop_early)


class Reads:
    """Rows to be made of an activation ``(batch, seq, hidden)``: each a token, or a weighted sum of several."""

    def __init__(self) -> None:
        self._rows = 0
        self._tokens: list[tuple[int, int, int]] = []  # row of the result, row of the batch, column
        self._weights: list[float] = []
        self._any_weights = False

    def add(self, batch_row: int, columns: Sequence[int], weights: Sequence[float] | None) -> None:
        """Read one more row."""
        self._tokens.extend((self._rows, batch_row, column) for column in columns)
        self._weights.extend(weights or [1.0] * len(columns))
        self._any_weights |= weights is not None
        self._rows += 1

    def __call__(self, activation: Tensor) -> Tensor:
        """Return the rows ``(rows, hidden)``, in float32 or wider if there are weights."""
        device = activation.device
        owners, batch_rows, columns = torch.tensor(self._tokens, device=device).unbind(dim=1)
        tokens = activation[batch_rows, columns]  # (tokens, hidden)
        if not self._any_weights:
            return tokens
        exact = wide(tokens)
        weighted = exact * torch.tensor(self._weights, device=device, dtype=exact.dtype)[:, None]
        return exact.new_zeros(self._rows, exact.shape[-1]).index_add_(0, owners, weighted)


def as_inputs(rows: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """Return the ids of rows of one width, and the mask of their first tokens.

    Padding on the right isn't seen, so any id will do; nor does it move the tokens, so that each model's own position
    ids are right, wherever they begin.
    """
    ids = torch.tensor(rows, device=device)
    own = torch.arange(ids.shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
    return {"input_ids": ids, "attention_mask": own.long()}
