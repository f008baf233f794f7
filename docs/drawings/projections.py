"""A picture of projections: a text's tokens, coloured by how far their activations go along a direction."""

from dataclasses import dataclass
from functools import cache

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from drawings.models import smollm2
from drawings.themes import MONOSPACED, WIDTH, Theme, canvas
from steering_vectors import from_index, record_activations, train_steering_vector

LAYER = 16
PAIRS = [("I love this.", "I hate this."), ("A great day!", "A bad day!")]
TEXT = "The staff were friendly and the breakfast was wonderful, but the room was dirty and the shower was broken."
# Projections this far from 0, or farther, have the scale's last colour.
FARTHEST = 40.0

_Colour = str | tuple[float, float, float, float]
_CHARACTER, _LINE, _BOX = 5.6, 34.0, 16.0


@dataclass(frozen=True)
class Token:
    """A token's text, and its projection on the direction."""

    text: str
    projection: float


@cache
def measured() -> list[Token]:
    """Project the text's tokens on a direction of SmolLM2. Raises NoModelError if it isn't there."""
    model, tokenizer = smollm2()
    vector = train_steering_vector(model, tokenizer, PAIRS, layers=LAYER, tokens=from_index(1))
    inputs = tokenizer(TEXT, return_tensors="pt")
    with record_activations(model, layers=LAYER) as activations, torch.no_grad():
        model(**inputs)
    (along,) = vector.project(activations)[LAYER]  # (1, seq)
    texts = [tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
    return [Token(text.strip(), number) for text, number in zip(texts, along[0].tolist(), strict=True)]


def draw(theme: Theme) -> Figure:
    """Draw the tokens in lines, each in a box with its projection below, and the scale."""
    places = _places(measured())
    lines = 1 + max(line for line, _ in places)
    figure, axes = canvas(lines * _LINE + 34)
    colours = LinearSegmentedColormap.from_list("projection", [theme.below, theme.middle, theme.above])
    for number, (token, (line, left)) in enumerate(zip(measured(), places, strict=True)):
        # The first token is far beyond the scale: its activation is a hundred times as long as the others'.
        colour = theme.faint if number == 0 else colours(0.5 + token.projection / FARTHEST / 2)
        _draw_token(axes, theme, token, (left, line * _LINE + 2), colour)
    _draw_scale(axes, theme, colours, top=lines * _LINE + 8)
    return figure


def _places(tokens: list[Token]) -> list[tuple[int, float]]:
    """Return the line and the left edge of each token's box."""
    places, line, left = [], 0, 2.0
    for token in tokens:
        if left + _width(token) > WIDTH - 2:
            line, left = line + 1, 2.0
        places.append((line, left))
        left += _width(token) + 3
    return places


def _width(token: Token) -> float:
    return max(len(token.text), 4) * _CHARACTER + 6


def _draw_token(axes: Axes, theme: Theme, token: Token, corner: tuple[float, float], colour: _Colour) -> None:
    axes.add_patch(Rectangle(corner, _width(token), _BOX, facecolor=colour, edgecolor=theme.muted, linewidth=0.5))
    middle = corner[0] + _width(token) / 2
    ink = readable(to_rgb(colour))
    at = corner[1] + _BOX / 2
    axes.text(middle, at, token.text, color=ink, family=MONOSPACED, fontsize=9, ha="center", va="center_baseline")
    below = corner[1] + _BOX + 7
    number = str(round(token.projection)).replace("-", "−")
    axes.text(middle, below, number, color=theme.muted, fontsize=8, ha="center", va="center")


def readable(colour: tuple[float, float, float]) -> str:
    """Return black or white, whichever has the higher contrast with the colour."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    luminance = sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "#000000" if luminance > 0.179 else "#ffffff"


def _draw_scale(axes: Axes, theme: Theme, colours: Colormap, *, top: float) -> None:
    left, width, steps = 24.0, WIDTH - 48, 64
    for step in range(steps):
        corner = (left + step * width / steps, top)
        axes.add_patch(Rectangle(corner, width / steps + 0.3, 7, facecolor=colours((step + 0.5) / steps), linewidth=0))
    for share, label in ((0, f"−{FARTHEST:.0f}"), (0.5, "0"), (1, f"{FARTHEST:.0f}")):
        axes.text(left + share * width, top + 15, label, color=theme.muted, fontsize=8, ha="center", va="center")
