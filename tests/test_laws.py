"""The contract of DESIGN: what holds for every architecture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_vectors import (
    SteeringVector,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    at,
    completion,
    extract_activations,
    from_index,
    generated,
    prompted,
    record_activations,
    train_steering_vector,
)
from tests import tiny

PROMPTS = [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33]]
STEPS = 5


def random_vector(layers: list[int], scale: float = 1.0, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: scale * torch.randn(tiny.HIDDEN, generator=generator) for layer in layers})


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, prompts))
    rows = [([0] * (width - len(p)) + p if side == "left" else p + [0] * (width - len(p))) for p in prompts]
    masks = [([0] * (width - len(p)) + [1] * len(p)) for p in prompts]
    if side == "right":
        masks = [mask[::-1] for mask in masks]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def generate(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The answers' token ids and each step's logits ``(batch, steps, vocabulary)``."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def operator_by_hand(name: str, direction: Tensor) -> Callable[[Tensor], Tensor]:
    unit = direction / direction.norm()
    return {
        "addition": lambda h: h + direction,
        "ablation": lambda h: h - (h @ unit) * unit,
        "ablation_then_addition": lambda h: h - (h @ unit) * unit + direction,
    }[name]


OPERATORS = {
    "addition": addition_operator(),
    "ablation": ablation_operator(),
    "ablation_then_addition": ablation_then_addition_operator(),
}

# name → (selector for a batch of prompts of these lengths, whether a token of a prompt of length n is selected)
SELECTIONS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], Callable[[int, int], bool]]] = {
    "all": (lambda inputs: None, lambda index, n: True),
    "generated(inputs)": (generated, lambda index, n: index >= n - 1),
    "generated(lengths)": (
        lambda inputs: generated(inputs["attention_mask"].sum(1).tolist()),
        lambda index, n: index >= n - 1,
    ),
    "prompted(inputs)": (prompted, lambda index, n: index < n - 1),
    "from_index(1)": (lambda inputs: from_index(1), lambda index, n: index >= 1),
    "from_index(per row)": (
        lambda inputs: from_index(inputs["attention_mask"].sum(1).tolist()),
        lambda index, n: index >= n,
    ),
    "at": (lambda inputs: at([0, 2, 6, 9]), lambda index, n: index in (0, 2, 6, 9)),
    "list": (lambda inputs: [1, 4, 8], lambda index, n: index in (1, 4, 8)),
    "slice": (lambda inputs: slice(2, 9, 2), lambda index, n: index in (2, 4, 6, 8)),
    "callable": (lambda inputs: lambda positions: positions.index % 3 == 1, lambda index, n: index % 3 == 1),
}
FIRST_PASS = {
    "generated()": (lambda inputs: generated(), lambda index, n: index >= n - 1),
    "prompted()": (lambda inputs: prompted(), lambda index, n: index < n - 1),
    "completion()": (lambda inputs: completion(), lambda index, n: index >= n),
}


class TestReadWhereYouWrite:
    """Law 1."""

    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_recording_inside_is_outside_plus_delta(self, architecture: str, selection: str, operator: str) -> None:
        model = tiny.shared(architecture)
        vector = random_vector([1])
        prompt = PROMPTS[1]
        select, is_selected = SELECTIONS[selection]
        inputs = padded([prompt])
        with record_activations(model, layers=[0, 1]) as plain, torch.no_grad():
            model(**inputs)
        with (
            vector.apply(model, operator=OPERATORS[operator], tokens=select(inputs)),
            record_activations(model, layers=[0, 1]) as steered,
            torch.no_grad(),
        ):
            model(**inputs)
        change = operator_by_hand(operator, vector.layer_activations[1])
        assert torch.equal(steered[0][0], plain[0][0])
        for n in range(len(prompt)):
            before, after = plain[1][0][0, n], steered[1][0][0, n]
            if is_selected(n, len(prompt)):
                torch.testing.assert_close(after, change(before), atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(after, before)


class TestTheCacheDoesNotMatter:
    """Law 2."""

    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_cached_and_uncached_generation_equal_a_loop_steered_by_hand(
        self, architecture: str, selection: str
    ) -> None:
        self.check(architecture, *SELECTIONS[selection], "addition", cached=(True, False))

    @pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "addition"])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_under_every_operator(self, architecture: str, operator: str) -> None:
        self.check(architecture, *SELECTIONS["generated(inputs)"], operator, cached=(True, False))

    @pytest.mark.parametrize("selection", FIRST_PASS)
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_the_first_pass_of_a_cache_is_the_prompt(self, architecture: str, selection: str) -> None:
        self.check(architecture, *FIRST_PASS[selection], "addition", cached=(True,))

    @staticmethod
    def check(
        architecture: str,
        select: Callable[[dict[str, Tensor]], Any],
        is_selected: Callable[[int, int], bool],
        operator: str,
        cached: tuple[bool, ...],
    ) -> None:
        model = tiny.shared(architecture)
        vector = random_vector([0, 2])
        by_hand = {layer: operator_by_hand(operator, d) for layer, d in vector.layer_activations.items()}
        # Recurrent models of transformers 4 can't leave padding out, whoever steers them.
        batches = [[p] for p in PROMPTS] if architecture in tiny.IGNORE_PADDING else [PROMPTS]
        for prompts in batches:
            inputs = padded(prompts)
            expected = [by_hand_loop(model, prompt, by_hand, is_selected) for prompt in prompts]
            for use_cache in cached:
                with vector.apply(model, operator=OPERATORS[operator], tokens=select(inputs)):
                    answers, logits = generate(model, inputs, use_cache=use_cache)
                for row, (expected_answer, expected_logits) in enumerate(expected):
                    assert answers[row].tolist() == expected_answer
                    torch.testing.assert_close(logits[row], expected_logits, atol=2e-4, rtol=1e-3)


def by_hand_loop(
    model: Any,
    prompt: list[int],
    by_hand: dict[int, Callable[[Tensor], Tensor]],
    is_selected: Callable[[int, int], bool],
) -> tuple[list[int], Tensor]:
    def steer(layer: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        activation = (output if isinstance(output, Tensor) else output[0]).clone()
        for n in range(activation.shape[1]):
            if is_selected(n, len(prompt)):
                activation[0, n] = by_hand[layer](activation[0, n])
        return activation if isinstance(output, Tensor) else type(output)([activation, *output[1:]])

    blocks = tiny.blocks(model)
    handles = [
        blocks[layer].register_forward_hook(lambda m, a, o, layer=layer: steer(layer, m, a, o)) for layer in by_hand
    ]
    ids, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(STEPS):
            logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    for handle in handles:
        handle.remove()
    return ids[len(prompt) :], torch.stack(logits)
