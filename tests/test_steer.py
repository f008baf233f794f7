"""Steering by an operator without a direction. The laws over all architectures are in tests/test_laws.py."""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors import (
    SteeringVector,
    TokenPositions,
    active_patches,
    addition_operator,
    from_index,
    generated,
    norm_preserving_operator,
    read_activations,
    record_activations,
    steer,
    trace_steering,
    train_steering_vector,
)
from steering_vectors._steering import is_steered_by_token, is_steered_by_token_or_row, may_be_steered_by_row
from tests import tiny
from tests.test_steering import IDS, logits, padded, unchanged, vector
from tests.test_threads import in_threads
from tests.test_training_through import enable_checkpointing

SHIFT = torch.linspace(-2, 2, tiny.HIDDEN)


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A tiny Llama of the test's own; after the test it must be as before."""
    llama = tiny.build("llama")
    with unchanged(llama):
        yield llama


def shift(_activation: Tensor) -> Tensor:
    return SHIFT


def aging(activation: Tensor, *, positions: TokenPositions) -> Tensor:
    return 0.1 * positions.index[..., None] * activation.flip(-1)


class Affine(nn.Module):
    """A module, which says by ``forward`` what it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0, 1, tiny.HIDDEN))

    def forward(self, activation: Tensor, *, layer: int) -> Tensor:
        return (layer + 1) * self.scale * activation


class TestSteer:
    def test_is_the_vector_that_adds_the_change(self, model: PreTrainedModel) -> None:
        with SteeringVector({0: SHIFT, 2: SHIFT}).apply(model, multiplier=1.5, tokens=from_index(1)):
            expected = logits(model)
        for layers in ([0, 2], (-1, 0), iter([2, 0])):
            with steer(model, shift, layers=layers, multiplier=1.5, tokens=from_index(1)):
                assert torch.equal(logits(model), expected)

    def test_is_at_all_layers_of_the_type_by_default(self, model: PreTrainedModel) -> None:
        of_mlps = SteeringVector(dict.fromkeys(range(tiny.LAYERS), SHIFT), "mlp")
        with of_mlps.apply(model):
            expected = logits(model)
        with steer(model, shift, layer_type="mlp") as handle:
            assert torch.equal(logits(model), expected)
            assert handle.layers == [0, 1, 2]
        with steer(model, shift, layer_type="mlp", layer_config={"mlp": "model.layers.{num}.mlp"}):
            assert torch.equal(logits(model), expected)

    def test_is_a_decorator_and_a_patch_too(self, model: PreTrainedModel) -> None:
        plain = logits(model)
        with steer(model, shift, layers=1):
            expected = logits(model)
        assert torch.equal(steer(model, shift, layers=1)(logits)(model), expected)
        handle = steer(model, shift, layers=1).patch()
        assert torch.equal(logits(model), expected)
        assert active_patches(model) == [handle]
        handle.remove()
        assert torch.equal(logits(model), plain)

    def test_is_shown_by_what_was_asked(self, model: PreTrainedModel) -> None:
        shown = "layers=[0, 2], multiplier=2.0, operator={}, tokens=from_index(1)"
        for operator, name in ((Affine(), "Affine(…)"), (math.sqrt, "<built-in function sqrt>")):
            context = steer(model, operator, layers=[0, 2], multiplier=2, tokens=from_index(1))  # type: ignore[arg-type]
            assert repr(context) == f"SteeringContext({shown.format(name)})"
            handle = context.patch()
            assert repr(active_patches(model)) == f"[SteeringPatchHandle({shown.format(name)})]"
            handle.remove()

    def test_is_traced(self, model: PreTrainedModel) -> None:
        with steer(model, lambda h: 0.25 * h, layers=[0, 1], tokens=from_index(2)), trace_steering(model) as trace:
            logits(model)
        assert {layer: found.steered_tokens for layer, found in trace.summary().items()} == {0: 3, 1: 3}
        assert [found.change for found in trace.summary().values()] == pytest.approx([0.25, 0.25], rel=1e-4)

    def test_scales_the_change_not_what_the_operator_gets(self, model: PreTrainedModel) -> None:
        seen: list[Tensor] = []

        def doubling(activation: Tensor) -> Tensor:
            seen.append(activation.clone())
            return activation

        with record_activations(model, layers=1) as plain:
            logits(model)
        with steer(model, doubling, layers=1, multiplier=[3.0, -1.0]), record_activations(model, layers=1) as steered:
            logits(model, IDS.expand(2, -1))
        torch.testing.assert_close(seen[0], plain[1][0].expand(2, -1, -1))
        torch.testing.assert_close(steered[1][0][0], 4 * plain[1][0][0])
        torch.testing.assert_close(steered[1][0][1], torch.zeros(5, tiny.HIDDEN))

    def test_a_row_at_zero_is_left_alone_though_the_change_is_nan(self, model: PreTrainedModel) -> None:
        expected = logits(model)
        with steer(model, lambda h: h * math.nan, layers=1, multiplier=[0, 1]):
            assert torch.equal(logits(model, IDS.expand(2, -1))[0], expected[0])

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradients_are_the_same_under_checkpointing(self, reentrant: bool) -> None:
        gradients = []
        for checkpointed in (False, True):
            model, affine = tiny.build("llama").train(), Affine()
            if checkpointed:
                enable_checkpointing(model, reentrant=reentrant)
            weighted = functools.partial(weighted_by_position, affine)
            multiplier = torch.tensor([0.5, 0.0], requires_grad=True)
            with steer(model, weighted, layers=[0, 1], multiplier=multiplier, tokens=from_index(1)):
                out = model(inputs_embeds=model.get_input_embeddings()(IDS.expand(2, -1)), use_cache=False)
                out.logits.logsumexp(dim=-1).sum().backward()
            gradients.append((multiplier.grad, affine.scale.grad))
        for plain, checkpoint in zip(*gradients, strict=True):
            assert plain is not None
            assert bool(plain.abs().max() > 1e-3)
            torch.testing.assert_close(plain, checkpoint)

    def test_a_change_that_is_too_large_is_refused(self) -> None:
        model = tiny.build("llama").to(torch.float16)
        with (
            pytest.raises(ValueError, match="layer 1: the change is too large for the model's torch.float16"),
            steer(model, lambda h: h.float() * 1e7, layers=1),
        ):
            logits(model)

    def test_rows_that_are_no_multiple_of_the_multipliers_are_refused(self, model: PreTrainedModel) -> None:
        with (
            pytest.raises(ValueError, match="the multiplier is given for 2 rows, but the model runs a batch of 3"),
            steer(model, shift, multiplier=[1, 2]),
        ):
            logits(model, IDS.expand(3, -1))


def weighted_by_position(affine: Affine, activation: Tensor, *, layer: int, positions: TokenPositions) -> Tensor:
    change: Tensor = affine(activation, layer=layer)
    return change * positions.index[..., None]


class TestMistakes:
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda m: steer(m, 0.5), TypeError, "operator must be callable, such as lambda activation: .* got float"),
            (
                lambda m: steer(m, addition_operator()),
                TypeError,
                r"callable with 1 argument, .* but addition_operator\(\) is not .*'direction'.*for vector.apply$",
            ),
            (lambda m: steer(m, lambda: 0), TypeError, "callable with 1 argument.*too many positional arguments"),
            (lambda m: steer(m, lambda h, *, where: h), TypeError, "missing a required argument: 'where'"),
            (lambda m: steer(m, nn.Bilinear(2, 2, 2)), TypeError, "callable with 1 argument.*'input2'"),
            (lambda m: steer(m, addition_operator), TypeError, "returns one instead; did you forget to call it"),
            (lambda m: steer(m, shift, layers=[1, 3]), ValueError, "layer 3 does not exist: the model has 3 layers"),
            (lambda m: steer(m, shift, layers=[]), ValueError, "layers is empty"),
            (lambda m: steer(m, shift, layers="1"), TypeError, "layers must be a layer number or a list of them"),
            (lambda m: steer(m, shift, layer_type="block"), ValueError, "unknown layer type 'block'"),
            (lambda m: steer(m, shift, multiplier=math.inf), ValueError, "multiplier must be finite"),
            (lambda m: steer(m, shift, tokens="all"), TypeError, "tokens must be a selector"),
            (lambda m: steer(None, shift), TypeError, "model"),
            (
                lambda m: steer(m, tokens=None),
                TypeError,
                r"steer\(\): missing a required argument.*begin with model, operator",
            ),
            (lambda m: steer(m, shift, layer=1), TypeError, "the argument is layers="),
            (lambda m: steer(m, shift, scale=2), TypeError, "the argument is multiplier="),
            (
                lambda m: vector().apply(m, operator=shift),
                TypeError,
                r"callable with 2 arguments.*activation alone are for steer\(model, operator\)$",
            ),
            (
                lambda m: vector().apply(m, operator=lambda h, d, *, where: d),
                TypeError,
                "missing a required argument: 'where'",
            ),
        ],
    )
    def test_are_errors_of_the_call(
        self, model: PreTrainedModel, call: Callable[[Any], Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            call(model)

    @pytest.mark.parametrize(
        ("operator", "got"),
        [
            (lambda h: None, "NoneType"),
            (lambda h: 1.0, "float"),
            (lambda h: h[..., :5], r"shape \(1, 5, 5\)"),
            (lambda h: h[None], r"shape \(1, 1, 5, 32\)"),
            (lambda h: h * 1j, r"shape \(1, 5, 32\) in torch.complex64"),
        ],
    )
    def test_a_result_of_another_kind_is_an_error_of_the_pass(
        self, model: PreTrainedModel, operator: Any, got: str
    ) -> None:
        message = rf"the operator .* returned {got} for an activation of shape \(1, 5, 32\); expected the tensor to"
        with pytest.raises(ValueError, match=message), steer(model, operator):
            logits(model)


class Asking:
    """An operator that notes what it gets."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []

    def __call__(self, activation: Tensor, direction: Tensor, *, layer: int, positions: TokenPositions) -> Tensor:
        self.got.append({"layer": layer, "positions": positions.index.tolist()})
        return direction


class TestAsking:
    INPUTS = padded([11, 12, 13], [21, 22])

    def got(self, model: PreTrainedModel, operator: Any, *layers: int) -> None:
        with vector(*layers).apply(model, operator=operator):
            logits(model, **self.INPUTS)

    @pytest.mark.parametrize(
        "wrap", [lambda op: op, norm_preserving_operator, functools.partial], ids=["", "norm", "p"]
    )
    def test_a_callable_object_gets_what_its_signature_asks_for(
        self, model: PreTrainedModel, wrap: Callable[[Any], Any]
    ) -> None:
        asking = Asking()
        self.got(model, wrap(asking), 2, 0)
        assert asking.got == [{"layer": layer, "positions": [[0, 1, 2], [-1, 0, 1]]} for layer in (0, 2)]

    def test_a_partial_keeps_what_it_binds(self, model: PreTrainedModel) -> None:
        asking = Asking()
        self.got(model, functools.partial(asking, layer=7))
        assert asking.got == [{"layer": 7, "positions": [[0, 1, 2], [-1, 0, 1]]}]

    def test_a_wrapper_asks_for_what_it_wraps(self, model: PreTrainedModel) -> None:
        asking = Asking()

        @functools.wraps(asking)
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            return asking(*args, **kwargs)

        self.got(model, wrapper)
        assert asking.got == [{"layer": 1, "positions": [[0, 1, 2], [-1, 0, 1]]}]

    def test_a_module_asks_by_its_forward(self, model: PreTrainedModel) -> None:
        affine = Affine()
        with record_activations(model, layers=2) as plain:
            logits(model)
        with steer(model, affine, layers=2), record_activations(model, layers=2) as steered:
            logits(model)
        torch.testing.assert_close(steered[2][0], plain[2][0] * (1 + 3 * affine.scale.detach()))

    def test_parameters_that_may_be_positional_keep_their_defaults(self, model: PreTrainedModel) -> None:
        got: list[Any] = []
        self.got(model, lambda h, d, layer="mine", positions=None: got.append((layer, positions)) or d)
        self.got(model, lambda h, d, **kwargs: got.append(kwargs) or d)
        self.got(model, lambda h, d, *, layer="mine": got.append(layer) or d)
        assert got == [("mine", None), {}, 1]

    def test_a_selector_and_positions_go_together(self, model: PreTrainedModel) -> None:
        inputs = self.INPUTS
        with record_activations(model, layers=1) as plain:
            logits(model, **inputs)
        with (
            vector().apply(model, operator=lambda h, d, *, positions: d * positions.index[..., None], tokens=[1, 2]),
            record_activations(model, layers=1) as steered,
        ):
            logits(model, **inputs)
        factors = torch.tensor([[0.0, 1, 2], [0, 0, 1]])[..., None]
        moved = (steered[1][0] - plain[1][0]) / vector().layer_activations[1]
        torch.testing.assert_close(moved, factors.expand_as(moved), atol=1e-3, rtol=1e-3)

    def test_the_prompt_s_length_is_known_as_to_a_selector(self, model: PreTrainedModel) -> None:
        def answering(_h: Tensor, d: Tensor, *, positions: TokenPositions) -> Tensor:
            assert positions.prompt_length is not None
            return d * (positions.index >= positions.prompt_length[:, None] - 1)[..., None]

        kwargs: Any = {**self.INPUTS, "max_new_tokens": 3, "do_sample": False}
        with vector(scale=3.0).apply(model, tokens=generated(self.INPUTS)):
            expected = model.generate(**kwargs)
        with vector(scale=3.0).apply(model, operator=answering):
            assert torch.equal(model.generate(**kwargs), expected)

    def test_threads_at_once_have_their_own_positions(self, model: PreTrainedModel) -> None:
        prompts = [padded([11, 12, 13, 14], [21, 22, 23]), padded([31, 32], [41, 42, 43, 44]), padded([5, 6, 7], [8])]
        expected = []
        for inputs in prompts:
            with steer(model, aging):
                expected.append(logits(model, **inputs))
        meeting = threading.Barrier(3, timeout=20)

        def meet(*_: Any) -> None:
            meeting.wait()  # all are in the midst of a pass

        hook = tiny.blocks(model)[0].register_forward_hook(meet)

        def run(inputs: dict[str, Tensor]) -> Tensor:
            with steer(model, aging, this_thread_only=True):
                meeting.wait()
                got = logits(model, **inputs)
                meeting.wait()
            return got

        got = in_threads(*(functools.partial(run, inputs) for inputs in prompts))
        hook.remove()
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


class TestReadingInside:
    PROMPTS = ("the first", "the second of them", "the second and a third", "x")

    @pytest.mark.parametrize("operator", [aging, lambda h: h.flip(-1)], ids=["positions", "alone"])
    def test_each_prompt_is_read_as_alone(self, model: PreTrainedModel, operator: Any) -> None:
        tokenizer = tiny.tokenizer()
        with steer(model, operator, layers=[0, 1]):
            assert is_steered_by_token(model) == is_steered_by_token_or_row(model) == (operator is aging)
            assert may_be_steered_by_row(model) == (operator is aging)
            rows = read_activations(model, tokenizer, self.PROMPTS, layers=2, batch_size=4)[2]
            for row, prompt in zip(rows, self.PROMPTS, strict=True):
                with record_activations(model, layers=2) as alone:
                    logits(model, torch.tensor([tokenizer(prompt)["input_ids"]]))
                torch.testing.assert_close(row, alone[2][0][0, -1], atol=1e-5, rtol=1e-5)

    def test_is_refused_where_the_operator_says_that_it_goes_by_rows(self, model: PreTrainedModel) -> None:
        class ByRow:
            rows = 2

            def __call__(self, activation: Tensor, *, positions: TokenPositions) -> Tensor:
                return activation * torch.arange(2)[:, None, None]

        with (
            pytest.raises(ValueError, match="the model is steered row by row"),
            steer(model, ByRow()),
        ):
            train_steering_vector(model, tiny.tokenizer(), [("a", "b")])
