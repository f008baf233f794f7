"""A picture of token selections: a row of cells for each prompt, in which the steered tokens are coloured."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from drawings.models import tiny_llama
from drawings.themes import MONOSPACED, Theme, canvas
from steering_vectors import SteeringVector, after, at, completion, from_index, generated, prompted, record_activations

NEW_TOKENS = 4
# Two prompts, of three and of five tokens, padded on the left. Both have the token 13.
INPUTS = {
    "input_ids": torch.tensor([[0, 0, 11, 13, 12], [21, 22, 13, 24, 25]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}
SELECTIONS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "all tokens": lambda inputs: None,
    "generated(inputs)": generated,
    "prompted(inputs)": prompted,
    "completion()": lambda inputs: completion(),
    "from_index(1)": lambda inputs: from_index(1),
    "at([0, 3])": lambda inputs: at([0, 3]),
    "after(13)": lambda inputs: after(13),
    "after(13, until=12)": lambda inputs: after(13, until=12),
    "after(13) & ~completion()": lambda inputs: after(13) & ~completion(),
    "slice(1, 4)": lambda inputs: slice(1, 4),
    "slice(-2, None)": lambda inputs: slice(-2, None),
    "slice(1, -1)": lambda inputs: slice(1, -1),
    "[0, -1]": lambda inputs: [0, -1],
    "tensor([[0,1,1,0,1],[1,0,0,1,0]])": lambda inputs: torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]),
}

_LEFT, _GAP, _CELL, _LINE, _BETWEEN = 140, 13, 18, 15, 9


@cache
def steered_cells(name: str) -> Tensor:
    """Return which activations a selection changes as two prompts are continued, ``(2, columns)``, as a mask.

    The columns are those of the first pass, then one for each later pass. The last new token is in no pass.
    """
    model = tiny_llama()
    before: list[Tensor] = []

    def noting(activation: Tensor, direction: Tensor) -> Tensor:
        before.append(activation.clone())
        return torch.zeros_like(direction)

    vector = SteeringVector({1: torch.ones(model.config.hidden_size)})
    with (
        vector.apply(model, operator=noting),
        vector.apply(model, tokens=SELECTIONS[name](INPUTS)),
        record_activations(model, layers=1) as after,
    ):
        model.generate(**INPUTS, max_new_tokens=NEW_TOKENS, do_sample=False)
    passes = [(a != b).any(dim=-1) for a, b in zip(after[1], before, strict=True)]
    return torch.cat(passes, dim=1)  # (batch, columns)


def token_indices() -> list[list[int | None]]:
    """Return the index of the token in each cell, or None for padding."""
    mask = torch.cat([INPUTS["attention_mask"], torch.ones(2, NEW_TOKENS - 1, dtype=torch.long)], dim=1)
    indices = (mask.cumsum(dim=1) - 1).tolist()
    return [
        [index if is_token else None for index, is_token in zip(*row, strict=True)]
        for row in zip(indices, mask.tolist(), strict=True)
    ]


def draw(theme: Theme) -> Figure:
    """Draw all selections, one below the other."""
    block = 2 * _LINE + _BETWEEN
    figure, axes = canvas(54 + block * len(SELECTIONS))
    _draw_legend(axes, theme, top=4)
    _draw_headings(axes, theme, top=42)
    for number, name in enumerate(SELECTIONS):
        top = 50 + number * block
        label = name.replace("],[", "],\n        [")  # a mask, in two lines
        axes.text(2, top + _LINE, label, family=MONOSPACED, fontsize=8.5, va="center", linespacing=1.5)
        for row, cells in enumerate(steered_cells(name).tolist()):
            for column, steered in enumerate(cells):
                index = token_indices()[row][column]
                _draw_cell(axes, theme, _left_of(column), top + row * _LINE, steered=steered, index=index)
    return figure


def _left_of(column: int) -> float:
    prompt = INPUTS["input_ids"].shape[1]
    return _LEFT + column * _CELL + (_GAP if column >= prompt else 0)


def _draw_cell(axes: Axes, theme: Theme, left: float, top: float, *, steered: bool, index: int | None) -> None:
    """Draw one token with its index, or padding without one."""
    fill = theme.colours[0] if steered else theme.faint if index is None else "none"
    edge = fill if steered or index is None else theme.muted
    axes.add_patch(
        Rectangle((left + 1, top + 1), _CELL - 2.5, _LINE - 2.5, facecolor=fill, edgecolor=edge, linewidth=0.7)
    )
    if index is not None:
        colour = theme.on_colours if steered else theme.muted
        middle = (left + _CELL / 2, top + _LINE / 2)
        axes.text(*middle, str(index), color=colour, fontsize=8, ha="center", va="center_baseline")


def _draw_headings(axes: Axes, theme: Theme, *, top: float) -> None:
    for column, heading in ((0, "prompts, one pass"), (INPUTS["input_ids"].shape[1], "new tokens")):
        axes.text(_left_of(column) + 1, top, heading, color=theme.muted, fontsize=8)


def _draw_legend(axes: Axes, theme: Theme, *, top: float) -> None:
    for left, meaning, steered, index in (
        (2, "steered", True, 0),
        (76, "not steered", False, 0),
        (168, "padding, not steered", False, None),
    ):
        _draw_cell(axes, theme, left, top, steered=steered, index=index)
        axes.text(left + _CELL + 3, top + _LINE / 2, meaning, fontsize=8.5, va="center_baseline")
