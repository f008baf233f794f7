"""Ablation of a direction wherever the stream is written, against hooks that name what writes to it."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_vectors import ablate_everywhere, active_patches, from_index, generated, record_activations
from steering_vectors._models.activations import input_of
from steering_vectors._steering import stream_parts
from steering_vectors._steering.stream_parts import written_parts
from steering_vectors.ablation import stream_writers
from tests import tiny
from tests.ablated_by_hand import DIRECTION, UNIT, WRITTEN, ablated_by_hand, without
from tests.test_laws import generate
from tests.test_steering import answer, first, hooks_of, logits, padded, unchanged, vector

INPUTS = padded([11, 12, 13, 14, 15], [21, 22])

PARTS = ("embeddings", "self_attn", "mlp")
# Where the stream is read in the midst of a block.
READ_BETWEEN = {
    "gpt2": "ln_2",
    "llama": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "bloom": "post_attention_layernorm",
    "mpt": "norm_2",
    "opt": "final_layer_norm",
    "mistral": "post_attention_layernorm",
}


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name in WRITTEN])
class TestEachPart:
    def test_is_ablated_as_by_hand(self, architecture: str) -> None:
        dtype = torch.float32 if architecture in ("mixtral", "mpt") else torch.float64  # they run in no wider one
        model = tiny.build(architecture).to(dtype)
        with ablated_by_hand(model, architecture):
            expected = logits(model)
        with unchanged(model), ablate_everywhere(model, DIRECTION.to(dtype)):
            got = logits(model)
        close = 1e-6 if dtype is torch.float64 else 1e-4
        torch.testing.assert_close(got, expected, atol=close, rtol=close)
        assert not torch.allclose(got, logits(model), atol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_found_in_every_dtype(self, architecture: str, dtype: torch.dtype) -> None:
        blocks = tiny.blocks(model := tiny.build(architecture).to(dtype))
        for block, parts in zip(blocks, written_parts(model, blocks), strict=True):
            names = {name for name, module in block.named_modules() if module in parts}
            written = WRITTEN[architecture]
            # A dropout behind a part stands for it.
            assert len(names) in (1, len(written))
            assert all(name in written or "dropout" in name for name in names), names

    def test_generation_is_ablated_with_a_cache_and_without(self, architecture: str) -> None:
        if architecture in tiny.IGNORE_PADDING:
            pytest.skip("the model itself takes padding for tokens")
        model = tiny.shared(architecture)
        with ablated_by_hand(model, architecture):
            expected = answer(model, INPUTS)
        with ablate_everywhere(model, DIRECTION):
            assert torch.equal(answer(model, INPUTS), expected)
            assert torch.equal(answer(model, INPUTS, use_cache=False), expected)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_nothing_is_left_along_the_direction_in_any_block_s_input_and_output(architecture: str) -> None:
    model, inputs = tiny.shared(architecture), []
    with ablate_everywhere(model, DIRECTION), record_activations(model) as outputs:
        handles = [
            block.register_forward_pre_hook(
                lambda _m, args, kwargs: inputs.append(input_of(args, kwargs)), with_kwargs=True
            )
            for block in tiny.blocks(model)
        ]
        logits(model)
        for handle in handles:
            handle.remove()
    for activation in [*inputs, *(part for parts in outputs.values() for part in parts)]:
        assert float((activation @ UNIT).abs().max()) < 1e-5


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name in READ_BETWEEN])
def test_nothing_is_left_in_the_midst_of_a_block(architecture: str) -> None:
    model, seen = tiny.shared(architecture), []
    norms = [block.get_submodule(READ_BETWEEN[architecture]) for block in tiny.blocks(model)]
    with ablate_everywhere(model, DIRECTION):
        handles = [norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for norm in norms]
        logits(model)
        for handle in handles:
            handle.remove()
    assert len(seen) == len(norms)
    for activation in seen:
        assert float((activation @ UNIT).abs().max()) < 1e-5


def test_blocks_that_end_in_a_norm_are_ablated_at_their_output() -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    blocks = list(model.transformer.h)
    assert written_parts(model, blocks) == [{block: None} for block in blocks]
    with ablate_everywhere(model, DIRECTION), record_activations(model) as outputs, torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert all(float((part[0] @ UNIT).abs().max()) < 1e-5 for part in outputs.values())


@pytest.mark.parametrize("factor", [-1.0, 1e-6, 1e6])
def test_length_and_sign_of_the_direction_do_nothing(factor: float) -> None:
    model = tiny.shared("llama")
    with ablate_everywhere(model, DIRECTION):
        expected = logits(model)
    with ablate_everywhere(model, (factor * DIRECTION).reshape(1, -1)):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


SEVERAL = torch.randn(3, tiny.HIDDEN, generator=torch.Generator().manual_seed(5))
# Of rank 3, with rows of other lengths, a combination of two rows, and zeros.
DEPENDENT = torch.stack([SEVERAL[0], SEVERAL[1] * 1e-9, SEVERAL[0] - 2 * SEVERAL[2], 0 * SEVERAL[0], SEVERAL[2] * 1e6])


def without_span(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """By the pseudoinverse, in float64."""
    exact = torch.nn.functional.normalize(rows.double(), dim=1)
    projector = torch.linalg.pinv(exact, rtol=1e-5) @ exact
    return lambda activation: (activation.double() - activation.double() @ projector).to(activation.dtype)


@pytest.mark.parametrize("rows", [SEVERAL, DEPENDENT, DIRECTION.expand(2, -1)], ids=["several", "dependent", "same"])
@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name in WRITTEN])
def test_the_span_of_several_directions_is_removed_as_by_hand(architecture: str, rows: Tensor) -> None:
    model = tiny.shared(architecture)
    with ablated_by_hand(model, architecture, lambda layer: without_span(rows)):
        expected = logits(model)
    with unchanged(model), ablate_everywhere(model, rows):
        torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(expected, logits(model), atol=1e-2)


def test_tokens_at_the_end_of_float16_do_not_hide_what_writes() -> None:
    """Some models have a first token of 20,000; random numbers as large as that, added twice, are more than 65,504."""
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, ::2] = 2e4
    model = model.half()
    # Attention and the MLP of each block: the modules, or their last projections, which write the same.
    assert [sorted(parts.values()) for parts in stream_writers(model).values()] == 3 * [["mlp", "self_attn"]]
    with ablate_everywhere(model, torch.ones(tiny.HIDDEN)), torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_direction_and_its_multiple_are_one_in_half_precision_too(dtype: torch.dtype) -> None:
    model = tiny.shared("llama")
    with ablate_everywhere(model, DIRECTION.to(dtype)):
        expected = logits(model)
    with ablate_everywhere(model, torch.stack([DIRECTION.to(dtype), (3 * DIRECTION).to(dtype)])) as handle:
        torch.testing.assert_close(logits(model), expected, atol=1e-2, rtol=1e-2)
        assert len(handle._changes) == 10  # three blocks, two parts of each, and the input


@contextmanager
def ablated_by_part(
    model: nn.Module,
    architecture: str,
    strength: Callable[[int, str], float],
    removing: Callable[[Tensor], Tensor] = without,
) -> Iterator[None]:
    """What is written keeps ``1 - strength`` of its part along the direction; blocks' outputs stay as they are."""

    def change(activation: Tensor, layer: int, part: str) -> Tensor:
        return activation + strength(layer, part) * (removing(activation) - activation)

    def after(output: Any, layer: int, part: str) -> Any:
        activation = change(first(output), layer, part)
        return activation if isinstance(output, Tensor) else (activation, *output[1:])

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0], 0, "embeddings"), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"], 0, "embeddings")}

    blocks = tiny.blocks(model)  # type: ignore[arg-type]
    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    for layer, block in enumerate(blocks):
        for part, path in zip(("self_attn", "mlp"), WRITTEN[architecture], strict=False):
            handles.append(
                block.get_submodule(path).register_forward_hook(
                    lambda _m, _a, output, layer=layer, part=part: after(output, layer, part)
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rising(layer: int, part: str) -> float:
    return {"embeddings": 0.3, "self_attn": 0.5, "mlp": -0.4}[part] * (layer + 1)


# What is passed → the same as a function of layer and part.
STRENGTHS: dict[str, tuple[Any, Callable[[int, str], float]]] = {
    "a number": (0.6, lambda _layer, _part: 0.6),
    "a number above 1": (torch.tensor(1.5), lambda _layer, _part: 1.5),
    "parts": ({"self_attn": 1.0, "mlp": 0.5}, lambda _l, part: {"self_attn": 1.0, "mlp": 0.5, "embeddings": 0}[part]),
    "the embeddings": ({"embeddings": 1}, lambda _layer, part: float(part == "embeddings")),
    "layers": ({0: 0.25, -1: 2.0}, lambda layer, part: {0: 0.25, 1: 0.0}.get(layer, 2.0)),
    "one layer at 1": ({1: 1.0}, lambda layer, _part: float(layer == 1)),
    "a function": (rising, rising),
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name in WRITTEN])
def test_a_strength_removes_that_share_of_what_is_written(architecture: str, strength: str) -> None:
    if architecture == "gpt_neo" and strength == "layers":
        pytest.skip("it has other layers")
    model, (given, by_part) = tiny.shared(architecture), STRENGTHS[strength]
    for direction, removing in ((DIRECTION, without), (SEVERAL, without_span(SEVERAL))):
        with ablated_by_part(model, architecture, by_part, removing):
            expected = logits(model)
        with unchanged(model), ablate_everywhere(model, direction, strength=given):
            got = logits(model)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
        assert not torch.allclose(got, logits(model), atol=1e-3)


@pytest.mark.parametrize("strength", ["a number", "parts", "a function"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "mamba"])
def test_a_strength_holds_by_token_and_by_row_with_a_cache_and_without(architecture: str, strength: str) -> None:
    model, inputs = tiny.shared(architecture), padded([11, 12, 13, 14, 15], [11, 12, 13, 14, 15])
    given, by_part = STRENGTHS[strength]

    def from_the_last(activation: Tensor) -> Tensor:
        return torch.cat([activation[:, :4], without(activation[:, 4:])], dim=1)

    _, plain = generate(model, inputs)
    with ablated_by_part(model, architecture, by_part, from_the_last):
        answers, expected = generate(model, inputs, use_cache=False)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with ablate_everywhere(model, DIRECTION, tokens=generated(inputs), rows=[False, True], strength=given):
        for use_cache in (True, False):
            got, made = generate(model, inputs, use_cache=use_cache)
            torch.testing.assert_close(made[0], plain[0], atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(made[1], expected[1], atol=2e-4, rtol=1e-3)
            assert torch.equal(got[1], answers[1])


def test_a_strength_is_that_of_weights_without_that_share_of_the_direction() -> None:
    model, twin = tiny.build("llama").double(), tiny.build("llama").double()
    unit = DIRECTION.double() / DIRECTION.double().norm()
    with torch.no_grad():
        embeddings: Any = twin.get_input_embeddings().weight
        embeddings -= 0.7 * (embeddings @ unit)[:, None] * unit
        for block in tiny.blocks(twin):
            for path, strength in (("self_attn.o_proj", 0.7), ("mlp.down_proj", 1.3)):
                weight: Any = block.get_submodule(path).weight
                weight -= strength * torch.outer(unit, unit @ weight)
    strengths = {"embeddings": 0.7, "self_attn": 0.7, "mlp": 1.3}
    with ablate_everywhere(model, DIRECTION.double(), strength=strengths):
        torch.testing.assert_close(logits(model), logits(twin))


@pytest.mark.parametrize("strength", [1, 1.0, {0: 1, 1: 1, 2: 1}, lambda layer, part: 1, dict.fromkeys(PARTS, 1.0)])
def test_strength_1_everywhere_is_no_strength_at_all(strength: Any) -> None:
    model = tiny.shared("llama")
    with ablate_everywhere(model, DIRECTION):
        expected = logits(model)
    with ablate_everywhere(model, DIRECTION, strength=strength):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("strength", [0, {1: 0.0}, lambda layer, part: 0.0])
def test_strength_0_is_unsteered_bit_for_bit(strength: Any) -> None:
    model = tiny.shared("llama")
    plain = logits(model)
    with ablate_everywhere(model, DIRECTION, strength=strength):
        assert torch.equal(logits(model), plain)


def test_a_strength_goes_with_directions_by_layer() -> None:
    model, given = tiny.shared("llama"), {1: DIRECTION, 2: DIRECTION}
    with ablated_by_part(model, "llama", lambda layer, part: 0.5 * (layer == 1) + (layer == 2 and part == "mlp")):
        expected = logits(model)
    strengths = {(1, "self_attn"): 0.5, (1, "mlp"): 0.5, (2, "mlp"): 1.0}
    with ablate_everywhere(model, given, strength=lambda layer, part: strengths.get((layer, part), 0.0)) as handle:
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        assert handle.layers == [1, 2]


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        ("strong", TypeError, "strength must be a number, got 'strong'"),
        ([0.5, 0.5], TypeError, "strength must be a number, got list"),
        (float("nan"), ValueError, "strength must be finite, got nan"),
        ({}, ValueError, "strength is empty: give one number at least"),
        ({"mlp": "much"}, TypeError, "the strength of 'mlp' must be a number, got 'much'"),
        ({"attention": 1.0}, ValueError, "strength has no part 'attention': the parts are 'embeddings', 'self_attn', "),
        (
            {"mlp": 1.0, 2: 0.5},
            TypeError,
            r"must map layers or parts to numbers, not both, got \['mlp', 2\]: for both,",
        ),
        ({7: 1.0}, ValueError, "layer 7 does not exist: the model has 3 layers"),
        ({1.5: 1.0}, TypeError, "a layer must be a whole number"),
        ({2: 1.0, -1: 0.5}, ValueError, r"strength has one layer twice, among \[2, -1\]"),
        (lambda layer, part: None, TypeError, r"strength\(0, 'embeddings'\) must be a number, got NoneType"),
    ],
)
def test_a_strength_that_is_none_is_refused_at_the_call(strength: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ablate_everywhere(tiny.shared("llama"), DIRECTION, strength=strength)


def test_a_strength_of_parts_that_are_not_found_is_refused_on_entering() -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()
    message = r"are not found in blocks \[0, 1\] of OpenAIGPTLMHeadModel, so these can be ablated at strength 1 only"
    with pytest.raises(ValueError, match=message), ablate_everywhere(model, DIRECTION, strength=0.5):
        pass
    with ablate_everywhere(model, DIRECTION, strength={"embeddings": 0.5}), torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))


def test_parts_that_can_not_be_told_apart_have_one_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.shared("llama")
    find = stream_parts.part_path
    # Its MLP might have a name that nobody knows.
    monkeypatch.setattr(stream_parts, "part_path", lambda block, kind: None if kind == "mlp" else find(block, kind))
    with (
        pytest.raises(ValueError, match="can't tell attention from MLP among the parts of block 0, LlamaDecoderLayer"),
        ablate_everywhere(model, DIRECTION, strength={"mlp": 0.5}),
    ):
        pass
    with ablated_by_part(model, "llama", lambda _layer, _part: 0.5):
        expected = logits(model)
    with ablate_everywhere(model, DIRECTION, strength=0.5):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 2]], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral", "opt"])
def test_each_layer_s_directions_are_removed_at_that_layer(architecture: str, layers: list[int]) -> None:
    model = tiny.shared(architecture)
    directions = {0: DIRECTION, 1: SEVERAL, 2: DEPENDENT}
    given = {layer - (3 if layer == 2 else 0): directions[layer] for layer in layers}

    def by_layer(layer: int) -> Callable[[Tensor], Tensor]:
        return without_span(directions[layer].reshape(-1, tiny.HIDDEN)) if layer in layers else lambda h: h

    with ablated_by_hand(model, architecture, by_layer, at_outputs=True):
        expected = logits(model)
    with unchanged(model), ablate_everywhere(model, given) as handle:
        torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=1e-3)
        assert handle.layers == layers


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral"])
def test_rows_run_ablated_and_unsteered_side_by_side(architecture: str) -> None:
    model, copies = tiny.shared(architecture), {name: rows[:1].expand(3, -1) for name, rows in INPUTS.items()}
    plain = logits(model, **copies)
    with ablate_everywhere(model, SEVERAL):
        ablated = logits(model, **copies)
    for rows in ([True, False, True], torch.tensor([1, 0, 1])):
        with ablate_everywhere(model, SEVERAL, rows=rows):
            got = logits(model, **copies)
        if architecture == "mixtral" and tiny.ON_TRANSFORMERS_4:  # its experts add in an order that depends on all rows
            torch.testing.assert_close(got[1], plain[1])
        else:
            assert torch.equal(got[1], plain[1])
        torch.testing.assert_close(got[::2], ablated[::2], atol=1e-5, rtol=1e-4)
    kwargs: Any = {**INPUTS, "num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    with ablate_everywhere(model, SEVERAL, rows=[False, True]):
        beams = model.generate(**kwargs)
    assert torch.equal(beams[0], model.generate(**kwargs)[0])
    with ablate_everywhere(model, SEVERAL):
        assert torch.equal(beams[1], model.generate(**kwargs)[1])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "mamba"])
def test_selected_tokens_alone_are_ablated_with_a_cache_and_without(architecture: str) -> None:
    model, inputs = tiny.shared(architecture), padded([11, 12, 13, 14, 15])

    def from_the_last(activation: Tensor) -> Tensor:
        return torch.cat([activation[:, :4], without(activation[:, 4:])], dim=1)

    with ablated_by_hand(model, architecture, lambda layer: from_the_last):
        expected = answer(model, inputs, use_cache=False)
    with ablate_everywhere(model, DIRECTION, tokens=generated(inputs)):
        for use_cache in (True, False):
            assert torch.equal(answer(model, inputs, use_cache=use_cache), expected)


def test_it_is_a_decorator_and_is_listed_and_taken_off_after_errors() -> None:
    model = tiny.shared("llama")
    context = ablate_everywhere(model, DIRECTION)
    before = hooks_of(model)
    with context:
        expected = logits(model)
        (patch,) = active_patches(model)
        assert patch.layers == [0, 1, 2]
    assert torch.equal(context(logits)(model), expected)
    with pytest.raises(KeyError), context:
        raise KeyError
    assert hooks_of(model) == before


def test_a_steering_inside_is_added_afterwards_and_one_outside_is_ablated() -> None:
    model, steered = tiny.shared("llama"), vector(2, scale=5.0)
    direction = steered.layer_activations[2]
    for outside in (False, True):
        ablation, addition = ablate_everywhere(model, DIRECTION), steered.apply(model)
        contexts = (addition, ablation) if outside else (ablation, addition)
        with contexts[0], contexts[1], record_activations(model, layers=2) as outputs:
            logits(model)
        along = outputs[2][0] @ UNIT
        expected = torch.zeros(()) if outside else direction @ UNIT
        torch.testing.assert_close(along, expected.expand_as(along), atol=1e-5, rtol=1e-4)


def test_tokens_may_be_steered_inside() -> None:
    model = tiny.shared("llama")
    with ablate_everywhere(model, DIRECTION), vector().apply(model, tokens=generated(INPUTS)):
        expected = answer(model, INPUTS, use_cache=False)
        assert torch.equal(answer(model, INPUTS), expected)


def test_gradients_flow_through_it() -> None:
    model: Any = tiny.build("llama")
    direction = DIRECTION.clone().requires_grad_()
    with ablate_everywhere(model, direction):
        model(torch.tensor([[3, 4, 5]])).logits.square().mean().backward()
    assert direction.grad is not None
    assert bool(direction.grad.any())
    assert bool(model.model.layers[0].mlp.up_proj.weight.grad.any())


@pytest.mark.compiles
def test_a_compiled_model_is_ablated_in_one_graph() -> None:
    torch.compiler.reset()
    plain = tiny.shared("llama")
    compiled: Any = torch.compile(tiny.build("llama"), backend="eager", fullgraph=True)
    logits(compiled)
    for direction, strength in (
        (DIRECTION, 1.0),
        (DIRECTION.flip(0), 1.0),
        (DIRECTION, {"mlp": 0.5}),
        (DIRECTION, 0.5),
    ):
        with ablate_everywhere(plain, direction, strength=strength):
            expected = logits(plain)
        with ablate_everywhere(compiled, direction, strength=strength):
            torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits(compiled), logits(plain), atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda m: ablate_everywhere(m, torch.ones(31)),
            ValueError,
            "directions have 31 numbers, but the model's layer 0 has 32",
        ),
        (lambda m: ablate_everywhere(m, torch.zeros(32)), ValueError, "the direction is all zeros, so there is"),
        (lambda m: ablate_everywhere(m, torch.full((32,), float("nan"))), ValueError, "the direction has NaN"),
        (lambda m: ablate_everywhere(m, torch.ones(1, 2, 32)), ValueError, "the direction must have the shape (hidden"),
        (lambda m: ablate_everywhere(m, torch.zeros(2, 32)), ValueError, "the direction is all zeros, so there is"),
        (lambda m: ablate_everywhere(m, torch.ones(2, 31)), ValueError, "directions have 31 numbers"),
        (lambda m: ablate_everywhere(m, torch.tensor([[1.0], [float("inf")]])), ValueError, "direction has NaN or inf"),
        (lambda m: ablate_everywhere(m, torch.ones(2, 32).requires_grad_()), ValueError, "a set of 2 directions can't"),
        (lambda m: ablate_everywhere(m, {}), ValueError, "there are no directions, so there is nothing to ablate"),
        (lambda m: ablate_everywhere(m, {3: DIRECTION}), ValueError, "layer 3 does not exist: the model has 3 layers"),
        (lambda m: ablate_everywhere(m, {1: 0 * DIRECTION}), ValueError, "the direction of layer 1 is all zeros"),
        (lambda m: ablate_everywhere(m, {0: DIRECTION, 1: torch.ones(3)}), ValueError, "have the same width, got [3,"),
        (lambda m: ablate_everywhere(m, vector(0, 1)), ValueError, "as in vector.layer_activations"),
        (lambda m: ablate_everywhere(m, DIRECTION, tokens="all"), TypeError, "tokens must be a selector"),
        (lambda m: ablate_everywhere(m, DIRECTION, rows=[0.5, 1]), TypeError, "rows must be a list of True and False"),
        (lambda m: ablate_everywhere(m, DIRECTION, rows=True), TypeError, "rows must be a list of True and False"),
        (lambda m: ablate_everywhere(m, DIRECTION, rows=[]), ValueError, "is empty"),
        (lambda m: ablate_everywhere(m, "refusal"), TypeError, "the direction must be a tensor of numbers"),
        (lambda m: ablate_everywhere("gpt2", torch.ones(32)), TypeError, "model must be a torch.nn.Module"),
        (lambda m: ablate_everywhere(nn.Linear(2, 2), torch.ones(32)), ValueError, "can't tell which modules"),
    ],
)
def test_what_can_not_be_ablated_is_refused_before_anything_is_attached(
    call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    model = tiny.shared("llama")
    with unchanged(model), pytest.raises(error, match=re.escape(message)):
        call(model)


def test_a_model_that_is_steered_by_token_is_refused() -> None:
    model = tiny.shared("llama")
    with (
        vector().apply(model, tokens=from_index(1)),
        pytest.raises(ValueError, match="enter ablate_everywhere, and apply it again inside"),
    ):
        ablate_everywhere(model, DIRECTION)


def test_a_layer_config_says_where_the_blocks_are() -> None:
    model = tiny.shared("llama")
    with ablate_everywhere(model, DIRECTION):
        expected = logits(model)
    with ablate_everywhere(model, DIRECTION, layer_config={"decoder_block": "model.layers.{num}"}):
        assert torch.equal(logits(model), expected)


class TestWhileOthersUseTheModel:
    def test_passes_of_other_threads_go_on_as_they_are(self) -> None:
        model, wrong, done = tiny.shared("llama"), [], threading.Event()
        expected = logits(model)

        def run() -> None:
            while not done.is_set():
                wrong.append(float((logits(model) - expected).abs().max()))

        thread = threading.Thread(target=run)
        thread.start()
        for _ in range(20):
            written_parts(model, tiny.blocks(model))
        done.set()
        thread.join()
        assert len(wrong) > 2
        assert max(wrong) == 0

    def test_a_steering_by_row_is_refused_as_one_by_token(self) -> None:
        model = tiny.shared("llama")
        with (
            vector().apply(model, multiplier=[0.5, 1.0]),
            pytest.raises(ValueError, match="the model is already steered by token or by row: remove that"),
        ):
            ablate_everywhere(model, DIRECTION)

    def test_a_model_that_can_not_be_run_on_tokens_alone_is_ablated_at_its_blocks_with_a_warning(self) -> None:
        model = tiny.build("llama")

        def fail(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape == (1, 5):
                raise KeyError("pixel_values")

        model.base_model.register_forward_pre_hook(fail, with_kwargs=True)
        context = ablate_everywhere(model, DIRECTION)
        with pytest.warns(UserWarning, match=r"LlamaForCausalLM can't be run on a few tokens alone.*'pixel_values'"):
            context.__enter__()
        with record_activations(model) as outputs:
            logits(model, torch.tensor([[3, 4, 5]]))
        context.__exit__(None, None, None)
        assert all(float((part[0] @ UNIT).abs().max()) < 1e-5 for part in outputs.values())

    def test_parts_are_found_again_on_entering(self) -> None:
        model: Any = tiny.build("llama")
        context = ablate_everywhere(model, DIRECTION)
        for block in model.model.layers:
            block.mlp = nn.Sequential(block.mlp)
        with context, record_activations(model, "mlp") as outputs:
            logits(model)
        assert all(float((part[0] @ UNIT).abs().max()) < 1e-5 for part in outputs.values())

    def test_encoder_decoder_models_have_their_parts_found(self) -> None:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        model = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).eval()
        blocks = list(model.decoder.block)
        for parts, block in zip(written_parts(model, blocks), blocks, strict=True):
            assert block not in parts
            assert list(parts.values()) == ["self_attn", "self_attn", "mlp"]  # the second one attends to the encoder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e6])
def test_the_length_does_nothing_in_half_precision_too(dtype: torch.dtype, factor: float) -> None:
    model = tiny.build("llama").to(dtype)
    with ablate_everywhere(model, factor * DIRECTION), record_activations(model) as outputs:
        logits(model)
    for parts in outputs.values():
        assert float((parts[0].float() @ UNIT).abs().max() / parts[0].float().norm(dim=-1).max()) < 2e-2
