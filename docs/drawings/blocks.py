"""A picture of a decoder block: the residual stream, the parts that read it and add to it, and their layer types."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from drawings.models import tiny_llama
from drawings.themes import MONOSPACED, Theme, canvas
from steering_vectors import guess_and_enhance_layer_config

_STREAM, _LEFT, _RIGHT, _HEIGHT = 36.0, 86.0, 300.0, 30.0
# The two halves of a block: where the norm's box begins, and the layer types of the norm and of what follows it.
_HALVES = ((40.0, "input_layernorm", "self_attn"), (176.0, "post_attention_layernorm", "mlp"))


def module_names() -> dict[str, str]:
    """Return the names of a Llama's modules as the library finds them, by layer type."""
    return {kind: str(name) for kind, name in guess_and_enhance_layer_config(tiny_llama()).items()}


def draw(theme: Theme) -> Figure:
    """Draw a block of a Llama from top to bottom."""
    figure, axes = canvas(392)
    axes.text(2, 12, "output of block l − 1", fontsize=9)
    for top, norm, part in _HALVES:
        _draw_half(axes, theme, top, norm, part)
    axes.plot([_STREAM, _STREAM], [20, 330], color=theme.ink, linewidth=3, solid_capstyle="butt", zorder=0)
    _draw_arrow(axes, theme, (_STREAM, 330), (_STREAM, 364), width=3)
    _draw_point(axes, theme, _STREAM, 332)
    axes.text(_STREAM + 14, 332, "decoder_block", family=MONOSPACED, fontsize=9, va="center")
    axes.text(_STREAM + 14, 345, module_names()["decoder_block"], color=theme.muted, fontsize=8, va="center")
    _draw_point(axes, theme, 10, 380)
    axes.text(20, 380, "the library reads here, and adds here when it steers", fontsize=8.5, va="center")
    return figure


def _draw_half(axes: Axes, theme: Theme, top: float, norm: str, part: str) -> None:
    """Draw a norm that reads the stream, and the part after it, whose output is added to the stream."""
    middle, sum_at = (_LEFT + _RIGHT) / 2, top + 2.5 * _HEIGHT + 26
    _draw_arrow(axes, theme, (_STREAM, top + _HEIGHT / 2), (_LEFT - 3, top + _HEIGHT / 2))
    _draw_box(axes, theme, top, norm)
    _draw_arrow(axes, theme, (middle, top + _HEIGHT), (middle, top + _HEIGHT + 22))
    _draw_point(axes, theme, middle, top + _HEIGHT + 8)
    _draw_box(axes, theme, top + _HEIGHT + 25, part)
    below = top + 2 * _HEIGHT + 25
    axes.plot([middle, middle], [below, sum_at], color=theme.muted, linewidth=1.2)
    _draw_arrow(axes, theme, (middle, sum_at), (_STREAM + 9, sum_at))
    _draw_point(axes, theme, middle, below + 8)
    axes.plot(_STREAM, sum_at, "o", markersize=15, markerfacecolor=theme.background, color=theme.ink)
    axes.text(_STREAM, sum_at, "+", fontsize=13, ha="center", va="center_baseline")


def _draw_box(axes: Axes, theme: Theme, top: float, kind: str) -> None:
    """Draw a part of the block with its layer type and its module's name."""
    shape = FancyBboxPatch(
        (_LEFT, top),
        _RIGHT - _LEFT,
        _HEIGHT,
        boxstyle="round,pad=0,rounding_size=4",
        facecolor=theme.faint,
        edgecolor=theme.muted,
        linewidth=0.8,
    )
    axes.add_patch(shape)
    middle = (_LEFT + _RIGHT) / 2
    axes.text(middle, top + 10, kind, family=MONOSPACED, fontsize=9, ha="center", va="center")
    name = module_names()[kind]
    axes.text(middle, top + 22, name, color=theme.ink, alpha=0.75, fontsize=8, ha="center", va="center")


def _draw_arrow(
    axes: Axes, theme: Theme, start: tuple[float, float], end: tuple[float, float], *, width: float = 1.2
) -> None:
    colour = theme.ink if width > 2 else theme.muted
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=arrow)


def _draw_point(axes: Axes, theme: Theme, x: float, y: float) -> None:
    """Mark a place where the library reads and adds."""
    axes.plot(x, y, "o", color=theme.colours[1], markersize=7, zorder=3)
