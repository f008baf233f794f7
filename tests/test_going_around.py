"""Runs of a model that go around its layers, its blocks of code, or its list of layers: steered, or said not to be."""

import copy
import functools
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from steering_vectors import (
    SteeringVector,
    ablate_everywhere,
    active_patches,
    extract_activations,
    from_index,
    generated,
    read_activations,
    record_activations,
)
from tests import tiny
from tests.test_steering import answer, logits, padded, unchanged, vector
from tests.test_threads import in_threads
from tests.test_training_through import enable_checkpointing

INPUTS = padded([11, 12, 13, 14, 15], [21, 22])
TOKENS = [None, from_index(1), generated(INPUTS)]


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    model = tiny.shared("llama")
    with unchanged(model):
        yield model


class TestLayersThatRunInSomePassesOnly:
    def run_code_directly(self, model: Any) -> Callable[[], None]:
        """From now on, passes over one token run the blocks' code and not the blocks."""
        for block in tiny.blocks(model):
            block.decoding = type(block).forward.__get__(block)
        layers, kind = model.model.layers, type(model.model.layers[0])
        call = kind.__call__

        def around(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            run = block.decoding if hidden_states.shape[1] == 1 else functools.partial(call, block)
            return run(hidden_states, *args, **kwargs)

        # The class of a block may be derived from meanwhile, so the method is set on the class itself.
        kind.__call__ = around
        assert len(layers) == tiny.LAYERS

        def back() -> None:
            if "__call__" in vars(kind):
                del kind.__call__
            for block in tiny.blocks(model):
                del block.decoding

        return back

    @pytest.mark.parametrize("tokens", [None, generated(INPUTS)], ids=repr)
    def test_are_named_with_the_number_of_passes(self, tokens: Any) -> None:
        model = tiny.build("llama")
        back = self.run_code_directly(model)
        try:
            with pytest.warns(RuntimeWarning, match=r"of 4 passes .* \(passes by layer: \{0: 3, 2: 3\}\)"):
                steer_and_answer(model, vector(0, 2), tokens)
        finally:
            back()

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_not_looked_for_in_vain(self, architecture: str) -> None:
        """No warning for any architecture and any way to generate: warnings are errors in these tests."""
        model = tiny.shared(architecture)
        everything = vector(*range(len(tiny.blocks(model))))
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}]
        inputs = padded([11, 12, 13])
        if architecture != "rwkv":  # whose cached steps mix the rows of a batch
            ways += [{"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2}]
            inputs = INPUTS
        for tokens in (None, generated(inputs)):
            for way in ways:
                with everything.apply(model, tokens=tokens):
                    answer(model, inputs, **way)

    def test_nor_in_assisted_decoding(self) -> None:
        model, assistant = tiny.build("llama"), tiny.build("llama", num_hidden_layers=1)
        model.generation_config.eos_token_id = assistant.generation_config.eos_token_id = tiny.VOCABULARY - 1
        inputs = padded([11, 12, 13, 14])
        for kwargs in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
            with vector(0, 1, 2).apply(model):
                answer(model, inputs, **kwargs)
        with vector(0).apply(assistant):
            answer(model, inputs, assistant_model=assistant)

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="the option's name is that of transformers 5")
    def test_nor_where_the_model_leaves_off_early(self) -> None:
        model = tiny.build("llama")
        with vector(0, 1, 2).apply(model):
            answer(model, padded([11, 12, 13, 14]), assistant_early_exit=1)

    def test_nor_where_layers_are_dropped_in_training(self) -> None:
        model = tiny.build("opt", layerdrop=0.9).train()
        for tokens in (None, from_index(1)):
            with vector(0, 1, 2).apply(model, tokens=tokens):
                for _ in range(3):
                    model(**INPUTS).logits.sum().backward()

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="there, a model runs all blocks of its list")
    def test_but_in_training_too_where_none_is_dropped(self) -> None:
        config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
        unused = LlamaForCausalLM(config).train()
        unused.model.config.num_hidden_layers = 2
        with pytest.warns(RuntimeWarning, match=r"these never did: \[2\]"), vector(0, 2).apply(unused):
            unused(INPUTS["input_ids"])

    def test_nor_in_an_encoder_and_decoder(self) -> None:
        config = T5Config(
            vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(config).eval()
        for kwargs in ({}, {"num_beams": 2}, {"use_cache": False}):
            with vector(0, 1, 2).apply(model):
                model.generate(**INPUTS, max_new_tokens=4, **kwargs)


def steer_and_answer(model: Any, some: SteeringVector, tokens: Any) -> Tensor:
    with some.apply(model, tokens=tokens):
        return answer(model, INPUTS)


class ValueHead(nn.Module):
    """A wrapper that adds a head to a model and generates by the model's own method, as TRL's does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model
        self.head = nn.Linear(tiny.HIDDEN, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        out = self.pretrained_model(input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs)
        out["values"] = self.head(out.hidden_states[-1])
        return out

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.generate(*args, **kwargs)


@pytest.mark.parametrize("tokens", [None, from_index(1), generated(INPUTS), generated()], ids=repr)
def test_a_wrapper_whose_generate_is_the_inner_model_s(tokens: Any) -> None:
    model = tiny.build("llama")
    with vector(0, 1, scale=3.0).apply(model, tokens=tokens):
        expected = answer(model, INPUTS)
    wrapper = ValueHead(model)
    with vector(0, 1, scale=3.0).apply(wrapper, tokens=tokens):
        assert torch.equal(answer(wrapper, INPUTS), expected)
    if tokens is not None and "generated()" in repr(tokens):
        return  # a pass alone shows no prompt
    with vector(0, 1, scale=3.0).apply(model, tokens=tokens):
        alone = logits(model, **INPUTS)
    with vector(0, 1, scale=3.0).apply(wrapper, tokens=tokens):
        torch.testing.assert_close(logits(wrapper, **INPUTS), alone)


# name → what is passed to apply
STEERED: dict[str, dict[str, Any]] = {
    "all tokens": {},
    "a selection": {"tokens": from_index(1)},
    "row multipliers": {"multiplier": [2.0, -1.0]},
    "weights": {"tokens": lambda positions: (positions.index % 2) / 2},
    "an operator": {"operator": lambda activation, direction: activation * direction, "tokens": from_index(1)},
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer_type", ["decoder_block", "self_attn", "mlp"])
@pytest.mark.parametrize("steered", STEERED)
class TestBackwardAfterTheBlock:
    def gradients(self, model: Any) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def both(
        self, run: Callable[[Any], None], *, reentrant: bool, enable_later: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        found = []
        for checkpointed in (False, True):
            model: Any = tiny.build("llama").train()
            model.get_input_embeddings().weight.requires_grad_()

            def enable(model: Any = model, checkpointed: bool = checkpointed) -> None:
                if checkpointed:
                    enable_checkpointing(model, reentrant=reentrant)
                    model.disable_input_require_grads()

            if not enable_later:
                enable()
            self.enable = enable
            run(model)
            assert active_patches(model) == []
            found.append(self.gradients(model))
        assert len(found[0]) == len(found[1]) > 10
        return zip(*found, strict=True)

    def test_gives_the_gradients_of_a_pass_without_checkpoints(
        self, steered: str, layer_type: Any, reentrant: bool
    ) -> None:
        def run(model: Any) -> None:
            with vector(0, 1, scale=3.0, layer_type=layer_type).apply(model, **STEERED[steered]):
                loss = model(**INPUTS, use_cache=False).logits.square().mean()
            loss.backward()

        for plain, again in self.both(run, reentrant=reentrant):
            torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-3)

    def test_of_checkpoints_that_were_enabled_inside_it(self, steered: str, layer_type: Any, reentrant: bool) -> None:
        def run(model: Any) -> None:
            with vector(0, 1, scale=3.0, layer_type=layer_type).apply(model, **STEERED[steered]):
                self.enable()
                loss = model(**INPUTS, use_cache=False).logits.square().mean()
            loss.backward()

        for plain, again in self.both(run, reentrant=reentrant, enable_later=True):
            torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-3)

    def test_of_two_blocks_in_either_order_and_in_another_thread(
        self, steered: str, layer_type: Any, reentrant: bool
    ) -> None:
        def run(model: Any) -> None:
            losses = []
            for scale in (3.0, -2.0):
                with vector(0, 1, scale=scale, layer_type=layer_type).apply(model, **STEERED[steered]):
                    losses.append(model(**INPUTS, use_cache=False).logits.square().mean())
            losses.append(model(**INPUTS, use_cache=False).logits.square().mean())
            losses[1].backward()
            with vector(2, scale=5.0).apply(model):  # it steers no part that is run again
                in_threads(losses[0].backward)
                losses[2].backward()
                model(INPUTS["input_ids"])

        with warnings.catch_warnings():
            for plain, again in self.both(run, reentrant=reentrant):
                torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-3)


class TestDecoratedCallables:
    """What runs its code only after the call would run it unsteered, so it raises at once or when it is called."""

    def later(self, model: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
        def generator() -> Iterator[Tensor]:
            yield logits(model)

        async def coroutine() -> Tensor:
            return logits(model)

        async def asynchronous_generator() -> AsyncIterator[Tensor]:
            yield logits(model)

        for function in (generator, coroutine, asynchronous_generator):

            @functools.wraps(function)
            def wrapped(function: Any = function) -> Any:
                return function()

            class WithCall:
                __call__ = staticmethod(function)

            yield function.__name__, function
            yield f"a lambda of {function.__name__}", lambda function=function: function()
            yield f"{function.__name__}, wrapped", wrapped
            yield f"a partial of {function.__name__}", functools.partial(function)
            yield f"an object that calls {function.__name__}", WithCall()
        yield "a map", lambda: map(logits, [model])
        yield "a zip", lambda: zip(generator())
        yield "an iterator of calls", lambda: iter(lambda: logits(model), None)

    def test_are_refused(self, model: PreTrainedModel) -> None:
        taken = []
        for name, function in self.later(model):
            try:
                result = vector().apply(model)(function)()
            except TypeError as error:
                assert "use `with vector.apply(…):` inside it" in str(error)
            else:
                taken.append((name, type(result).__name__))
            assert active_patches(model) == []
        # An iterator of the standard library can't be told from one over values that are there already.
        assert [name for name, _ in taken] == ["a map", "a zip", "an iterator of calls"]

    def test_are_taken_where_they_run_at_once(self, model: PreTrainedModel) -> None:
        class WithMethods:
            def method(self) -> Tensor:
                return logits(model)

            @classmethod
            def of_class(cls) -> Tensor:
                return logits(model)

            def __call__(self) -> Tensor:
                return logits(model)

        with vector().apply(model):
            steered = logits(model)
        owner = WithMethods()
        decorate = vector().apply(model)
        functions = [owner.method, owner.of_class, owner, functools.partial(logits, model), lambda: logits(model)]
        for function in functions:
            assert torch.equal(decorate(function)(), steered)
        assert torch.equal(decorate(model)(torch.tensor([[11, 12, 13, 14, 15]])).logits, steered)


class TestABlockThatStandsInTheListTwice:
    def build(self) -> Any:
        model: Any = tiny.build("llama")
        model.model.layers[2] = model.model.layers[1]
        return model

    def test_is_refused_alone_and_with_its_twin(self) -> None:
        model = self.build()
        message = r"layers \[1, 2\] of .* share modules"
        for layers in ((1,), (2,), (1, 2), (0, 1)):
            with pytest.raises(ValueError, match=message):
                vector(*layers).apply(model)
            with pytest.raises(ValueError, match=message):
                vector(*layers).patch(model)
            with pytest.raises(ValueError, match=message), record_activations(model, layers=layers):
                pass
            with pytest.raises(ValueError, match=message):
                read_activations(model, tiny.tokenizer(), ["ab"], layers=layers)
            with pytest.raises(ValueError, match=message):
                extract_activations(model, tiny.tokenizer(), [("ab", "cd")], layers=layers)

    def test_does_not_stand_in_the_way_of_others(self) -> None:
        model = self.build()
        with vector(0).apply(model), record_activations(model, layers=0) as records:
            assert not torch.equal(logits(model), logits(copy.deepcopy(model)))
        assert len(records[0]) == 1

    def test_is_ablated_in_all_its_places(self) -> None:
        model = self.build()
        direction = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
        outputs: list[Tensor] = []
        with ablate_everywhere(model, direction):
            for block in dict.fromkeys(tiny.blocks(model)):
                block.register_forward_hook(
                    lambda _module, _args, out: outputs.append(out if isinstance(out, Tensor) else out[0])
                )
            logits(model)
        assert len(outputs) == 3
        for output in outputs:
            assert (output @ direction).abs().max() < 1e-4
