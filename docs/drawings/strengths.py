"""A picture of norms by depth: the residual stream's, its first token's, and a vector's, as it is and as a share."""

from dataclasses import dataclass
from functools import cache
from statistics import median

import torch
from matplotlib.figure import Figure

from drawings.models import smollm2
from drawings.themes import Theme, figure
from steering_vectors import record_activations, residual_norms, train_steering_vector

# The texts, instructions and questions of the page that shows the picture.
TEXTS = ["The weather was fine, and so we went out to the lake.", "Once upon a time"]
INSTRUCTIONS = ("Explain it to a five year old child.", "Explain it to a professor.")
QUESTIONS = ["What is the sun?", "How does a car work?", "What is money?"]


@dataclass(frozen=True)
class Norms:
    """Norms by layer: of the texts' first tokens, of their other tokens, and of a vector; and the vector's shares."""

    first_token: dict[int, float]
    other_tokens: dict[int, float]
    direction: dict[int, float]
    shares: dict[int, float]


@cache
def measured() -> Norms:
    """Measure SmolLM2, with medians over the texts. Raises NoModelError if it isn't there."""
    model, tokenizer = smollm2()
    first: dict[int, list[float]] = {}
    for text in TEXTS:
        with record_activations(model) as activations, torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        for layer, (activation,) in activations.items():
            first.setdefault(layer, []).append(float(activation[0, 0].norm()))
    pairs = [[_chat(instruction, question) for instruction in INSTRUCTIONS] for question in QUESTIONS]
    vector = train_steering_vector(model, tokenizer, pairs)
    return Norms(
        first_token={layer: median(norms) for layer, norms in sorted(first.items())},
        other_tokens=residual_norms(model, tokenizer, TEXTS),
        direction=vector.norms(),
        shares=vector.shares(),
    )


def _chat(instruction: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": instruction}, {"role": "user", "content": question}]


def draw(theme: Theme) -> Figure:
    """Draw the norms above, and below them the direction's shares."""
    norms = measured()
    drawn = figure(360)
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    curves = (
        ("first token", norms.first_token, theme.colours[1], "--"),
        ("other tokens", norms.other_tokens, theme.ink, "-"),
        ("direction", norms.direction, theme.colours[0], "-"),
    )
    for label, by_layer, colour, style in curves:
        above.semilogy(list(by_layer), list(by_layer.values()), style, color=colour, linewidth=1.8)
        below_curve = min(list(by_layer.values())[-len(by_layer) // 3 :]) / 1.2
        above.text(max(by_layer), below_curve, label, color=colour, fontsize=8.5, ha="right", va="top")
    above.set_ylabel("norm")
    below.bar(list(norms.shares), list(norms.shares.values()), color=theme.colours[0])
    below.set_ylabel("vector.shares()")
    below.set_xlabel("layer")
    for axes in (above, below):
        axes.grid(axis="y", color=theme.faint, linewidth=0.8)
        axes.set_axisbelow(True)
    return drawn
