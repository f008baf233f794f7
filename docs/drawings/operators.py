"""A picture of the operators: an activation, a direction and the result, as arrows in a plane."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from drawings.themes import MONOSPACED, Theme, figure
from steering_vectors import (
    PatchDeltaOperator,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    clamp_operator,
    norm_preserving_operator,
    rotation_operator,
)

ACTIVATION = torch.tensor([0.7, 1.7])
DIRECTION = torch.tensor([1.5, 0.5])
OPERATORS: dict[str, PatchDeltaOperator] = {
    "addition_operator()": addition_operator(),
    "ablation_operator()": ablation_operator(),
    "ablation_then_\naddition_operator()": ablation_then_addition_operator(),
    "clamp_operator(max=0.5)": clamp_operator(max=0.5),
    "rotation_operator(0.5)": rotation_operator(0.5),
    "norm_preserving_operator(\naddition_operator())": norm_preserving_operator(addition_operator()),
}


def steered(operator: PatchDeltaOperator) -> torch.Tensor:
    """Return the activation after the operator's change, ``(2,)``."""
    return (ACTIVATION + operator(ACTIVATION.reshape(1, 1, 2), DIRECTION)).flatten()


def draw(theme: Theme) -> Figure:
    """Draw each operator in a plane, two beside each other."""
    drawn = figure(426)
    for axes, (name, operator) in zip(drawn.subplots(3, 2).flat, OPERATORS.items(), strict=True):
        axes.set_title(name, family=MONOSPACED, fontsize=8, linespacing=1.3)
        axes.set(xlim=(-0.75, 2.75), ylim=(-0.35, 2.45), aspect="equal")
        axes.set_axis_off()
        _draw_plane(axes, theme)
        _draw_arrow(axes, theme.muted, DIRECTION, "d", (0.12, -0.1))
        _draw_arrow(axes, theme.ink, ACTIVATION, "h", (0.02, 0.14))
        _draw_change(axes, theme, steered(operator))
    return drawn


def _draw_plane(axes: Axes, theme: Theme) -> None:
    """Draw the line along the direction, and the circle of the activation's norm."""
    line: dict[str, Any] = {"color": theme.faint, "linewidth": 1.2, "zorder": 0}
    axes.axline((0, 0), tuple(DIRECTION.tolist()), **line)
    axes.add_patch(Circle((0, 0), float(ACTIVATION.norm()), fill=False, **line))


def _draw_change(axes: Axes, theme: Theme, result: torch.Tensor) -> None:
    """Draw the result, and a dotted line from the activation to it."""
    ends = torch.stack([ACTIVATION, result])
    axes.plot(*ends.T.tolist(), ":", color=theme.colours[1], linewidth=1.5)
    _draw_arrow(axes, theme.colours[1], result, "", (0, 0), width=2.2)


def _draw_arrow(
    axes: Axes, colour: str, end: torch.Tensor, label: str, aside: tuple[float, float], *, width: float = 1.6
) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=tuple(end.tolist()), xytext=(0, 0), arrowprops=style)
    x, y = (end + torch.tensor(aside)).tolist()
    axes.text(x, y, label, color=colour, fontsize=10, style="italic", ha="center", va="center")
