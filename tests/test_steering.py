"""Steering a model: what is attached, what changes, what stays, and what is told."""

import copy
import gc
import inspect
import math
import re
import threading
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
    pipeline,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from steering_vectors import (
    SteeringPatchHandle,
    SteeringVector,
    TokenPositions,
    ablation_operator,
    ablation_then_addition_operator,
    active_patches,
    addition_operator,
    at,
    completion,
    extract_activations,
    from_index,
    generated,
    prompted,
    record_activations,
)
from tests import families, tiny

IDS = torch.tensor([[11, 12, 13, 14, 15]])
CACHE = "past_key_values" if tiny.ON_TRANSFORMERS_4 else "cache"
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)
OPERATORS = [None, *(case.make() for case in families.OPERATORS.values())]


def shown(value: Any) -> str:
    """A name for a test's parameter, the same in every process: without addresses."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def vector(*layers: int, seed: int = 0, scale: float = 1.0, layer_type: Any = "decoder_block") -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    directions = {n: scale * torch.randn(tiny.HIDDEN, generator=generator) for n in layers or (1,)}
    return SteeringVector(directions, layer_type)


def logits(model: Any, input_ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids, **kwargs).logits
    return out


def answer(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    out: Tensor = model.generate(**inputs, max_new_tokens=4, **{"do_sample": False, **kwargs})
    return out[:, inputs["input_ids"].shape[1] :]


def recorded(model: Any, layer: int = 1, layer_type: Any = "decoder_block", **kwargs: Any) -> Tensor:
    """The layer's activation in one pass over IDS."""
    with record_activations(model, layer_type, layers=layer) as records:
        logits(model, **kwargs)
    (activation,) = records[layer]
    return activation


def padded(*prompts: list[int]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def hooks_of(model: nn.Module) -> dict[tuple[str, str], list[Any]]:
    """All hooks of all modules, in their order."""
    return {
        (name, kind): list(getattr(module, kind).items())
        for name, module in model.named_modules()
        for kind in HOOKS
        if getattr(module, kind)
    }


def shape_of(model: nn.Module) -> dict[str, Any]:
    """All but the hooks: the modules, their own attributes, weights and modes."""
    return {
        name: (sorted(vars(module)), id(module), type(module), module.training, [id(p) for p in module.parameters()])
        for name, module in model.named_modules()
    }


@contextmanager
def unchanged(model: nn.Module, run: Callable[[Any], Tensor] = logits) -> Generator[None, None, None]:
    """Checks that after the block the model is as before: hooks, modules, and what it gives, bit for bit."""
    hooks, shape, output = hooks_of(model), shape_of(model), run(model)
    keys = list(model.state_dict())
    yield
    assert active_patches(model) == []
    assert hooks_of(model) == hooks
    assert shape_of(model) == shape
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model), output)


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A tiny Llama of the test's own; after the test it must be as before."""
    llama = tiny.build("llama")
    with unchanged(llama):
        yield llama


class TestAttachment:
    def test_hooks_are_all_that_a_steered_model_has_more(self, model: PreTrainedModel) -> None:
        shape, hooks = shape_of(model), hooks_of(model)
        with vector(0, 2).apply(model, tokens=from_index(1)):
            for name, (attributes, number, kind, *rest) in shape_of(model).items():
                assert [name for name in attributes if name != "_steering_vectors"] == shape[name][0]
                assert issubclass(kind, shape[name][2])  # which says how it is copied
                assert kind.__name__ == shape[name][2].__name__
                assert [number, *rest] == [shape[name][1], *shape[name][3:]]
            assert hooks_of(model) != hooks

    def test_nothing_is_attached_before_the_block(self, model: PreTrainedModel) -> None:
        hooks = hooks_of(model)
        context = vector().apply(model)
        assert hooks_of(model) == hooks
        with context:
            assert hooks_of(model) != hooks

    @pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
    @pytest.mark.parametrize("way", ["apply", "patch"])
    def test_all_hooks_attach_or_none(
        self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, way: str, error: BaseException
    ) -> None:
        before = vector(1, seed=1).patch(model)
        hooks, output = hooks_of(model), logits(model)
        count, failing = 0, math.inf

        def counted(original: Any) -> Any:
            def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == failing:
                    raise error
                return original(self, *args, **kwargs)

            return register

        with monkeypatch.context() as patch:
            for name in ("register_forward_hook", "register_forward_pre_hook"):
                patch.setattr(nn.Module, name, counted(getattr(nn.Module, name)))

            def attach() -> None:
                nonlocal count
                count = 0
                if way == "apply":
                    with vector(0, 1, 2).apply(model, tokens=from_index(1)):
                        pass
                else:
                    vector(0, 1, 2).patch(model, tokens=from_index(1)).remove()

            attach()
            registrations = count
            assert registrations >= 2
            for failing in range(1, registrations + 1):  # noqa: B007
                with pytest.raises(type(error)):
                    attach()
                assert hooks_of(model) == hooks
                assert active_patches(model) == [before]
        assert torch.equal(logits(model), output)
        before.remove()

    def test_other_people_s_hooks_stay_and_see_what_was_steered(self, model: PreTrainedModel) -> None:
        block = tiny.blocks(model)[1]
        seen: dict[str, Tensor] = {}

        def look(name: str) -> Any:
            return lambda _m, _a, out: seen.__setitem__(name, (out if isinstance(out, Tensor) else out[0]).clone())

        earlier = block.register_forward_hook(look("earlier"))
        others = hooks_of(model)
        expected = recorded(model) + vector().layer_activations[1]
        with vector().apply(model):
            later = block.register_forward_hook(look("later"))
            logits(model)
        torch.testing.assert_close(seen["earlier"], expected)
        assert torch.equal(seen["earlier"], seen["later"])
        later.remove()
        assert hooks_of(model) == others
        earlier.remove()

    def test_hidden_states_of_the_model_itself_are_steered_ones(self) -> None:
        model = tiny.build("llama")
        model(IDS, output_hidden_states=True)  # in transformers 5 its capturing hooks stay from then on
        with unchanged(model), torch.no_grad(), vector().apply(model):
            states = model(IDS, output_hidden_states=True).hidden_states
            assert torch.equal(states[2], recorded(model))

    def test_a_handle_removes_its_own_steering_only(self, model: PreTrainedModel) -> None:
        a, b = vector(0, 1), vector(1, 2, seed=1)
        with b.apply(model):
            expected = logits(model)
        first, second = a.patch(model), b.patch(model)
        first.remove()
        assert torch.equal(logits(model), expected)
        second.remove()

    def test_removing_twice_does_no_harm(self, model: PreTrainedModel) -> None:
        handle, other = vector().patch(model), vector(seed=1).patch(model)
        handle.remove()
        hooks = hooks_of(model)
        handle.remove()
        assert hooks_of(model) == hooks
        other.remove()

    def test_a_handle_in_a_with_is_removed_at_its_end(self, model: PreTrainedModel) -> None:
        unsteered = logits(model)
        with vector().patch(model) as handle:
            assert isinstance(handle, SteeringPatchHandle)
            assert not torch.equal(logits(model), unsteered)
        assert torch.equal(logits(model), unsteered)
        with vector().patch(model) as handle:
            handle.remove()
            assert torch.equal(logits(model), unsteered)

    @pytest.mark.parametrize("name", ["patch", "patch_activations"])
    def test_patching_is_applying(self, model: PreTrainedModel, name: str) -> None:
        arguments: dict[str, Any] = {"operator": ablation_operator(), "multiplier": 2, "tokens": [1, 2]}
        with vector().apply(model, **arguments):
            expected = logits(model)
        with getattr(vector(), name)(model, **arguments):
            assert torch.equal(logits(model), expected)

    def test_an_error_in_the_block_passes_and_leaves_nothing(self, model: PreTrainedModel) -> None:
        unsteered = logits(model)
        with pytest.raises(ZeroDivisionError), vector().apply(model):  # noqa: PT012
            logits(model)
            _ = 1 / 0
        assert torch.equal(logits(model), unsteered)

    def test_a_block_gives_its_handle(self, model: PreTrainedModel) -> None:
        with vector().apply(model) as handle:
            assert active_patches(model) == [handle]
            handle.remove()
            assert active_patches(model) == []

    def test_a_context_that_is_never_entered_is_told_of(self, model: PreTrainedModel) -> None:
        message = r"SteeringContext\(layers=\[1\], .* was never entered, so it steered nothing: write"
        with pytest.warns(RuntimeWarning, match=message):
            vector().apply(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vector().apply(model)(logits)(model)

    def test_a_context_may_be_entered_again_and_within_itself(self, model: PreTrainedModel) -> None:
        once, twice = vector().apply(model), vector().apply(model, multiplier=2)
        with once:
            single = logits(model)
        with twice:
            double = logits(model)
        with once:
            assert torch.equal(logits(model), single)
            with once:
                torch.testing.assert_close(logits(model), double)
            assert torch.equal(logits(model), single)

    def test_a_decorated_function_is_steered_whenever_it_runs(self, model: PreTrainedModel) -> None:
        context = vector().apply(model)
        with context:
            once = logits(model)
        with vector().apply(model, multiplier=2):
            twice = logits(model)
        unsteered = logits(model)

        @context
        def steered(depth: int) -> list[Tensor]:
            """Documented."""
            here = logits(model)
            return [here, *(steered(depth - 1) if depth else []), logits(model)]

        assert torch.equal(logits(model), unsteered)
        for _ in range(2):
            outer, inner, inner_again, outer_again = steered(1)
            assert torch.equal(outer, once)
            torch.testing.assert_close(inner, twice)
            assert torch.equal(inner, inner_again)
            assert torch.equal(outer_again, once)
        assert torch.equal(logits(model), unsteered)
        assert (steered.__name__, steered.__doc__) == ("steered", "Documented.")

    def test_a_decorated_function_that_raises_leaves_nothing(self, model: PreTrainedModel) -> None:
        @vector().apply(model)
        def fail() -> None:
            raise ZeroDivisionError

        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                fail()
            assert active_patches(model) == []

    def test_arguments_are_checked_again_on_entering(self, model: PreTrainedModel) -> None:
        changing = vector()
        context = changing.apply(model)
        changing.layer_activations[1] = torch.full((tiny.HIDDEN,), math.nan)
        with pytest.raises(ValueError, match="NaN or infinite"), context:
            raise AssertionError
        assert active_patches(model) == []
        changing.layer_activations = {2: torch.ones(tiny.HIDDEN)}
        with context:
            assert active_patches(model)[0].layers == [2]

    @pytest.mark.parametrize("layers", [(-1,), (-3, 1)])
    def test_negative_layers_count_from_the_end(self, model: PreTrainedModel, layers: tuple[int, ...]) -> None:
        given = vector(*layers)
        same = SteeringVector({n % tiny.LAYERS: d for n, d in given.layer_activations.items()})
        with same.apply(model):
            expected = logits(model)
        with given.apply(model):
            assert torch.equal(logits(model), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_direction_may_be_a_row_and_of_any_dtype(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        plain = vector()
        with plain.apply(model):
            expected = logits(model)
        row = SteeringVector({1: plain.layer_activations[1].to(dtype)[None]})
        for given in (row, SteeringVector({1: plain.layer_activations[1].numpy()})):  # type: ignore[dict-item]
            with given.apply(model):
                assert torch.equal(logits(model), expected)


class TestActivePatches:
    def test_they_stand_in_the_order_in_which_they_were_entered(self, model: PreTrainedModel) -> None:
        assert active_patches(model) == []
        first = vector(2).patch(model)
        second = vector(0, 1).patch(model, multiplier=2)
        with vector(1).apply(model):
            assert len(active_patches(model)) == 3
            assert active_patches(model)[:2] == [first, second]
        first.remove()
        assert active_patches(model) == [second]
        second.remove()

    def test_what_is_attached_to_an_inner_model_is_seen_from_outside(self, model: Any) -> None:
        with vector().patch(model.model) as handle:
            assert active_patches(model) == active_patches(model.model) == [handle]
            assert active_patches(tiny.build("llama")) == []

    def test_a_handle_tells_what_it_does(self, model: PreTrainedModel) -> None:
        handle = vector(2, 0).patch(model, multiplier=np.float32(2), operator=ablation_operator(), tokens=at([1]))
        assert handle.layers == [0, 2]
        told = "SteeringPatchHandle(layers=[0, 2], multiplier=2.0, operator=ablation_operator(), tokens=at([1])"
        assert repr(handle) == f"{told})"
        handle.remove()
        assert repr(handle) == f"{told}, removed)"
        with vector().patch(model) as plain:
            assert (
                repr(plain)
                == "SteeringPatchHandle(layers=[1], multiplier=1.0, operator=addition_operator(), tokens=all)"
            )

    def test_a_learnable_multiplier_is_told_by_its_value(self, model: PreTrainedModel) -> None:
        with vector().patch(model, multiplier=torch.tensor(2.5, requires_grad=True)) as handle:
            assert "multiplier=2.5" in repr(handle)


def double(activation: Tensor, _direction: Tensor) -> Tensor:
    """h → 2h, which doesn't commute with addition."""
    return activation


class TestOrder:
    def steered(self, model: Any, by_hand: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        direction = vector().layer_activations[1]

        def steer(_m: Any, _a: Any, out: Any) -> Any:
            return by_hand(out, direction) if isinstance(out, Tensor) else (by_hand(out[0], direction), *out[1:])

        handle = tiny.blocks(model)[1].register_forward_hook(steer)
        expected = logits(model)
        handle.remove()
        return expected

    def test_several_act_in_the_order_in_which_they_were_entered(self, model: PreTrainedModel) -> None:
        doubled_last = self.steered(model, lambda h, d: 2 * (h + d))
        doubled_first = self.steered(model, lambda h, d: 2 * h + d)
        assert not torch.allclose(doubled_first, doubled_last, atol=1e-2)
        with vector().apply(model), vector().apply(model, operator=double):
            torch.testing.assert_close(logits(model), doubled_last)
        with vector().apply(model, operator=double), vector().apply(model):
            torch.testing.assert_close(logits(model), doubled_first)

    def test_it_is_the_order_of_entering_and_not_of_making(self, model: PreTrainedModel) -> None:
        expected = self.steered(model, lambda h, d: 2 * h + d)
        add, doubled = vector().apply(model), vector().apply(model, operator=double)
        with doubled, add:
            torch.testing.assert_close(logits(model), expected)

    def test_it_holds_between_patches_blocks_and_inner_models(self, model: Any) -> None:
        expected = self.steered(model, lambda h, d: 2 * (h + d) + d)
        handle = vector().patch(model.model)
        with vector().apply(model, operator=double), vector().patch(model):
            torch.testing.assert_close(logits(model), expected)
        handle.remove()

    def test_taking_one_from_the_midst_leaves_the_order_of_the_others(self, model: PreTrainedModel) -> None:
        expected = self.steered(model, lambda h, d: 2 * (h + d) + d)
        handles = [vector().patch(model, operator=operator) for operator in (None, ablation_operator(), double, None)]
        handles[1].remove()
        torch.testing.assert_close(logits(model), expected)
        for handle in handles:
            handle.remove()

    def test_an_operator_sees_what_earlier_steerings_made(self, model: PreTrainedModel) -> None:
        direction = vector().layer_activations[1]
        with vector().apply(model), vector().apply(model, operator=ablation_operator()):
            h = recorded(model)
            torch.testing.assert_close(h @ direction, torch.zeros(1, 5), atol=1e-4, rtol=0)

    def test_plus_and_minus_are_nothing(self, model: PreTrainedModel) -> None:
        unsteered = logits(model)
        with vector(0, 1, 2).apply(model), vector(0, 1, 2).apply(model, multiplier=-1):
            torch.testing.assert_close(logits(model), unsteered, atol=1e-4, rtol=1e-4)


class Pair(NamedTuple):
    hidden: Tensor
    rest: Any


PlainPair = namedtuple("PlainPair", ["hidden", "rest"])
REST = torch.tensor([5.0])
KINDS: dict[str, Any] = {
    "tensor": lambda h: h,
    "tuple": lambda h: (h, REST),
    "list": lambda h: [h, REST],
    "named tuple": lambda h: Pair(h, REST),
    "plain named tuple": lambda h: PlainPair(h, REST),
    "ModelOutput": lambda h: BaseModelOutputWithPast(last_hidden_state=h, attentions=(REST,)),
    "dict": lambda h: {"hidden": h, "rest": REST},
    "tuple in a tuple": lambda h: ((h, REST), REST),
}


def first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


class Block(nn.Module):
    """Gives ``input * scale`` in a container, and keeps what it gave."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.wrap = wrap
        self.raw: Any = None

    def forward(self, hidden: Tensor) -> Any:
        self.raw = self.wrap(hidden * self.scale)
        return self.raw


class Toy(nn.Module):
    """Blocks of width 4 over embeddings given outright; ``skipped`` blocks don't run; keeps the blocks' outputs."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda h: h, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(wrap) for _ in range(layers))
        self.skipped: set[int] = set()
        self.seen: list[Any] = []

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        self.seen = []
        for number, block in enumerate(self.blocks):
            if number not in self.skipped:
                self.seen.append(block(inputs_embeds))
                inputs_embeds = first(self.seen[-1])
        return inputs_embeds


EMBEDS = torch.arange(1.0, 25.0).reshape(2, 3, 4)
TOY_DIRECTION = torch.tensor([1.0, -2.0, 3.0, -4.0])


def run_toy(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(EMBEDS)
    return out


def toy_vector(*layers: int) -> SteeringVector:
    return SteeringVector(dict.fromkeys(layers or (0,), TOY_DIRECTION))


TOY_CONFIG: Any = {"decoder_block": "blocks.{num}"}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal down to the sign of zero and the kind of NaN."""
    return left.dtype == right.dtype and torch.equal(left.view(BITS[left.dtype]), right.view(BITS[right.dtype]))


class TestOutputs:
    @pytest.mark.parametrize("tokens", [None, from_index(1)], ids=shown)
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_activation_changes_and_its_container_stays(self, kind: str, tokens: Any) -> None:
        toy = Toy(KINDS[kind])
        with unchanged(toy, run_toy):
            with toy_vector().apply(toy, TOY_CONFIG, tokens=tokens):
                run_toy(toy)
            expected = EMBEDS.clone()
            expected[:, 0 if tokens is None else 1 :] += TOY_DIRECTION
            steered, raw = toy.seen[0], toy.blocks[0].raw
            assert type(steered) is type(raw)
            assert torch.equal(first(steered), expected)
            assert torch.equal(toy.seen[1] if kind == "tensor" else first(toy.seen[1]), expected)
            if kind in ("tuple", "list", "named tuple", "plain named tuple"):
                assert steered[1] is REST
            if kind == "ModelOutput":
                assert steered.attentions[0] is REST
                assert steered.last_hidden_state is steered[0] is steered["last_hidden_state"]
            if kind == "dict":
                assert steered["rest"] is REST

    @pytest.mark.parametrize("operator", OPERATORS, ids=shown)
    @pytest.mark.parametrize("tokens", [None, from_index(1), lambda p: torch.full(p.index.shape, 0.5)], ids=shown)
    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_is_changed_in_place(self, kind: str, tokens: Any, operator: Any) -> None:
        toy = Toy(KINDS[kind])
        with toy_vector(0, 1).apply(toy, TOY_CONFIG, operator, tokens=tokens):
            run_toy(toy)
        raw = [block.raw for block in toy.blocks]
        assert torch.equal(first(raw[0]), EMBEDS)
        assert torch.equal(first(raw[1]), first(toy.seen[0]))
        assert not torch.equal(first(toy.seen[0]), EMBEDS)

    def test_the_raw_output_of_a_real_block_stays(self, model: PreTrainedModel) -> None:
        raw: list[Tensor] = []
        with vector().apply(model, tokens=[1, 2]):
            # Put before ours, so it sees what the block itself gave.
            spy = tiny.blocks(model)[1].register_forward_hook(lambda _m, _a, out: raw.append(first(out)), prepend=True)
            steered = recorded(model)
        spy.remove()
        assert torch.equal(raw[0], recorded(model))
        assert not torch.equal(raw[0], steered)

    def test_a_layer_that_gives_no_tensor_is_an_error(self) -> None:
        toy = Toy(lambda h: {"steps": 3, "hidden": h})
        toy.blocks[0].wrap = lambda _h: None
        with (
            pytest.raises(TypeError, match="a layer's output must be a tensor or begin with one, got NoneType"),
            toy_vector().apply(toy, TOY_CONFIG),
        ):
            run_toy(toy)

    @pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"])
    @pytest.mark.parametrize("tokens", [None, from_index(1)], ids=shown)
    @pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
    def test_the_parts_of_a_block_keep_their_output_s_shape(
        self, architecture: str, tokens: Any, layer_type: Any
    ) -> None:
        model = tiny.shared(architecture)
        with unchanged(model):
            plain = recorded(model, layer_type=layer_type)
            steering = vector(layer_type=layer_type)
            with steering.apply(model, tokens=tokens):
                steered = recorded(model, layer_type=layer_type)
            assert steered.shape == plain.shape
            change = (steered - plain).reshape(5, -1)
            torch.testing.assert_close(change[1:], steering.layer_activations[1].expand(4, -1), atol=1e-5, rtol=1e-5)


class TestDtype:
    @pytest.mark.parametrize("operator", OPERATORS, ids=shown)
    @pytest.mark.parametrize("tokens", [None, [1, 2], lambda p: p.index * 0.5], ids=shown)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_stream_keeps_its_dtype(self, dtype: torch.dtype, tokens: Any, operator: Any) -> None:
        model = half(dtype)
        with unchanged(model):
            plain = recorded(model)
            with vector().apply(model, operator=operator, tokens=tokens):
                steered = recorded(model)
                assert logits(model).dtype is dtype
            assert steered.dtype is dtype
            if operator is None and tokens is None:
                assert same_bits(steered, plain + vector().layer_activations[1].to(dtype))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_learned_direction_of_float32_does_not_widen_the_stream(self, dtype: torch.dtype) -> None:
        model = half(dtype)
        direction = vector().layer_activations[1].requires_grad_()
        with unchanged(model), SteeringVector({1: direction}).apply(model):
            assert recorded(model).dtype is dtype
            model(IDS).logits.float().sum().backward()
        assert direction.grad is not None
        assert direction.grad.dtype is torch.float32
        model.zero_grad()

    def test_an_operator_that_gives_float32_does_not_widen_the_stream(self) -> None:
        model = half(torch.bfloat16)
        with unchanged(model), vector().apply(model, operator=lambda h, d: (h.float() + d.float()) / 2):
            assert recorded(model).dtype is torch.bfloat16

    def test_a_direction_that_overflows_in_the_model_s_dtype_is_an_error(self) -> None:
        model = half(torch.float16)
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"layer 1: .* too large for the model's torch.float16"),
            vector(scale=1e6).apply(model),
        ):
            logits(model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    @pytest.mark.parametrize("multiplier", [2.0, [2.0], torch.tensor(2.0, requires_grad=True)], ids=shown)
    def test_an_operator_gets_the_direction_in_float32_or_wider(self, dtype: torch.dtype, multiplier: Any) -> None:
        seen: list[tuple[torch.dtype, Tensor]] = []

        def look(activation: Tensor, direction: Tensor) -> Tensor:
            seen.append((activation.dtype, direction))
            return direction

        with vector().apply(half(dtype), operator=look, multiplier=multiplier):
            logits(half(dtype))
        ((of_activation, direction),) = seen
        assert of_activation is dtype
        assert direction.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert torch.equal(direction.flatten(), 2 * vector().layer_activations[1].to(direction.dtype))

    def test_only_a_change_that_overflows_is_refused_and_not_the_direction(self) -> None:
        model, large = half(torch.float16), vector(scale=1e6)
        with vector().apply(model, operator=lambda h, d: d / d.norm()):
            expected = recorded(model)
        with large.apply(model, operator=lambda h, d: d / d.norm()):
            torch.testing.assert_close(recorded(model), expected)
        for tokens in (None, [1], weights_of(0.0, 1.0, 0.0, 0.0, 0.0)):
            with large.apply(model, tokens=tokens), pytest.raises(ValueError, match="layer 1: the change is too large"):
                logits(model)
        with large.apply(model, tokens=weights_of(0.0, 1e-6, 0.0, 0.0, 0.0)):  # the weight brings it back
            assert bool(recorded(model).isfinite().all())

    @pytest.mark.parametrize("learned", [False, True])
    def test_a_change_that_overflows_is_refused_though_the_direction_fits(self, learned: bool) -> None:
        steering = SteeringVector({1: vector().layer_activations[1].clone().requires_grad_(learned)})
        with (
            steering.apply(half(torch.float16), operator=lambda h, d: 1e6 * d),
            pytest.raises(ValueError, match=r"layer 1: the change is too large for the model's torch.float16"),
        ):
            logits(half(torch.float16))

    def test_what_overflows_at_tokens_that_are_not_steered_is_none(self) -> None:
        model = half(torch.float16)
        plain = recorded(model)
        with vector(scale=1e6).apply(model, multiplier=[0.0]):
            assert same_bits(recorded(model), plain)
        with vector(scale=1e6).apply(model, operator=only_first_token, tokens=from_index(1)):
            assert same_bits(recorded(model), plain)

    @pytest.mark.parametrize(
        "operator",
        [
            lambda h, d: -(h @ d.mT) * d,
            lambda h, d: torch.nn.functional.linear(h, d[0, 0]),
            lambda h, d: torch.einsum("bsh,h->bs", h, d.flatten())[..., None] * d,
            lambda h, d: h.add_(d.double()).mul_(0) @ d.mT,
        ],
        ids=["matmul", "linear", "einsum", "in place"],
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_an_operator_that_mixes_dtypes_is_told_what_to_write(self, dtype: torch.dtype, operator: Any) -> None:
        with (
            vector().apply(half(dtype), operator=operator),
            pytest.raises(
                TypeError, match=r"mixes dtypes.* Write h @ d\.to\(h\.dtype\), or h\.float\(\) @ d"
            ) as caught,
        ):
            logits(half(dtype))
        assert isinstance(caught.value.__cause__, RuntimeError)

    def test_other_errors_of_an_operator_are_its_own(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            with (
                vector().apply(half(dtype), operator=lambda h, d: h @ d[..., 1:].to(h.dtype).mT),
                pytest.raises(RuntimeError, match="size|shape"),
            ):
                logits(half(dtype))

    def test_a_product_that_only_the_vector_s_dtype_can_not_hold_is_none(self, model: PreTrainedModel) -> None:
        wide = SteeringVector({1: torch.full((tiny.HIDDEN,), 300.0)})
        with wide.apply(model, multiplier=300):
            expected = logits(model)
        with wide.to(torch.float16).apply(model, multiplier=300):
            assert torch.equal(logits(model), expected)

    def test_one_steering_serves_a_model_whose_dtype_changes(self) -> None:
        model = tiny.build("llama")
        with vector().apply(model):
            for dtype in (torch.float32, torch.bfloat16, torch.float32):
                assert recorded(model.to(dtype)).dtype is dtype

    def test_under_autocast_the_stream_keeps_its_dtype(self, model: PreTrainedModel) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = recorded(model)
            with vector().apply(model, operator=ablation_operator()):
                assert recorded(model).dtype is plain.dtype


HALF: dict[torch.dtype, PreTrainedModel] = {}


def only_first_token(activation: Tensor, direction: Tensor) -> Tensor:
    return direction * (torch.arange(activation.shape[1]) == 0)[:, None]


def half(dtype: torch.dtype) -> PreTrainedModel:
    if dtype not in HALF:
        HALF[dtype] = tiny.build("llama").to(dtype)
    return HALF[dtype]


def by_hand(activation: Tensor, direction: Tensor, operator: Any) -> Tensor:
    cases = {case.make(): case for case in families.OPERATORS.values()}
    return cases[operator or addition_operator()].by_hand(activation, direction)


class TestGradients:
    def loss(self, model: Any) -> Tensor:
        out: Tensor = model(IDS).logits.square().mean()
        return out

    @pytest.mark.parametrize("operator", OPERATORS, ids=shown)
    def test_they_are_those_of_a_model_steered_by_hand(self, model: Any, operator: Any) -> None:
        direction = vector().layer_activations[1].requires_grad_()
        weight = tiny.blocks(model)[0].mlp.up_proj.weight
        with SteeringVector({1: direction}).apply(model, operator=operator, multiplier=2):
            steered = torch.autograd.grad(self.loss(model), [direction, weight])

        def steer(_m: Any, _a: Any, out: Any) -> Any:
            changed = by_hand(first(out), 2 * direction, operator)
            return changed if isinstance(out, Tensor) else (changed, *out[1:])

        handle = tiny.blocks(model)[1].register_forward_hook(steer)
        expected = torch.autograd.grad(self.loss(model), [direction, weight])
        handle.remove()
        for got, wanted in zip(steered, expected):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-3)

    @pytest.mark.parametrize("operator", OPERATORS, ids=shown)
    @pytest.mark.parametrize("tokens", [None, [1]], ids=shown)
    def test_a_direction_is_read_anew_after_each_step_of_an_optimizer(
        self, model: PreTrainedModel, tokens: Any, operator: Any
    ) -> None:
        trained = SteeringVector({1: vector().layer_activations[1].requires_grad_()})
        optimizer = torch.optim.SGD([trained.layer_activations[1]], lr=50.0)
        before = []
        with trained.apply(model, operator=operator, tokens=tokens):
            for _ in range(3):
                optimizer.zero_grad()
                loss = self.loss(model)
                loss.backward()
                before.append(logits(model))
                optimizer.step()
            after = logits(model)
        for parameter in model.parameters():
            parameter.grad = None
        fresh = SteeringVector({1: trained.layer_activations[1].detach()})
        with fresh.apply(model, operator=operator, tokens=tokens):
            torch.testing.assert_close(after, logits(model), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before[0], after, atol=1e-4)

    def test_they_flow_to_a_direction_of_zeros(self, model: PreTrainedModel) -> None:
        direction = torch.zeros(tiny.HIDDEN, requires_grad=True)
        unsteered = logits(model)
        for operator in (None, addition_operator(), ablation_then_addition_operator()):
            with SteeringVector({1: direction}).apply(model, operator=operator):
                assert torch.equal(logits(model), unsteered)
                (gradient,) = torch.autograd.grad(self.loss(model), direction)
            assert gradient.isfinite().all()
            assert gradient.norm() > 0

    @pytest.mark.parametrize("operator", [ablation_operator(), ablation_then_addition_operator()], ids=shown)
    def test_they_are_finite_at_a_direction_of_zeros_under_ablation(
        self, model: PreTrainedModel, operator: Any
    ) -> None:
        direction = torch.zeros(tiny.HIDDEN, requires_grad=True)
        with SteeringVector({1: direction}).apply(model, operator=operator):
            gradients = torch.autograd.grad(self.loss(model), [direction, *model.parameters()], allow_unused=True)
        assert all(g.isfinite().all() for g in gradients if g is not None)

    @pytest.mark.parametrize("operator", OPERATORS, ids=shown)
    @pytest.mark.parametrize("value", [2.0, -0.5])
    def test_they_flow_to_a_multiplier(self, model: PreTrainedModel, value: float, operator: Any) -> None:
        multiplier = torch.tensor(value, requires_grad=True)
        with vector().apply(model, multiplier=multiplier, operator=operator):
            (gradient,) = torch.autograd.grad(self.loss(model), multiplier)
            steered = logits(model)
        with vector().apply(model, multiplier=value, operator=operator):
            torch.testing.assert_close(steered, logits(model))
        direction = vector().layer_activations[1].requires_grad_()
        with SteeringVector({1: direction}).apply(model, multiplier=value, operator=operator):
            (along,) = torch.autograd.grad(self.loss(model), direction)
        # d loss / d multiplier = (d loss / d direction) · direction / multiplier
        torch.testing.assert_close(gradient, along @ direction.detach() / value, atol=1e-5, rtol=1e-3)

    @pytest.mark.parametrize("operator", [None, addition_operator()], ids=shown)
    def test_they_flow_to_a_multiplier_that_begins_at_zero(self, model: PreTrainedModel, operator: Any) -> None:
        multiplier = torch.tensor(0.0, requires_grad=True)
        with vector().apply(model, multiplier=multiplier, operator=operator):
            (gradient,) = torch.autograd.grad(self.loss(model), multiplier)
        assert gradient.isfinite()
        assert gradient != 0

    def test_a_multiplier_is_read_anew_in_each_pass(self, model: PreTrainedModel) -> None:
        multiplier = torch.tensor(1.0, requires_grad=True)
        with vector().apply(model, multiplier=2):
            expected = logits(model)
        with vector().apply(model, multiplier=multiplier):
            logits(model)
            with torch.no_grad():
                multiplier.fill_(2.0)
            torch.testing.assert_close(logits(model), expected)

    def test_inference_mode_works(self, model: PreTrainedModel) -> None:
        with vector().apply(model):
            expected = logits(model)
            with torch.inference_mode():
                assert torch.equal(model(IDS).logits, expected)

    @pytest.mark.parametrize(
        "operator", [None, ablation_operator(), lambda h, d: h * d], ids=["None", "ablation", "any"]
    )
    @pytest.mark.parametrize("when", ["attached", "first run"])
    def test_what_began_in_inference_mode_may_be_differentiated_later(
        self, model: PreTrainedModel, when: str, operator: Any
    ) -> None:
        with torch.inference_mode(mode=when == "attached"):
            handle = vector().patch(model, operator=operator, tokens=[1, 2])
        if when == "first run":
            with torch.inference_mode():
                model(IDS)
        with handle:
            gradients = torch.autograd.grad(self.loss(model), list(model.parameters()))
        assert all(g.isfinite().all() for g in gradients)

    @pytest.mark.parametrize("layer_type", ["decoder_block", "mlp"])
    @pytest.mark.parametrize("tokens", [None, from_index(1)], ids=shown)
    def test_recomputed_activations_are_steered_as_the_first_time_or_refused(
        self, tokens: Any, layer_type: Any
    ) -> None:
        model: Any = tiny.build("llama").train()
        block, runs = tiny.blocks(model)[1], []
        block.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
        gradients = []
        for enable in (None, "gradient" if tiny.ON_TRANSFORMERS_4 else "activation"):
            if enable is not None:
                getattr(model, f"{enable}_checkpointing_enable")()
            model.zero_grad()
            with vector(scale=3.0, layer_type=layer_type).apply(model, tokens=tokens):
                loss = model(IDS, use_cache=False).logits.square().mean()
                loss.backward()
            gradients.append(block.mlp.up_proj.weight.grad)
        assert len(runs) == 3  # the second time it ran again for the backward pass
        torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-3)


def nothing_but_nan(activation: Tensor, _direction: Tensor) -> Tensor:
    return torch.full_like(activation, math.nan)


def of_negative_zeros() -> Toy:
    toy = Toy()
    with torch.no_grad():
        toy.blocks[0].scale.copy_(torch.tensor([0.0, -0.0, 1.0, 0.0]))
    return toy


class TestMultiplier:
    @pytest.mark.parametrize(
        "multiplier",
        [
            2,
            2.0,
            np.float32(2),
            np.float64(2),
            np.int64(2),
            np.array(2.0),
            torch.tensor(2),
            torch.tensor(2.0),
            torch.tensor(2.0, dtype=torch.float64),
            torch.tensor(2.0, requires_grad=True),
            nn.Parameter(torch.tensor(2.0)),
        ],
        ids=shown,
    )
    def test_any_one_number_will_do(self, model: PreTrainedModel, multiplier: Any) -> None:
        doubled = SteeringVector({1: 2 * vector().layer_activations[1]})
        with doubled.apply(model):
            expected = logits(model)
        with vector().apply(model, multiplier=multiplier):
            torch.testing.assert_close(logits(model), expected)

    @pytest.mark.parametrize("operator", [*OPERATORS, double, nothing_but_nan], ids=shown)
    @pytest.mark.parametrize("tokens", [None, from_index(1), lambda p: torch.full(p.index.shape, 0.5)], ids=shown)
    @pytest.mark.parametrize(
        "multiplier",
        [0, 0.0, -0.0, np.float32(0), torch.tensor(0.0), torch.tensor(0), torch.tensor(0.0, requires_grad=True)],
        ids=shown,
    )
    def test_zero_changes_nothing_bit_for_bit_under_any_operator(
        self, multiplier: Any, tokens: Any, operator: Any
    ) -> None:
        toy = of_negative_zeros()
        plain = run_toy(toy)
        assert plain.signbit().any()
        with toy_vector(0, 1).apply(toy, TOY_CONFIG, operator, multiplier, tokens=tokens):
            assert same_bits(run_toy(toy), plain)

    def test_it_is_told_by_the_multiplier_and_not_by_the_direction(self) -> None:
        toy = Toy()
        zero = SteeringVector({0: torch.zeros(4)})
        with zero.apply(toy, TOY_CONFIG, operator=double):
            assert torch.equal(run_toy(toy), 2 * EMBEDS)

    @pytest.mark.parametrize("operator", OPERATORS, ids=shown)
    def test_a_direction_of_zeros_changes_nothing_under_every_operator_we_ship(
        self, model: PreTrainedModel, operator: Any
    ) -> None:
        unsteered = logits(model)
        with SteeringVector({1: torch.zeros(tiny.HIDDEN)}).apply(model, operator=operator):
            assert torch.equal(logits(model), unsteered)

    def test_it_scales_the_direction_before_the_operator_sees_it(self) -> None:
        toy, seen = Toy(), []

        def look(activation: Tensor, direction: Tensor) -> Tensor:
            seen.append(direction)
            return torch.zeros_like(activation)

        with toy_vector().apply(toy, TOY_CONFIG, look, -3):
            run_toy(toy)
        assert torch.equal(seen[0].flatten(), -3 * TOY_DIRECTION)
        torch.broadcast_to(seen[0], EMBEDS.shape)

    @pytest.mark.parametrize("multiplier", [0.25, -7, 1e-6])
    def test_ablation_ignores_it_unless_it_is_zero(self, model: PreTrainedModel, multiplier: float) -> None:
        with vector().apply(model, operator=ablation_operator()):
            expected = logits(model)
        with vector().apply(model, operator=ablation_operator(), multiplier=multiplier):
            torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def weights_of(*numbers: float, dtype: torch.dtype = torch.float32, learned: bool = False) -> Callable[[Any], Tensor]:
    weights = torch.tensor(numbers, dtype=dtype, requires_grad=learned)
    return lambda positions: weights.expand(positions.index.shape)


class TestWeights:
    @pytest.mark.parametrize("operator", OPERATORS, ids=shown)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_a_weight_scales_the_change(self, operator: Any, dtype: torch.dtype) -> None:
        toy = Toy(layers=1)
        with toy_vector().apply(toy, TOY_CONFIG, operator):
            whole = run_toy(toy) - EMBEDS
        weights = (-1.0, 0.5, 2.0)
        with toy_vector().apply(toy, TOY_CONFIG, operator, tokens=weights_of(*weights, dtype=dtype)):
            steered = run_toy(toy)
        expected = EMBEDS + torch.tensor(weights)[:, None] * whole
        torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-5)

    def test_whole_numbers_are_weights(self) -> None:
        toy = Toy(layers=1)
        with toy_vector().apply(toy, TOY_CONFIG, tokens=lambda p: torch.tensor([0, 1, 2]).expand(p.index.shape)):
            assert torch.equal(run_toy(toy), EMBEDS + torch.tensor([0.0, 1.0, 2.0])[:, None] * TOY_DIRECTION)

    @pytest.mark.parametrize("operator", [*OPERATORS, double, nothing_but_nan], ids=shown)
    @pytest.mark.parametrize(
        "tokens",
        [[1], torch.tensor([0, 1]), weights_of(0.0, 2.0, -0.0), weights_of(0.0, 2.0, -0.0, learned=True)],
        ids=["list", "mask", "weights", "learned weights"],
    )
    def test_tokens_that_are_left_out_stay_bit_for_bit(self, tokens: Any, operator: Any) -> None:
        toy = of_negative_zeros()
        plain = run_toy(toy)
        assert plain[:, [0, 2]].signbit().any()
        with toy_vector().apply(toy, TOY_CONFIG, operator, tokens=tokens):
            steered = run_toy(toy)
        assert same_bits(steered[:, [0, 2]].contiguous(), plain[:, [0, 2]].contiguous())
        assert not torch.equal(steered[:, 1], plain[:, 1])

    def test_gradients_flow_to_learnable_weights(self) -> None:
        toy, weights = Toy(layers=1), torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
        with toy_vector().apply(toy, TOY_CONFIG, tokens=lambda p: weights.expand(p.index.shape)):
            toy(EMBEDS).sum().backward()
        assert weights.grad is not None
        torch.testing.assert_close(weights.grad, torch.full((3,), 2 * TOY_DIRECTION.sum()))

    @pytest.mark.filterwarnings("ignore:the model ran, but .* selected none")
    @pytest.mark.parametrize("tokens_are_learned", [False, True])
    @pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.0, -1.5, 1.0]], ids=shown)
    @pytest.mark.parametrize("multiplier_is_learned", [False, True])
    @pytest.mark.parametrize("multiplier", [[2.0], [0.0], [0.0, 3.0], [0.0, 0.0]], ids=shown)
    def test_zeros_that_are_learned_and_zeros_that_stay_have_the_gradients_of_a_product_by_hand(
        self, multiplier: Any, multiplier_is_learned: bool, weights: Any, tokens_are_learned: bool
    ) -> None:
        found = []
        for is_by_hand in (True, False):
            direction, embeds = TOY_DIRECTION.clone().requires_grad_(), EMBEDS.clone().requires_grad_()
            numbers = torch.tensor(multiplier, requires_grad=multiplier_is_learned)
            gate = torch.tensor(weights, requires_grad=tokens_are_learned)
            if is_by_hand:
                steered = embeds + numbers[:, None, None] * gate[:, None] * direction
            else:
                context: Any = SteeringVector({0: direction}).apply(
                    toy := Toy(layers=1),
                    TOY_CONFIG,
                    multiplier=numbers if len(multiplier) > 1 else numbers[0],
                    tokens=lambda p, gate=gate: gate.expand(p.index.shape),
                )
                with context:
                    steered = toy(embeds)
            steered.square().sum().backward()
            leaves = (direction, embeds, numbers, gate)
            found.append([steered, *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)])
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_a_selector_without_gradients_runs_once_a_pass_and_one_with_them_for_each_layer(self) -> None:
        for learned, expected in ((False, 1), (True, 2)):
            calls: list[int] = []
            weights = torch.ones(3, requires_grad=learned)

            def select(positions: Any, weights: Tensor = weights, calls: list[int] = calls) -> Tensor:
                calls.append(1)
                return weights.expand(positions.index.shape)

            toy = Toy()
            with toy_vector(0, 1).apply(toy, TOY_CONFIG, tokens=select):
                run_toy(toy)
            assert len(calls) == expected

    def test_a_learned_gate_that_is_still_closed_is_no_silent_nothing(self) -> None:
        with toy_vector().apply(toy := Toy(), TOY_CONFIG, tokens=weights_of(0.0, 0.0, 0.0, learned=True)):
            run_toy(toy)


PROMPT, SHORT = [21, 22, 23, 24, 25, 26, 27], [31, 32, 33]


def steered_without_cache(model: Any, inputs: dict[str, Tensor], is_steered: Tensor, **kwargs: Any) -> Tensor:
    """By hand: whole rows in each pass, columns beyond ``is_steered (rows, columns)`` as its last one."""

    def steer(_m: Any, _a: Any, out: Any) -> Any:
        activation = first(out)
        rows = is_steered.repeat_interleave(activation.shape[0] // len(is_steered), dim=0)
        column = torch.arange(activation.shape[1]).clamp(max=is_steered.shape[1] - 1)
        change = 3 * vector().layer_activations[1] * rows[:, column, None]
        return activation + change if isinstance(out, Tensor) else (activation + change, *out[1:])

    handle = tiny.blocks(model)[1].register_forward_hook(steer)
    try:
        return answer(model, inputs, use_cache=False, **kwargs)
    finally:
        handle.remove()


class TestGenerate:
    """Masks by column, older names, and rows that stand for one prompt; the laws hold every selector against padding."""

    inputs = padded(PROMPT, SHORT)

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("rows", [1, 2])
    @pytest.mark.parametrize("width", [4, 7, 9])
    def test_a_mask_is_by_column_of_the_whole_row_and_steers_nothing_beyond(
        self, model: PreTrainedModel, width: int, rows: int, use_cache: bool
    ) -> None:
        mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1, 0, 1, 1]])[:rows, :width]
        expected = steered_without_cache(model, self.inputs, nn.functional.pad(mask, (0, 1)))
        for given in (mask, mask.bool(), mask[0]) if rows == 1 else (mask,):
            with vector().apply(model, multiplier=3, tokens=given):
                assert torch.equal(answer(model, self.inputs, use_cache=use_cache), expected)

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=shown)
    @pytest.mark.parametrize("select", [generated, prompted, lambda i: i["attention_mask"] * 1], ids=shown)
    def test_rows_of_a_selector_serve_all_answers_to_their_prompt(
        self, model: PreTrainedModel, select: Any, options: dict[str, Any], use_cache: bool
    ) -> None:
        mask = self.inputs["attention_mask"]
        is_steered = {
            generated: torch.tensor([[0] * 6 + [1]]).expand(2, 7),
            prompted: torch.cat([mask[:, :-1], torch.zeros(2, 1, dtype=torch.int64)], dim=1),
        }.get(select, nn.functional.pad(mask, (0, 1)))
        expected = steered_without_cache(model, self.inputs, is_steered, **options)
        with vector().apply(model, multiplier=3, tokens=select(self.inputs)):
            assert torch.equal(answer(model, self.inputs, use_cache=use_cache, **options), expected)

    def test_several_samples_of_each_prompt_are_steered_as_without_a_cache(self, model: PreTrainedModel) -> None:
        options = {"do_sample": True, "num_return_sequences": 3}
        torch.manual_seed(0)
        is_steered = torch.tensor([[0] * 6 + [1]]).expand(2, 7)
        expected = steered_without_cache(model, self.inputs, is_steered, **options)
        with vector().apply(model, multiplier=3, tokens=generated(self.inputs)):
            torch.manual_seed(0)
            assert torch.equal(answer(model, self.inputs, **options), expected)

    def test_older_names_and_tokens_are_one(self, model: PreTrainedModel) -> None:
        pairs: list[tuple[dict[str, Any], Any]] = [
            ({"min_token_index": 2}, from_index(2)),
            ({"min_token_index": 0}, from_index(0)),
            ({"min_token_index": -1}, slice(-1, None)),
            ({"token_indices": [1, 3]}, [1, 3]),
            ({"token_indices": slice(1, 4)}, slice(1, 4)),
            ({"token_indices": torch.tensor([0, 1, 1])}, torch.tensor([0, 1, 1])),
            ({"token_indices": at([2])}, at([2])),
        ]
        for old, tokens in pairs:
            with vector().apply(model, multiplier=3, tokens=tokens):
                expected = answer(model, self.inputs)
            with vector().apply(model, multiplier=3, **old):
                assert torch.equal(answer(model, self.inputs), expected)

    @pytest.mark.parametrize(
        "selection", [{"min_token_index": -1}, {"token_indices": [-1]}, {"tokens": slice(-1, None)}]
    )
    def test_minus_one_is_the_last_column_of_each_pass(self, model: PreTrainedModel, selection: dict[str, Any]) -> None:
        inputs = padded(PROMPT)
        expected = steered_without_cache(model, inputs, torch.tensor([[0] * 6 + [1]]))
        with vector().apply(model, multiplier=3, **selection):
            assert torch.equal(answer(model, inputs), expected)

    @pytest.mark.parametrize("cut", [1, 3, 6])
    def test_a_prompt_fed_in_pieces_is_steered_as_a_whole(self, model: PreTrainedModel, cut: int) -> None:
        inputs = padded(PROMPT, SHORT)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for tokens in (generated(inputs), prompted(inputs), from_index(2), [0, 5], slice(1, None, 2), mask * 1):
            with vector().apply(model, multiplier=3, tokens=tokens):
                expected = logits(model, ids, attention_mask=mask)[:, -1]
                with torch.no_grad():
                    head = model(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True)
                    tail = model(ids[:, cut:], attention_mask=mask, **{CACHE: getattr(head, CACHE)}).logits[:, -1]
            torch.testing.assert_close(tail, expected, atol=1e-4, rtol=1e-4)

    def test_a_prompt_whose_beginning_is_cached_already_is_steered_from_where_it_goes_on(self, model: Any) -> None:
        inputs = padded(PROMPT)
        begun = {"input_ids": torch.tensor([PROMPT[:4]]), "use_cache": True}
        cases: list[tuple[Any, list[int]]] = [  # by column, the last one for all beyond
            (generated(inputs), [0, 0, 0, 0, 0, 0, 1]),
            (prompted(inputs), [0, 0, 0, 0, 1, 1, 0]),
            (from_index(5), [0, 0, 0, 0, 0, 1]),
            ([5, 8], [0, 0, 0, 0, 0, 1, 0, 0, 1, 0]),
            (torch.tensor([0, 0, 0, 0, 1]), [0, 0, 0, 0, 1, 0]),
        ]
        for tokens, is_steered in cases:
            with torch.no_grad():
                cache = getattr(model(**begun), CACHE)
            expected = steered_without_cache(model, inputs, torch.tensor([is_steered]))
            with vector().apply(model, multiplier=3, tokens=tokens):
                assert torch.equal(answer(model, inputs, **{CACHE: cache}), expected)

    def test_a_prompt_of_embeddings_is_steered_as_one_of_ids(self, model: PreTrainedModel) -> None:
        embeds = model.get_input_embeddings()(self.inputs["input_ids"]).detach()
        mask = self.inputs["attention_mask"]
        for tokens in (generated(self.inputs), generated(), from_index(2)):
            with vector().apply(model, multiplier=3, tokens=tokens):
                expected = answer(model, self.inputs)
                given = {"inputs_embeds": embeds, "attention_mask": mask}
                got: Any = model.generate(**given, max_new_tokens=4, do_sample=False)
            assert torch.equal(got, expected)

    def test_a_pipeline_is_steered_by_generated_without_inputs(self, model: PreTrainedModel) -> None:
        tokenizer = tiny.tokenizer(padding_side="left")
        run = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        texts, options = ["Hello there", "Hi"], {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
        with vector().apply(model, multiplier=3, tokens=generated()):
            alone = [run(text, **options)[0]["generated_text"] for text in texts]
            together = [answers[0]["generated_text"] for answers in run(texts, batch_size=2, **options)]
        expected = []
        for text in texts:
            inputs = padded(tokenizer(text)["input_ids"])
            with vector().apply(model, multiplier=3, tokens=generated(inputs)):
                expected.append(tokenizer.decode(answer(model, inputs)[0]))
        assert alone == together == expected

    def test_assisted_decoding_is_steered_as_plain_decoding(self, model: PreTrainedModel) -> None:
        inputs = padded(PROMPT)
        assistant = tiny.build("llama", num_hidden_layers=1)
        with vector().apply(model, multiplier=3, tokens=generated(inputs)):
            expected = answer(model, inputs)
            assert torch.equal(answer(model, inputs, assistant_model=assistant), expected)

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="prompt lookup of transformers 4.46 needs an end of sequence")
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "qwen3"])
    def test_prompt_lookup_is_steered_as_plain_decoding(self, architecture: str) -> None:
        model, inputs = tiny.shared(architecture), padded([11, 12, 13, 14, 11, 12, 13])
        for tokens in (generated(inputs), prompted(inputs), from_index(2), [1, 8]):
            with vector().apply(model, multiplier=3, tokens=tokens):
                expected = answer(model, inputs, use_cache=False)
                assert torch.equal(answer(model, inputs, prompt_lookup_num_tokens=3), expected)

    # Gemma 3 of transformers 4 makes a cache that generate doesn't take again.
    @pytest.mark.parametrize(
        "architecture", ["gpt2", "llama", "mistral", *([] if tiny.ON_TRANSFORMERS_4 else ["gemma3"])]
    )
    def test_turns_of_a_chat_on_one_cache_are_steered_as_without(self, architecture: str) -> None:
        """Each turn's answer, and of the earlier ones what was steered then."""
        model, ids, cache, by_hand = tiny.shared(architecture), list(PROMPT), {}, []
        uncached: list[int] = list(PROMPT)
        for turn in ([], [61, 62, 63], [71]):
            ids, uncached = [*ids, *turn], [*uncached, *turn]
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            with vector().apply(model, multiplier=3, tokens=generated(inputs)):
                out: Any = model.generate(  # type: ignore[operator]
                    **inputs, **cache, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
                )
            cache = {CACHE: getattr(out, CACHE)}
            ids = out.sequences[0].tolist()
            by_hand.append((len(uncached) - 1, len(uncached) + 2))  # from the prompt's last token to the last one run
            steered = [place for first, last in by_hand for place in range(first, last)]
            for _ in range(3):
                with vector().apply(model, multiplier=3, tokens=[p for p in steered if p < len(uncached)]):
                    uncached.append(int(logits(model, torch.tensor([uncached]), use_cache=False)[0, -1].argmax()))
            assert ids == uncached


class TestPromptUnknown:
    @pytest.mark.parametrize("selector", [generated(), prompted(), completion()], ids=shown)
    def test_uncached_generation_raises_and_asks_for_inputs(self, model: PreTrainedModel, selector: Any) -> None:
        with (
            pytest.raises(ValueError, match=r"can't tell where the prompt ends.*\(inputs\)"),
            vector().apply(model, tokens=selector),
        ):
            answer(model, padded(PROMPT), use_cache=False)

    @pytest.mark.parametrize("selector", [generated(), prompted(), completion()], ids=shown)
    def test_several_tokens_on_a_cache_that_is_not_empty_raise(self, model: PreTrainedModel, selector: Any) -> None:
        with (  # noqa: PT012
            pytest.raises(ValueError, match="can't tell where the prompt ends"),
            vector().apply(model, tokens=selector),
        ):
            head = model(IDS, use_cache=True)
            model(IDS[:, :2], **{CACHE: getattr(head, CACHE)})

    def test_long_lived_patches_take_each_cache_s_first_pass_as_the_prompt(self, model: PreTrainedModel) -> None:
        with vector().patch(model, multiplier=3, tokens=generated()):
            answers = [answer(model, padded(prompt)) for prompt in (PROMPT, SHORT)]
        for prompt, got in zip((PROMPT, SHORT), answers):
            with vector().apply(model, multiplier=3, tokens=generated(len(prompt))):
                assert torch.equal(got, answer(model, padded(prompt)))


class TestLeftOver:
    """``generated(inputs)`` of one prompt, used for another."""

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("select", [generated, prompted])
    def test_the_first_pass_over_another_prompt_raises(
        self, model: PreTrainedModel, select: Any, use_cache: bool
    ) -> None:
        other = padded([*PROMPT[:-1], 99])
        passes: list[int] = []
        count = model.register_forward_pre_hook(lambda *_: passes.append(1))
        with (
            pytest.raises(ValueError, match="made for another prompt than the one that the model now runs on"),
            vector().apply(model, tokens=select(padded(PROMPT))),
        ):
            answer(model, other, use_cache=use_cache)
        count.remove()
        assert len(passes) == 1

    def test_the_first_pass_over_another_prompt_raises_under_a_static_cache(self) -> None:
        model = tiny.build("llama")  # generate keeps the cache on it
        for _ in range(2):  # the second time it finds the first one's cache
            with vector().apply(model, tokens=generated(padded(PROMPT))):
                answer(model, padded(PROMPT), cache_implementation="static")
            with (
                pytest.raises(ValueError, match="made for another prompt than the one that the model now runs on"),
                vector().apply(model, tokens=generated(padded(PROMPT))),
            ):
                answer(model, padded([*PROMPT[:-1], 99]), cache_implementation="static")

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_continuing_does_not_raise(self, model: PreTrainedModel, use_cache: bool) -> None:
        inputs = padded(PROMPT, SHORT)
        with vector().apply(model, multiplier=3, tokens=generated(inputs)):
            once = answer(model, inputs, use_cache=use_cache)
            # The answer so far goes in again: it still begins with the prompt.
            longer = {
                "input_ids": torch.cat([inputs["input_ids"], once], dim=1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(once)], dim=1),
            }
            answer(model, longer, use_cache=use_cache)

    def test_a_second_turn_on_the_same_cache_does_not_raise(self, model: PreTrainedModel) -> None:
        inputs = padded(PROMPT)
        with torch.no_grad(), vector().apply(model, tokens=generated(inputs)):
            cache = getattr(model(**inputs, use_cache=True), CACHE)
            model(torch.tensor([[99, 98]]), **{CACHE: cache})

    def test_without_token_ids_nothing_is_compared(self, model: PreTrainedModel) -> None:
        with vector().apply(model, tokens=generated({"attention_mask": padded(PROMPT)["attention_mask"]})):
            answer(model, padded(PROMPT[::-1]))


@pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="Llama of transformers 4 doesn't run on the meta device")
class TestDeviceReads:
    """On the meta device any read raises, so what runs there reads nothing."""

    class LeaveError(Exception):
        """Leaves a block without the one read at its end."""

    @pytest.fixture
    def on_meta(self) -> PreTrainedModel:
        return tiny.build("llama", attn_implementation="eager").to("meta")  # sdpa itself reads a static cache's length

    @pytest.mark.parametrize(
        "tokens",
        [None, from_index(1), from_index([1]), at([2]), [1, -1], slice(1, None, 2), torch.tensor([1, 0, 1]), generated(3),
         generated(), lambda p: p.index * 0.5],
        ids=shown,
    )  # fmt: skip
    @pytest.mark.parametrize("operator", [None, ablation_then_addition_operator()], ids=shown)
    def test_no_pass_reads_the_device(self, on_meta: PreTrainedModel, operator: Any, tokens: Any) -> None:
        ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
        with (  # noqa: PT012
            pytest.raises(self.LeaveError),
            vector(0, 1).apply(on_meta, operator=operator, multiplier=2, tokens=tokens),
        ):
            cache = getattr(on_meta(ids, use_cache=True), CACHE)
            on_meta(ids[:, :1], **{CACHE: cache})
            raise self.LeaveError

    @pytest.mark.parametrize("tokens", [from_index(1), at([2]), [1], generated(3)], ids=shown)
    def test_a_static_cache_s_length_is_not_read(self, on_meta: PreTrainedModel, tokens: Any) -> None:
        ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
        cache = StaticCache(config=on_meta.config, max_cache_len=20)
        with pytest.raises(self.LeaveError), vector().apply(on_meta, tokens=tokens):  # noqa: PT012
            for seq in (4, 1, 2):
                on_meta(ids[:, :seq], **{CACHE: cache})
            raise self.LeaveError

    def test_decoding_with_inputs_does_not_compare(self, on_meta: PreTrainedModel) -> None:
        inputs = padded(PROMPT)
        ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
        cache = getattr(on_meta(ids, use_cache=True), CACHE)
        with pytest.raises(self.LeaveError), vector().apply(on_meta, tokens=generated(inputs)):  # noqa: PT012
            on_meta(ids[:, :1], **{CACHE: cache})
            raise self.LeaveError


class TestNoSilentNothing:
    def test_layers_that_never_ran_are_named(self) -> None:
        toy = Toy(layers=4)
        toy.skipped = {1, 3}
        with (
            pytest.warns(RuntimeWarning, match=r"steered layers \[0, 1, 3\] these never did: \[1, 3\]") as caught,
            toy_vector(0, 1, 3).apply(toy, TOY_CONFIG),
        ):
            run_toy(toy)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert active_patches(toy) == []

    def test_a_layer_that_ran_in_one_of_the_passes_is_enough(self) -> None:
        toy = Toy()
        with toy_vector(0, 1).apply(toy, TOY_CONFIG):
            toy.skipped = {1}
            run_toy(toy)
            toy.skipped = {0}
            run_toy(toy)

    @pytest.mark.parametrize(
        "tokens",
        [at([50]), from_index(50), [], torch.zeros(3), lambda p: p.index * 0.0, lambda p: p.index < 0, generated(50)],
        ids=shown,
    )
    @pytest.mark.parametrize("multiplier", [1.0, 0.0])
    def test_a_selection_of_no_token_is_told_with_the_layers(
        self, model: PreTrainedModel, tokens: Any, multiplier: float
    ) -> None:
        unsteered = logits(model)
        with (
            pytest.warns(
                RuntimeWarning, match=r"selected none of its tokens: layers \[0, 2\] were not steered"
            ) as caught,
            vector(0, 2).apply(model, tokens=tokens, multiplier=multiplier),
        ):
            assert torch.equal(logits(model), unsteered)
        assert len(caught) == 1
        assert caught[0].filename == __file__

    def test_a_token_in_one_of_the_passes_is_enough(self, model: PreTrainedModel) -> None:
        with vector().apply(model, tokens=at([3])):
            logits(model, IDS[:, :2])
            logits(model, IDS)
            logits(model, IDS[:, :2])

    def test_removing_tells_it_once(self, model: PreTrainedModel) -> None:
        handle = vector().patch(model, tokens=at([50]))
        logits(model)
        with pytest.warns(RuntimeWarning, match="selected none") as caught:
            handle.remove()
        assert caught[0].filename == __file__
        handle.remove()

    def test_each_entering_is_told_for_itself(self, model: PreTrainedModel) -> None:
        context = vector().apply(model, tokens=at([3]))
        with context:
            logits(model)
        with pytest.warns(RuntimeWarning, match="selected none"), context:
            logits(model, IDS[:, :2])

    def test_a_block_without_a_pass_is_told_of(self, model: PreTrainedModel) -> None:
        message = "the model did not run inside the block, so nothing was steered"
        with pytest.warns(RuntimeWarning, match=message), vector().apply(model, tokens=at([50])):
            pass

    def test_a_handle_that_is_removed_before_a_pass_is_not_told_of(self, model: PreTrainedModel) -> None:
        vector().patch(model, tokens=at([50])).remove()

    def test_under_an_exception_nothing_is_told(self, model: PreTrainedModel) -> None:
        with pytest.raises(ZeroDivisionError), vector().apply(model, tokens=at([50])):  # noqa: PT012
            logits(model)
            _ = 1 / 0
        with pytest.raises(ZeroDivisionError), vector().patch(model, tokens=at([50])):  # noqa: PT012
            logits(model)
            _ = 1 / 0
        handle = vector().patch(model, tokens=at([50]))
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            try:
                logits(model)
                _ = 1 / 0
            finally:
                handle.remove()

    def test_a_pass_that_raised_is_none(self) -> None:
        toy = Toy()
        with toy_vector(0, 1).apply(toy, TOY_CONFIG), pytest.raises(RuntimeError, match="size"):
            toy(torch.ones(2, 3, 5))

    def test_a_multiplier_of_zero_is_no_silent_nothing(self, model: PreTrainedModel) -> None:
        with vector().apply(model, multiplier=0), vector().apply(model, multiplier=0, tokens=[1]):
            logits(model)

    def test_where_the_warning_is_an_error_the_model_is_restored(self, model: PreTrainedModel) -> None:
        with pytest.raises(RuntimeWarning), warnings.catch_warnings():  # noqa: PT012
            warnings.simplefilter("error")
            with vector().apply(model, tokens=at([50])):
                logits(model)
        assert active_patches(model) == []

    def test_a_decorated_function_tells_it_too(self, model: PreTrainedModel) -> None:
        run = vector().apply(model, tokens=at([50]))(logits)
        with pytest.warns(RuntimeWarning, match="selected none"):
            run(model)

    def test_a_pass_of_the_inner_model_alone_counts(self, model: Any) -> None:
        with pytest.warns(RuntimeWarning, match="selected none"), vector().apply(model, tokens=at([50])):
            model.model(IDS)

    def test_a_selection_that_no_generated_token_reached_is_told(self, model: PreTrainedModel) -> None:
        with pytest.warns(RuntimeWarning, match="selected none"), vector().apply(model, tokens=from_index(40)):
            answer(model, padded(PROMPT))


class TestThreads:
    @pytest.mark.filterwarnings("ignore:.*a thread other than the one that attached:RuntimeWarning")
    def test_two_batches_at_once_are_steered_by_their_own_positions(self, model: PreTrainedModel) -> None:
        batches = [padded(PROMPT, SHORT), padded([41, 42, 43, 44])]
        lengths = [[7, 3], [4]]
        selector_of = {2: generated(lengths[0]), 1: generated(lengths[1])}

        def by_batch(positions: Any) -> Tensor:
            return selector_of[positions.index.shape[0]](positions)

        def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return model(**inputs).logits, answer(model, inputs)

        barrier = threading.Barrier(2)

        def meet(*_: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                try:
                    barrier.wait(timeout=0.5)  # both are in the midst of a pass
                except threading.BrokenBarrierError:
                    barrier.reset()

        hooks = [block.register_forward_hook(meet) for block in tiny.blocks(model)[:2]]
        got: list[Any] = [None, None]

        def work(number: int) -> None:
            try:
                got[number] = run(batches[number])
            except BaseException as error:
                got[number] = error

        with vector(0, 1, 2).apply(model, multiplier=3, tokens=by_batch):
            expected = [run(inputs) for inputs in batches]
            threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=30)
        for hook in hooks:
            hook.remove()
        for result, (expected_logits, expected_answer) in zip(got, expected):
            assert isinstance(result, tuple), result
            assert torch.equal(result[0], expected_logits)
            assert torch.equal(result[1], expected_answer)

    @pytest.mark.parametrize("this_thread_only", [False, True])
    @pytest.mark.filterwarnings("ignore:.*a thread other than the one that attached:RuntimeWarning")
    def test_one_context_may_be_entered_by_several_threads(
        self, model: PreTrainedModel, this_thread_only: bool
    ) -> None:
        context = vector().apply(model, tokens=from_index(1), this_thread_only=this_thread_only)
        inside = threading.Barrier(2, timeout=20)
        errors: list[BaseException] = []

        def work() -> None:
            try:
                with context:
                    inside.wait()
                    logits(model)
                    inside.wait()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not errors


class TestInterrupted:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
    @pytest.mark.parametrize("place", ["pre-hook of the model", "block 0", "block 2"])
    def test_a_pass_that_broke_off_leaves_no_trace_in_the_next(
        self, model: PreTrainedModel, place: str, error: BaseException
    ) -> None:
        inputs = padded(SHORT)
        tokens: Any = lambda p: p.index % 2 == 1  # noqa: E731
        with vector(0, 1, 2).apply(model, multiplier=3, tokens=tokens):
            expected, expected_logits = answer(model, inputs), logits(model, torch.tensor([SHORT]))

        def fail(*_: Any) -> None:
            raise error

        with vector(0, 1, 2).apply(model, multiplier=3, tokens=tokens):
            if place == "block 0":
                broken = tiny.blocks(model)[0].register_forward_hook(fail)
            elif place == "block 2":
                broken = tiny.blocks(model)[2].register_forward_pre_hook(fail)
            else:
                broken = model.register_forward_pre_hook(fail)
            with pytest.raises(type(error)):
                answer(model, padded(PROMPT, SHORT))
            broken.remove()
            assert torch.equal(answer(model, inputs), expected)
            assert torch.equal(logits(model, torch.tensor([SHORT])), expected_logits)


class TestCopies:
    def test_a_state_dict_taken_within_a_block_is_the_model_s(self, model: PreTrainedModel) -> None:
        before = model.state_dict()
        with vector().apply(model):
            within = model.state_dict()
        assert list(before) == list(within)
        assert all(torch.equal(before[name], within[name]) for name in before)

    @pytest.mark.parametrize("end", ["attached", "removed", "block"])
    @pytest.mark.parametrize("tokens", [None, generated()], ids=shown)
    def test_steering_does_not_keep_a_deleted_model_alive(self, tokens: Any, end: str) -> None:
        model = tiny.build("llama")
        if end == "block":
            with vector().apply(model, tokens=tokens):
                answer(model, padded(PROMPT))
        else:
            handle = vector().patch(model, tokens=tokens)
            answer(model, padded(PROMPT))
            if end == "removed":
                handle.remove()
            del handle
        references = [weakref.ref(model), *map(weakref.ref, tiny.blocks(model))]
        del model
        gc.collect()
        assert [reference() for reference in references] == [None] * len(references)


class TestWrappersAndInnerModels:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
    @pytest.mark.parametrize("tokens", [None, generated(padded(PROMPT))], ids=shown)
    def test_an_inner_model_s_steering_acts_in_its_own_and_in_the_outer_model_s_passes(
        self, architecture: str, tokens: Any
    ) -> None:
        model: Any = tiny.shared(architecture)
        with unchanged(model):
            with vector().apply(model, multiplier=3, tokens=tokens):
                expected, expected_state = answer(model, padded(PROMPT)), model.base_model(torch.tensor([PROMPT]))[0]
            with vector().apply(model.base_model, multiplier=3, tokens=tokens):
                assert torch.equal(answer(model, padded(PROMPT)), expected)
                assert torch.equal(model.base_model(torch.tensor([PROMPT]))[0], expected_state)
            assert not torch.equal(model.base_model(torch.tensor([PROMPT]))[0], expected_state)

    @pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore:.*deprecated.*:FutureWarning")
    def test_lora_is_steered_as_its_merged_model(self) -> None:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(tiny.build("llama"), config).eval()
        inputs = padded(PROMPT, SHORT)
        answer(wrapped, inputs)  # notes a few things on the model
        for tokens in (None, generated(inputs), from_index(2), [1, 4]):
            merged = copy.deepcopy(wrapped).merge_and_unload()
            with vector(scale=2.0).apply(merged, tokens=tokens):
                expected, expected_logits = answer(merged, inputs), logits(merged, **inputs)
            with unchanged(wrapped), vector(scale=2.0).apply(wrapped, tokens=tokens):
                assert torch.equal(answer(wrapped, inputs), expected)
                torch.testing.assert_close(logits(wrapped, **inputs), expected_logits, atol=1e-4, rtol=1e-4)
                assert len(active_patches(wrapped)) == len(active_patches(wrapped.base_model.model)) == 1

    @pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore:.*deprecated.*:FutureWarning")
    @pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
    def test_prompt_learning_takes_no_selection_of_tokens(self, kind: str) -> None:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
        wrapped = peft.get_peft_model(tiny.build("llama"), config).eval()
        with unchanged(wrapped):
            plain = recorded(wrapped)
            for tokens in (from_index(3), generated(3), [1]):
                with pytest.raises(ValueError, match="virtual tokens before the prompt's own"):
                    vector().apply(wrapped, tokens=tokens)
            with vector().apply(wrapped):
                assert (recorded(wrapped) != plain).any(dim=-1).all()


class TestPassesThatDeceive:
    def test_labels_alone_make_the_decoder_s_row_and_the_encoder_s_mask_is_not_its_own(self) -> None:
        config = T5Config(
            vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
        seq2seq = T5ForConditionalGeneration(config).eval()
        ids = torch.tensor([[0, 0, 5, 6, 7, 8]])
        inputs = {"attention_mask": (ids != 0).long(), "labels": torch.tensor([[9, 8, 7, 6, 5, 4]])}
        plain = recorded_with(seq2seq, ids, **inputs)
        with vector().apply(seq2seq, tokens=from_index(1)):
            steered = recorded_with(seq2seq, ids, **inputs)
        assert (steered != plain).any(dim=-1).tolist() == [[False] + [True] * 5]

    def test_a_mask_as_long_as_a_static_cache_counts_from_its_first_column(self, model: PreTrainedModel) -> None:
        columns = 12
        mask = torch.ones(1, columns, dtype=torch.long)
        cache = StaticCache(config=model.config, max_cache_len=columns, **OLD_CACHE_ARGUMENTS)
        seen: list[list[int]] = []

        def note(positions: TokenPositions) -> Tensor:
            seen.extend(positions.index.tolist())
            return positions.index >= 0

        with vector().apply(model, tokens=note), torch.no_grad():
            model(torch.tensor([PROMPT[:4]]), attention_mask=mask, **{CACHE: cache}, **at_columns(0, 4))
            for column in (4, 5):
                model(torch.tensor([[9]]), attention_mask=mask, **{CACHE: cache}, **at_columns(column, 1))
        assert seen == [[0, 1, 2, 3], [4], [5]]

    def test_a_row_of_many_prompts_is_refused_but_for_all_tokens(self, model: PreTrainedModel) -> None:
        packed = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 2, 5])}
        with vector().apply(model), torch.no_grad():
            model(torch.tensor([PROMPT[:5]]), **packed)
        with (
            vector().apply(model, tokens=from_index(1)),
            torch.no_grad(),
            pytest.raises(ValueError, match="many prompts in one row"),
        ):
            model(torch.tensor([PROMPT[:5]]), **packed)

    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_xlnet_takes_no_selection(self, batch: int) -> None:
        xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=320, d_model=32, n_layer=3, n_head=4, d_inner=48)).eval()
        ids = torch.arange(5 * batch).reshape(batch, 5)
        with vector().apply(xlnet):
            logits(xlnet, ids)
        with pytest.raises(ValueError, match="can't locate the tokens in XLNetLMHeadModel"):
            vector().apply(xlnet, tokens=from_index(1))
        with pytest.raises(ValueError, match="takes some of a row's tokens again"):
            extract_activations(xlnet, tiny.tokenizer(), [("a", "b")])

    def test_a_loop_by_hand_over_the_model_s_own_cache_is_a_generation(self, model: PreTrainedModel) -> None:
        seen: list[list[bool]] = []
        selector = generated()

        def note(positions: TokenPositions) -> Tensor:
            mask = selector(positions)
            seen.extend(mask.tolist())
            return mask

        with vector().apply(model, tokens=note), torch.no_grad():
            out = model(torch.tensor([PROMPT[:3]]), use_cache=True)
            model(torch.tensor([[9]]), **{CACHE: out[CACHE]})
        assert seen == [[False, False, True], [True]]


def recorded_with(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    with record_activations(model, layers=1) as records, torch.no_grad():
        model(input_ids=ids, **kwargs)
    return records[1][0]


OLD_CACHE_ARGUMENTS: dict[str, Any] = {
    name: 1 for name in ("batch_size", "max_batch_size") if name in inspect.signature(StaticCache.__init__).parameters
}


def at_columns(first: int, count: int) -> dict[str, Tensor]:
    """The columns that transformers 4 must be told."""
    return {"cache_position": torch.arange(first, first + count)} if tiny.ON_TRANSFORMERS_4 else {}


class TestDecoratedFunctions:
    def test_that_run_after_they_return_are_refused(self, model: PreTrainedModel) -> None:
        def yields() -> Any:
            yield 1

        async def waits() -> None: ...

        for function in (yields, waits):
            with pytest.raises(TypeError, match="is a generator or a coroutine"):
                vector().apply(model)(function)


@pytest.fixture(scope="module")
def paligemma() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {"model_type": "gemma", "vocab_size": 320, "num_hidden_layers": 3, "head_dim": 8, "pad_token_id": 0}
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = PaliGemmaConfig(
        text_config={**sizes, **text, "num_key_value_heads": 2},
        vision_config={**sizes, **vision, "projection_dim": 32, "vision_use_head": False},
        image_token_index=300,
        projection_dim=32,
    )
    model = PaliGemmaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


class TestPrefixLanguageModels:
    """PaliGemma counts positions from one, and its prompt's tokens see each other."""

    @pytest.mark.parametrize("masked", [True, False])
    @pytest.mark.parametrize("way", ["generate", "read", "train"])
    def test_tokens_are_counted_from_zero(self, paligemma: Any, way: str, masked: bool) -> None:
        seen: list[Any] = []
        inputs = {
            "input_ids": torch.tensor([[300, 300, 300, 300, 11, 12, 13]]),
            "pixel_values": torch.ones(1, 3, 16, 16),
            **({"attention_mask": torch.ones(1, 7, dtype=torch.int64)} if masked else {}),
        }

        def look(positions: Any) -> Tensor:
            seen.append(positions.index.tolist())
            return from_index(1)(positions)

        with vector().apply(paligemma, tokens=look), torch.no_grad():
            if way == "generate":
                paligemma.generate(**inputs, max_new_tokens=3, do_sample=False)
            elif way == "read":
                paligemma(**inputs, token_type_ids=torch.zeros(1, 7, dtype=torch.int64))
            else:
                types = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
                paligemma(**inputs, token_type_ids=types, labels=inputs["input_ids"])
        assert seen == [[list(range(7))], [[7]], [[8]]][: 3 if way == "generate" else 1]

    def test_token_ids_that_only_the_outer_model_is_given_are_compared(self, paligemma: Any) -> None:
        ids = torch.tensor([[300, 300, 300, 300, 11, 12, 13]])
        other = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
        other["input_ids"][0, -1] = 14
        with (
            pytest.raises(ValueError, match="made for another prompt"),
            vector().apply(paligemma, tokens=generated(other)),
        ):
            paligemma.generate(input_ids=ids, pixel_values=torch.ones(1, 3, 16, 16), max_new_tokens=2, do_sample=False)


class TestUnchangedScripts:
    def test_activations_extracted_within_a_block_are_steered_ones(self, model: PreTrainedModel) -> None:
        pairs = [("good", "good"), ("a longer text", "a longer text")]
        tokenizer = tiny.tokenizer()
        plain = extract_activations(model, tokenizer, pairs, layers=[1])
        with vector().apply(model):
            steered = extract_activations(model, tokenizer, pairs, layers=[1])
        for before, after in zip(plain, steered):
            for old, new in zip(before[1], after[1]):
                torch.testing.assert_close(new, old + vector().layer_activations[1], atol=1e-5, rtol=1e-5)

    def test_a_loop_over_multipliers_by_keyword(self, model: PreTrainedModel) -> None:
        plain = recorded(model)
        for multiplier in range(-2, 3):
            with vector().apply(
                model=model,
                layer_config=None,
                operator=None,
                multiplier=multiplier,
                min_token_index=0,
                token_indices=None,
            ):
                steered = recorded(model)
            expected = plain + multiplier * vector().layer_activations[1]
            torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)

    def test_handles_kept_in_a_list_and_removed_later(self, model: PreTrainedModel) -> None:
        handles = [vector(layer).patch_activations(model) for layer in range(tiny.LAYERS)]
        with vector(0, 1, 2).apply(model, multiplier=-1):
            pass
        assert len(active_patches(model)) == tiny.LAYERS
        for handle in handles:
            handle.remove()


def test_a_removed_handle_can_not_be_entered_again(model: PreTrainedModel) -> None:
    handle = vector().patch(model)
    handle.remove()
    with pytest.raises(RuntimeError, match="this steering was removed"), handle:
        pass
