"""Controls of an evaluation: directions that should do nothing, measured as the vector is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from steering_vectors._arguments import is_whole_number
from steering_vectors.evaluation.items import EvaluationItem, ItemPrompt
from steering_vectors.steering_vector import SteeringVector
from steering_vectors.train_steering_vector import SteeringVectorTrainingSample, train_steering_vector


@dataclass(frozen=True)
class Controls:
    """The controls of an evaluation.

    Args:
        random: The number of random vectors, each direction as long as the vector's at its layer.
        permuted: The number of vectors that are trained with the labels of half the samples
            swapped. They need ``training_samples``.
        training: The arguments of :func:`~steering_vectors.train_steering_vector` with which the vector was trained,
            but for the layers, such as ``{"tokens": from_index(1)}``.

    Raises:
        ValueError: If a number is negative.

    >>> Controls(random=5)
    Controls(random=5, permuted=1, training={})
    """

    random: int = 3
    permuted: int = 1
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("random", "permuted"):
            if not is_whole_number(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number of controls, 0 or more, got {getattr(self, name)!r}")


def check_controls(controls: object) -> None:
    """Raise TypeError for anything but controls or None."""
    if not (controls is None or isinstance(controls, Controls)):
        raise TypeError(f"controls must be Controls(...), or None for none, got {controls!r}")


def control_vectors(
    controls: Controls | None,
    model: nn.Module,
    tokenizer: Any,
    vector: SteeringVector,
    training_samples: Any,
    seed: int,
) -> dict[str, SteeringVector]:
    """Return the controls' vectors by their names; none if ``controls`` is None."""
    if controls is None:
        return {}
    found = {f"random {n + 1}": random_vector(vector, seed + n) for n in range(controls.random)}
    if training_samples is not None:
        if isinstance(training_samples, Mapping):
            training_samples = {side: list(prompts) for side, prompts in training_samples.items()}
        else:
            training_samples = list(training_samples)
        for n in range(controls.permuted):
            samples = permuted_labels(training_samples, seed + n)
            layers, kind = vector.layers, vector.layer_type
            found[f"permuted {n + 1}"] = train_steering_vector(
                model, tokenizer, samples, **{"layers": layers, "layer_type": kind, **controls.training}
            )
    return found


def random_vector(vector: SteeringVector, seed: int) -> SteeringVector:
    """Return random directions, each as long as the vector's at its layer."""
    generator = torch.Generator("cpu").manual_seed(seed)
    directions = {}
    for layer, direction in sorted(vector.layer_activations.items()):
        drawn = torch.randn(direction.shape, generator=generator, dtype=torch.float64, device="cpu")
        norm = direction.detach().double().norm().cpu()
        directions[layer] = (drawn / drawn.norm() * norm).to(direction.device, torch.float32)
    return replace(vector, layer_activations=directions, metadata={})


def permuted_labels(training_samples: Any, seed: int) -> Any:
    """Return the samples with the labels of a random half swapped: exactly half, so that nothing of the vector is left.

    An odd sample is left out. Of two sets, half of each changes sides.

    Raises ValueError for fewer than two samples.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if isinstance(training_samples, Mapping):
        sides = {side: list(prompts) for side, prompts in training_samples.items()}
        if min(map(len, sides.values()), default=0) < 2:
            raise ValueError("to permute labels, each set needs at least two prompts")
        first = {side: _shuffled(prompts, generator) for side, prompts in sides.items()}
        halves = {side: (part[: len(part) // 2], part[len(part) // 2 :]) for side, part in first.items()}
        kept, other = halves["positive"], halves["negative"]
        return {"positive": [*kept[0], *other[1]], "negative": [*kept[1], *other[0]]}
    if len(training_samples) < 2:
        raise ValueError("to permute labels, there must be at least two training samples")
    samples = _shuffled(training_samples, generator)
    half = len(samples) // 2
    return [*samples[:half], *map(_swapped, samples[half : 2 * half])]


def _shuffled(values: Sequence[Any], generator: torch.Generator) -> list[Any]:
    return [values[place] for place in torch.randperm(len(values), generator=generator, device="cpu").tolist()]


def _swapped(sample: Any) -> Any:
    if isinstance(sample, SteeringVectorTrainingSample):
        return SteeringVectorTrainingSample(
            sample.negative_str,
            sample.positive_str,
            read_positive_token_index=sample.read_negative_token_index,
            read_negative_token_index=sample.read_positive_token_index,
        )
    if isinstance(sample, Mapping):
        return {"positive": sample["negative"], "negative": sample["positive"]}
    if not isinstance(sample, (tuple, list)) or len(sample) != 2:
        return sample  # no pair, which training refuses in words
    positive, negative = sample
    return (negative, positive)


def with_system_prompt(items: Iterable[EvaluationItem], system_prompt: str) -> Iterator[EvaluationItem]:
    """Yield the items after a system prompt: chats get it as their first message, texts as a paragraph before them."""
    for item in items:
        yield replace(item, prompt=_after(system_prompt, item.prompt))


def _after(system_prompt: str, prompt: ItemPrompt) -> ItemPrompt:
    if isinstance(prompt, str):
        return f"{system_prompt}\n\n{prompt}"
    messages = list(prompt)
    if messages and messages[0].get("role") == "system":
        messages[0] = {**messages[0], "content": f"{system_prompt}\n\n{messages[0]['content']}"}
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
