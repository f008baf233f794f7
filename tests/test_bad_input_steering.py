"""A mistake in steering is an error that says what to do, and leaves the model as it was."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, pipeline

from steering_vectors import (
    PatchDeltaOperator,
    SteeringVector,
    TokenPositions,
    ablation_operator,
    active_patches,
    addition_operator,
    at,
    clamp_operator,
    completion,
    from_index,
    generated,
    prompted,
    rotation_operator,
)
from tests import tiny
from tests.test_steering import IDS, logits, shown, unchanged, vector


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A tiny Llama of the test's own; after the test it must be as before."""
    llama = tiny.build("llama")
    with unchanged(llama):
        yield llama


@pytest.fixture(params=["apply", "patch"])
def way(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def refused(way: str, steering: SteeringVector, *args: Any, **kwargs: Any) -> str:
    """The message with which the call itself fails, before any block is entered."""
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(steering, way)(*args, **kwargs)
    return f"{caught.type.__name__}: {caught.value}"


class TestLayers:
    @pytest.mark.parametrize("layer", [3, 40, -4])
    def test_a_layer_that_the_model_has_not(self, model: PreTrainedModel, way: str, layer: int) -> None:
        got = refused(way, vector(0, layer), model)
        expected = "does not exist: the model has 3 layers, 0 to 2, or -3 to -1 from the end"
        assert got == f"ValueError: layer {layer} {expected}"

    @pytest.mark.parametrize("pair", [(-1, 2), (0, -3)])
    def test_two_keys_that_are_one_layer(self, model: PreTrainedModel, way: str, pair: tuple[int, int]) -> None:
        got = refused(way, vector(1, *pair), model)
        assert got.startswith("ValueError: the vector's layers [")
        assert all(str(key) in got.split("]")[0] for key in pair)
        assert got.endswith(f"are the same layer of this model, number {pair[0] % 3}: keep only one of them")

    def test_a_width_that_the_model_has_not(self, model: PreTrainedModel, way: str) -> None:
        got = refused(way, SteeringVector({1: torch.ones(16)}), model)
        assert got == (
            "ValueError: the vector's directions have 16 numbers, but the model's layer 1 has 32: "
            "use a vector made for this model"
        )

    @pytest.mark.parametrize("times", [2, 3])
    def test_a_width_that_is_a_multiple_of_the_model_s(self, model: PreTrainedModel, way: str, times: int) -> None:
        got = refused(way, SteeringVector({1: torch.ones(times * tiny.HIDDEN)}), model)
        assert f"directions have {32 * times} numbers, but the model's layer 1 has 32: use a vector" in got

    def test_a_width_that_would_broadcast(self, model: PreTrainedModel, way: str) -> None:
        got = refused(way, SteeringVector({1: torch.ones(1)}), model)
        assert got.startswith("ValueError: the vector's directions have 1 numbers, but the model's layer 1 has 32: ")

    def test_a_width_that_only_the_pass_can_tell(self, model: PreTrainedModel, way: str) -> None:
        config: Any = {"mlp": "model.layers.{num}.mlp.up_proj"}
        with (
            pytest.raises(ValueError, match="directions have 32 numbers, but the model's layer 1 has 48"),
            getattr(vector(layer_type="mlp"), way)(model, config),
        ):
            logits(model)

    def test_a_vector_without_directions(self, model: PreTrainedModel, way: str) -> None:
        got = refused(way, SteeringVector({}), model)
        assert got == "ValueError: this steering vector has no directions, so there is nothing to apply"

    def test_an_unknown_layer_type(self, model: PreTrainedModel, way: str) -> None:
        expected = (
            "ValueError: unknown layer type 'block'; expected one of "
            "decoder_block, self_attn, mlp, input_layernorm, post_attention_layernorm, heads, neurons"
        )
        with pytest.raises(
            ValueError, match="unknown layer type 'block'; expected one of decoder_block, self_attn, mlp"
        ):
            SteeringVector({1: torch.ones(32)}, "block")  # type: ignore[arg-type]
        changed = vector()
        changed.layer_type = "block"  # type: ignore[assignment]
        assert refused(way, changed, model) == expected

    def test_a_multiplier_in_layer_config_s_place(self, model: PreTrainedModel, way: str) -> None:
        got = refused(way, vector(), model, 2.0)
        assert got.startswith("TypeError: layer_config must be a mapping")
        assert "did you mean multiplier=2.0?" in got

    def test_a_selector_in_layer_config_s_place(self, model: PreTrainedModel, way: str) -> None:
        assert refused(way, vector(), model, generated(3)).startswith("TypeError: layer_config must be a mapping")

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"decoder_block": "layers.{num}"}, "matches no module of LlamaForCausalLM.*model.layers.{num}"),
            ({"decoder_block": "model.layers"}, "a template with {num} in it, such as .*, got 'model.layers'"),
            ({"block": "model.layers.{num}"}, "unknown layer type 'block'"),
            ({"decoder_block": 3}, "a callable or a template with {num} in it, such as .*, got 3"),
        ],
    )
    def test_a_layer_config_that_names_nothing(
        self, model: PreTrainedModel, way: str, config: Any, message: str
    ) -> None:
        with pytest.raises((TypeError, ValueError), match=message):
            getattr(vector(), way)(model, config)

    def test_layers_that_share_a_module(self, way: str) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                block = nn.Linear(4, 4)
                self.blocks = nn.ModuleList([block, block])

        shared = Shared()
        config: Any = {"decoder_block": "blocks.{num}"}
        for layers in ([0, 1], [1]):
            got = refused(way, SteeringVector({layer: torch.ones(4) for layer in layers}), shared, config)
            assert got == (
                "ValueError: layers [0, 1] of Shared share modules: they are one module that runs several times, so "
                "none of them can be steered or read separately"
            )


class TestTheModelItself:
    def test_a_tokenizer_in_the_model_s_place(self, way: str) -> None:
        got = refused(way, vector(), tiny.tokenizer())
        assert got.startswith("TypeError: model must be a torch.nn.Module such as a Hugging Face model, got ")

    def test_a_pipeline_in_the_model_s_place(self, model: PreTrainedModel, way: str) -> None:
        generator = pipeline("text-generation", model=model, tokenizer=tiny.tokenizer(), device="cpu")
        got = refused(way, vector(), generator)
        assert got.startswith("TypeError: model must be a torch.nn.Module")
        assert got.endswith("got TextGenerationPipeline: pass its .model")

    @pytest.mark.parametrize("wrong", [None, "gpt2", 3])
    def test_other_things_in_the_model_s_place(self, way: str, wrong: Any) -> None:
        assert refused(way, vector(), wrong).startswith("TypeError: model must be a torch.nn.Module")

    @pytest.mark.parametrize("wrong", [None, "gpt2"])
    def test_active_patches_of_no_model(self, wrong: Any) -> None:
        with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
            active_patches(wrong)

    def test_a_model_without_blocks(self, way: str) -> None:
        got = refused(way, vector(), nn.Linear(32, 32))
        assert got.startswith("ValueError: can't tell which modules are the decoder blocks of Linear")
        assert "layer_config={'decoder_block': 'PATH.{num}'}" in got


class TestDirections:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_numbers_that_are_not_finite(self, model: PreTrainedModel, way: str, value: float) -> None:
        direction = torch.ones(tiny.HIDDEN)
        direction[3] = value
        message = "the direction of layer 1 has NaN or infinite numbers"
        with pytest.raises(ValueError, match=message):
            SteeringVector({1: direction})
        changed = vector()
        changed.layer_activations[1] = direction
        assert refused(way, changed, model) == f"ValueError: {message}"

    @pytest.mark.parametrize("shape", [(), (2, 32), (1, 1, 32), (0,), (1, 0)])
    def test_other_shapes(self, model: PreTrainedModel, way: str, shape: tuple[int, ...]) -> None:
        message = f"the direction of layer 1 must have the shape (hidden,) or (1, hidden), got {shape}"
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            SteeringVector({1: torch.ones(shape)})
        assert str(caught.value) == message
        changed = vector()
        changed.layer_activations[1] = torch.ones(shape)
        assert refused(way, changed, model) == f"ValueError: {message}"

    def test_several_widths(self, model: PreTrainedModel, way: str) -> None:
        with pytest.raises(ValueError, match=r"all directions must have the same width, got \[16, 32\]"):
            SteeringVector({0: torch.ones(32), 1: torch.ones(16)})
        changed = vector(0, 1)
        changed.layer_activations[1] = torch.ones(16)
        assert refused(way, changed, model) == "ValueError: all directions must have the same width, got [16, 32]"

    @pytest.mark.parametrize("value", ["abc", None, object(), [1.0, "a"], [[1.0], [1.0, 2.0]], {"a": 1}])
    def test_what_is_no_tensor_of_numbers(self, value: Any) -> None:
        with pytest.raises(TypeError, match="the direction of layer 1 must be a tensor of numbers, got "):
            SteeringVector({1: value})

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_tensors_that_hold_no_real_numbers(self, dtype: torch.dtype) -> None:
        with pytest.raises(
            TypeError, match=f"the direction of layer 1 must hold real numbers of 16, 32 or 64 bits, got {dtype}"
        ):
            SteeringVector({1: torch.ones(4, dtype=dtype)})

    @pytest.mark.parametrize("key", ["1", 1.0, True, None, (1,)])
    def test_keys_that_are_no_layer_numbers(self, key: Any) -> None:
        with pytest.raises(TypeError, match="a layer number must be a whole number, got "):
            SteeringVector({key: torch.ones(4)})

    @pytest.mark.parametrize("value", [torch.ones(4), [torch.ones(4)], None, "abc"])
    def test_directions_without_layers(self, value: Any) -> None:
        with pytest.raises(TypeError, match="layer_activations must map layer numbers to directions, got "):
            SteeringVector(value)


class TestMultiplier:
    @pytest.mark.parametrize(
        "multiplier",
        ["2", b"2", None, 1j, [1j, 1], ["1", "2"], [[1.0], [2.0]], torch.ones(2, 2), {"a": 1}, {1.0, 2.0}, range],
        ids=shown,
    )
    def test_what_is_neither_one_number_nor_one_for_each_row(
        self, model: PreTrainedModel, way: str, multiplier: Any
    ) -> None:
        assert refused(way, vector(), model, multiplier=multiplier).startswith(
            "TypeError: multiplier must be one number, or a sequence or 1-D tensor with one number for each row, got "
        )

    @pytest.mark.parametrize("multiplier", [[], (), torch.ones(0), np.ones(0)], ids=shown)
    def test_none_at_all(self, model: PreTrainedModel, way: str, multiplier: Any) -> None:
        got = refused(way, vector(), model, multiplier=multiplier)
        assert got == "ValueError: multiplier is empty: pass one number, or one for each row"

    @pytest.mark.parametrize("multiplier", [[1.0, math.nan], torch.tensor([math.inf, 1.0])], ids=shown)
    def test_rows_that_are_not_finite(self, model: PreTrainedModel, way: str, multiplier: Any) -> None:
        assert refused(way, vector(), model, multiplier=multiplier).startswith(
            "ValueError: multiplier must be finite, got "
        )

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("kind", [float, np.float32, torch.tensor, lambda x: torch.tensor(x, requires_grad=True)])
    def test_numbers_that_are_not_finite(self, model: PreTrainedModel, way: str, kind: Any, value: float) -> None:
        got = refused(way, vector(), model, multiplier=kind(value))
        assert got.startswith("ValueError: multiplier must be finite, got ")
        assert str(value) in got


class TestTokens:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            ({"min_token_index": 0, "token_indices": [1]}, "min_token_index and token_indices"),
            ({"min_token_index": 1, "tokens": at(1)}, "min_token_index and tokens"),
            ({"token_indices": [1], "tokens": [1]}, "token_indices and tokens"),
            (
                {"min_token_index": 0, "token_indices": [1], "tokens": [1]},
                "min_token_index and token_indices and tokens",
            ),
        ],
    )
    def test_two_selections_at_once(self, model: PreTrainedModel, way: str, given: dict[str, Any], named: str) -> None:
        assert refused(way, vector(), model, **given) == f"ValueError: {named} were given: choose one of them"

    @pytest.mark.parametrize("name", ["tokens", "token_indices"])
    @pytest.mark.parametrize(
        ("selection", "message"),
        [
            (torch.ones(1, 2, 3), "ValueError: a mask of tokens must have the shape (seq,) or (batch, seq), got (1,"),
            (torch.tensor(1), "ValueError: a mask of tokens must have the shape (seq,) or (batch, seq), got ()"),
            (torch.tensor([0, 2]), "ValueError: a mask of tokens must hold only 0 and 1; to select tokens by index,"),
            (torch.tensor([0.5]), "ValueError: a mask of tokens must hold only 0 and 1; to select tokens by index,"),
            (
                3,
                "TypeError: tokens must be a selector such as generated(inputs), a list of token indices, a slice or a mask",
            ),
            (
                "all",
                "TypeError: tokens must be a selector such as generated(inputs), a list of token indices, a slice or",
            ),
            (
                {"input_ids": IDS},
                "TypeError: tokens must be a selector such as generated(inputs), a list of token indices",
            ),
            ([True, False], "TypeError: token_indices takes token indices, got True; for a mask, pass a tensor"),
            ([0.5], "TypeError: token_indices takes whole numbers, got 0.5"),
            (
                slice(None, None, -1),
                "ValueError: a slice of tokens needs a step of at least 1, got slice(None, None, -1)",
            ),
        ],
        ids=shown,
    )
    def test_what_is_no_selection(
        self, model: PreTrainedModel, way: str, name: str, selection: Any, message: str
    ) -> None:
        assert refused(way, vector(), model, **{name: selection}).startswith(message)

    @pytest.mark.parametrize("bounds", [("a", None, None), (None, 1.5, None), (None, None, "b")])
    def test_a_slice_of_other_things(self, model: PreTrainedModel, way: str, bounds: Any) -> None:
        got = refused(way, vector(), model, tokens=slice(*bounds))
        assert got.startswith("TypeError: ")
        assert "slice" in got

    @pytest.mark.parametrize("value", [True, 1.5, "1", [1]])
    def test_a_min_token_index_that_is_no_number(self, model: PreTrainedModel, way: str, value: Any) -> None:
        assert refused(way, vector(), model, min_token_index=value).startswith("TypeError: min_token_index takes ")

    @pytest.mark.parametrize(
        ("selection", "message"),
        [
            (torch.ones(2, 5), "the mask of tokens is given for 2 rows, but the model runs a batch of 3"),
            (from_index([1, 2]), "from_index is given for 2 rows, but the model runs a batch of 3"),
            (generated([1, 2]), r"generated\(inputs\) is given for 2 rows, but the model runs a batch of 3"),
            (lambda p: torch.ones(3), r"returned a tensor of shape \(3,\), expected \(batch, seq\) = \(3, 5\)"),
            (lambda p: [1.0], r"returned list, expected a tensor \(batch, seq\)"),
            (lambda p: p.index * 1j, "returned complex numbers, expected a mask or real weights"),
        ],
    )
    def test_what_only_the_pass_can_tell(self, model: PreTrainedModel, way: str, selection: Any, message: str) -> None:
        with pytest.raises((TypeError, ValueError), match=message), getattr(vector(), way)(model, tokens=selection):
            logits(model, IDS.expand(3, 5))

    def test_a_selector_that_raises(self, model: PreTrainedModel, way: str) -> None:
        def fail(_positions: Any) -> Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), getattr(vector(), way)(model, tokens=fail):
            logits(model)

    def test_a_layer_called_outside_of_a_pass(self, model: Any, way: str) -> None:
        block = model.model.layers[1].mlp
        with (
            pytest.raises(RuntimeError, match="a steered layer ran outside a pass of the model"),
            getattr(vector(layer_type="mlp"), way)(model, tokens=from_index(1)),
        ):
            block(torch.ones(1, 3, tiny.HIDDEN))


class TestOperator:
    @pytest.mark.parametrize("operator", ["addition", 2.0, torch.ones(32)], ids=shown)
    def test_what_is_no_operator(self, model: PreTrainedModel, way: str, operator: Any) -> None:
        got = refused(way, vector(), model, operator=operator)
        assert (
            got == f"TypeError: operator must be callable, such as ablation_operator(), got {type(operator).__name__}"
        )

    @pytest.mark.parametrize(
        ("operator", "got"),
        [
            (lambda h, d: None, "NoneType"),
            (lambda h, d: 1.0, "float"),
            (lambda h, d: h[..., :5], r"shape \(1, 5, 5\)"),
            (lambda h, d: h[:, :2], r"shape \(1, 2, 32\)"),
            (lambda h, d: h[None], r"shape \(1, 1, 5, 32\)"),
            (lambda h, d: torch.ones(2, 1, 1), r"shape \(2, 1, 1\)"),
        ],
    )
    @pytest.mark.parametrize("tokens", [None, [1]], ids=shown)
    def test_an_operator_that_gives_something_else(
        self, model: PreTrainedModel, way: str, tokens: Any, operator: Any, got: str
    ) -> None:
        message = rf"the operator .* returned {got} for an activation of shape \(1, 5, 32\); expected the tensor to"
        with (
            pytest.raises(ValueError, match=message),
            getattr(vector(), way)(model, operator=operator, tokens=tokens),
        ):
            logits(model)

    def test_an_operator_that_raises(self, model: PreTrainedModel, way: str) -> None:
        def fail(_activation: Tensor, _direction: Tensor) -> Tensor:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), getattr(vector(), way)(model, operator=fail):
            logits(model)


def test_what_is_no_parameter_is_refused_before_anything_is_attached(model: PreTrainedModel, way: str) -> None:
    assert refused(way, vector(), model, scale=2).startswith("TypeError: ")
    assert refused(way, vector(), model, None, None, 1.0, None, None, [1]).startswith("TypeError: ")


def of_two(scale: float, offset: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda activation, direction: scale * direction + offset


def of_two_as_text(scale: float, offset: float) -> "PatchDeltaOperator":
    return of_two(scale, offset)


def of_two_unknown(activation: Tensor, direction: Tensor) -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821
    return direction


class OfTwo:
    def __init__(self, scale: float, offset: float) -> None: ...

    def __call__(self, activation: Tensor, direction: Tensor) -> Tensor:
        return direction


class OfOne:
    def __init__(self, step: int) -> None: ...

    def __call__(self, positions: TokenPositions) -> Tensor:
        return positions.index > 0


def of_one(step: int) -> OfOne:
    return OfOne(step)


class TestWhatMakesAThingInTheThingSPlace:
    """A factory that was not called: its mistake shows where it is given, not in the model's pass."""

    @pytest.mark.parametrize("operator", [ablation_operator, addition_operator, clamp_operator, rotation_operator])
    def test_as_operator(self, model: PreTrainedModel, way: str, operator: Any) -> None:
        got = refused(way, SteeringVector({1: torch.ones(32)}), model, operator=operator)
        name = operator.__name__
        assert got == (
            f"TypeError: operator must be callable with 2 arguments, such as ablation_operator(), but {name} returns "
            f"one instead; did you forget to call it: {name}(…)?"
        )

    @pytest.mark.parametrize("operator", [lambda a: a, lambda: 0])
    def test_as_operator_of_other_arguments(self, model: PreTrainedModel, way: str, operator: Any) -> None:
        got = refused(way, SteeringVector({1: torch.ones(32)}), model, operator=operator)
        assert got.startswith("TypeError: operator must be callable with 2 arguments, such as ablation_operator()")

    @pytest.mark.parametrize("tokens", [at, completion, from_index, generated, prompted])
    def test_as_selector(self, model: PreTrainedModel, way: str, tokens: Any) -> None:
        got = refused(way, SteeringVector({1: torch.ones(32)}), model, tokens=tokens)
        name = tokens.__name__
        assert got == (
            f"TypeError: a selector must be callable with 1 argument, such as from_index(1), but {name} returns one "
            f"instead; did you forget to call it: {name}(…)?"
        )

    @pytest.mark.parametrize("factory", [of_two, of_two_as_text, OfTwo, partial(of_two)], ids=shown)
    def test_of_a_user_s_own_as_operator(self, model: PreTrainedModel, way: str, factory: Any) -> None:
        got = refused(way, SteeringVector({1: torch.ones(32)}), model, operator=factory)
        assert "returns one instead; did you forget to call it" in got

    @pytest.mark.parametrize("factory", [of_one, OfOne], ids=shown)
    def test_of_a_user_s_own_as_selector(self, model: PreTrainedModel, way: str, factory: Any) -> None:
        got = refused(way, SteeringVector({1: torch.ones(32)}), model, tokens=factory)
        assert "returns one instead; did you forget to call it" in got

    @pytest.mark.parametrize(
        "operator", [of_two(1, 2), OfTwo(1, 2), of_two_unknown, torch.add, nn.Bilinear(32, 32, 32)]
    )
    def test_what_is_called_already_is_taken(self, model: PreTrainedModel, operator: Any) -> None:
        SteeringVector({1: torch.ones(32)}).patch(model, operator=operator).remove()

    def test_one_without_annotations_shows_when_the_model_runs(self, model: PreTrainedModel) -> None:
        def halving(scale, offset):  # type: ignore[no-untyped-def]
            return lambda activation, direction: direction / 2

        def every(step):  # type: ignore[no-untyped-def]
            return lambda positions: positions.index % step == 0

        for name, kwargs in (("halving", {"operator": halving}), ("every", {"tokens": every})):
            handle = SteeringVector({1: torch.ones(32)}).patch(model, **kwargs)
            with pytest.raises((TypeError, ValueError), match=rf"did you forget to call it: {name}\(…\)\?"):
                logits(model)
            handle.remove()

    @pytest.mark.parametrize("number", [torch.tensor(2.0), np.float32(2), 2])
    def test_a_multiplier_in_layer_config_s_place(self, model: PreTrainedModel, way: str, number: Any) -> None:
        got = refused(way, SteeringVector({1: torch.ones(32)}), model, layer_config=number)
        assert got.endswith("did you mean multiplier=2.0?")
