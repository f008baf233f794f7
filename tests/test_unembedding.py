"""Directions go through the model's own final norm and head, and through nothing else."""

from typing import Any

import pytest
import torch
from torch import nn

from steering_vectors import SteeringVector, active_patches, record_activations, unembed
from tests import tiny

IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_the_last_blocks_outputs_give_the_models_logits(name: str) -> None:
    """Final norms bring all rows to one scale, so the outputs' lengths don't matter; the logits of zeros cancel."""
    model = tiny.shared(name)
    with record_activations(model, layers=-1) as activations, torch.no_grad():
        logits = model(IDS).logits[0].float()
    ((last, ((rows,),)),) = ((layer, passes) for layer, passes in activations.items())
    assert last == len(tiny.blocks(model)) - 1
    found = unembed(model, rows)
    torch.testing.assert_close(found[1:] - found[:1], logits[1:] - logits[:1], atol=1e-3, rtol=1e-3)


def test_is_the_head_of_the_normed_direction_at_any_length() -> None:
    model: Any = tiny.shared("llama")
    direction = torch.randn(2, 3, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.lm_head(model.model.norm(direction * 100))
    for factor in (1e-3, 1.0, 1e4):
        torch.testing.assert_close(unembed(model, direction * factor), expected, atol=1e-4, rtol=1e-4)


def test_biases_are_no_part_of_a_direction() -> None:
    model: Any = tiny.build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.bias.normal_()
    up = unembed(model, torch.ones(tiny.HIDDEN) + torch.eye(tiny.HIDDEN)[0])
    down = unembed(model, -torch.ones(tiny.HIDDEN) - torch.eye(tiny.HIDDEN)[0])
    torch.testing.assert_close(up, -down, atol=1e-4, rtol=1e-4)


def test_a_steering_that_is_on_does_not_matter_and_stays() -> None:
    model, direction = tiny.shared("llama"), torch.ones(tiny.HIDDEN) + torch.eye(tiny.HIDDEN)[3]
    expected = unembed(model, direction)
    with SteeringVector({-1: torch.randn(tiny.HIDDEN)}).apply(model):
        assert torch.equal(unembed(model, direction), expected)
        assert len(active_patches(model)) == 1
        model(IDS)


def test_more_directions_than_a_pass_takes_are_each_as_alone() -> None:
    model = tiny.shared("llama")
    directions = torch.randn(70, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    together = unembed(model, directions)
    for number in (0, 63, 64, 69):
        torch.testing.assert_close(together[number], unembed(model, directions[number]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("directions", "error", "message"),
    [
        ([1.0], TypeError, "directions must be a tensor"),
        (torch.tensor(1.0), TypeError, "directions must be a tensor"),
        (torch.zeros(tiny.HIDDEN), ValueError, "none may be all zeros"),
        (torch.full((tiny.HIDDEN,), float("inf")), ValueError, "directions must be finite"),
        (torch.ones(7), ValueError, "must be as wide as the last block's output .*, got 7 numbers"),
    ],
)
def test_bad_directions(directions: Any, error: type[Exception], message: str) -> None:
    model = tiny.shared("llama")
    with pytest.raises(error, match=message):
        unembed(model, directions)


def test_a_model_without_a_head_is_refused() -> None:
    model: Any = tiny.build("llama")
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        unembed(model.model, torch.ones(tiny.HIDDEN))
    assert not any(module._forward_hooks for module in model.modules())


class TestTopTokens:
    def test_are_those_of_the_largest_and_smallest_logits(self) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
        vector = SteeringVector({0: torch.randn(tiny.HIDDEN), 2: torch.randn(tiny.HIDDEN)})
        found = vector.top_tokens(model, tokenizer, k=3)
        assert list(found) == [0, 2]
        for layer, direction in vector.layer_activations.items():
            order = unembed(model, direction).argsort().tolist()
            assert [text for text, _ in found[layer].promoted] == [tokenizer.decode([n]) for n in order[:-4:-1]]
            assert [text for text, _ in found[layer].suppressed] == [tokenizer.decode([n]) for n in order[:3]]
            assert found[layer].promoted[0][1] > 0 > found[layer].suppressed[0][1]

    def test_are_printed_as_a_table_with_escaped_texts(self) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer()

        class Hostile:
            def decode(self, ids: list[int]) -> str:
                return f"<b>{tokenizer.decode(ids)}\n"

        found = SteeringVector({1: torch.ones(tiny.HIDDEN)}).top_tokens(model, Hostile(), k=2)
        first, second = str(found).splitlines()
        assert first.startswith("    1  +  '<b>")
        assert second.startswith("       -  '<b>")
        assert "<b>" not in found._repr_html_()
        assert "&lt;b&gt;" in found._repr_html_()

    def test_of_a_norms_output_are_refused(self) -> None:
        vector = SteeringVector({1: torch.ones(tiny.HIDDEN)}, "input_layernorm")
        with pytest.raises(ValueError, match="of input_layernorm, whose output is no part of the residual stream"):
            vector.top_tokens(tiny.shared("llama"), tiny.tokenizer())

    @pytest.mark.parametrize("k", [0, -1, 2.5, "3"])
    def test_need_a_number_of_them(self, k: Any) -> None:
        with pytest.raises(ValueError, match="k must be a whole number of at least 1"):
            SteeringVector({1: torch.ones(tiny.HIDDEN)}).top_tokens(tiny.shared("llama"), tiny.tokenizer(), k)

    def test_need_a_tokenizer(self) -> None:
        with pytest.raises(TypeError, match="tokenizer must be a Hugging Face tokenizer or processor, got Linear"):
            SteeringVector({1: torch.ones(tiny.HIDDEN)}).top_tokens(tiny.shared("llama"), nn.Linear(1, 1))
