"""PEFT's adapters: on, off, merged; a model given as its wrapper or as what the wrapper holds."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    extract_activations,
    from_index,
    generated,
    record_activations,
    train_steering_vector,
)
from tests import tiny
from tests.wrapped.promises import (
    INPUTS,
    LAYER,
    SAMPLES,
    SELECTIONS,
    answer,
    answer_by_hand,
    assert_close,
    assert_moved,
    assert_vectors_close,
    check_steered,
    check_trained,
    recorded,
    some_vector,
    steered_by_hand,
    unchanged,
    vector_by_hand,
)

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # torch's and transformers' own, when PEFT imports parts of them
    "ignore:.*script_method.*:DeprecationWarning",
    "ignore::FutureWarning:transformers",
    "ignore::FutureWarning:peft",
)

TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"], "opt": ["q_proj", "fc2"]}
ARCHITECTURES = list(TARGETS)


def with_adapter(architecture: str = "llama", kind: str = "lora", **settings: Any) -> Any:
    """A new tiny model with an adapter that changes what it gives, in evaluation mode."""
    configs = {
        "lora": lambda: peft.LoraConfig(
            target_modules=TARGETS[architecture],
            fan_in_fan_out=architecture == "gpt2",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **settings,
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
            task_type="CAUSAL_LM",
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(tiny.build(architecture), configs[kind]()).eval()


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def model(architecture: str) -> Any:
    return with_adapter(architecture)


def as_inner(model: Any) -> Any:
    return model.get_base_model()


GIVEN = {"as the PeftModel": lambda model: model, "as its inner model": as_inner}


class TestTraining:
    @pytest.mark.parametrize("given", GIVEN)
    def test_reads_what_a_loop_over_the_adapted_model_reads(self, model: Any, given: str) -> None:
        inner = as_inner(model)
        bare = vector_by_hand(tiny.shared(inner.config.model_type), tiny.blocks(tiny.shared(inner.config.model_type)))
        assert max((vector_by_hand(model, tiny.blocks(inner))[n] - bare[n]).norm() for n in bare) > 0.1
        check_trained(GIVEN[given](model), model, tiny.blocks(inner))

    @pytest.mark.parametrize("given", GIVEN)
    def test_with_the_adapter_off_gives_the_bare_models_vector(self, model: Any, architecture: str, given: str) -> None:
        bare = tiny.shared(architecture)
        with model.disable_adapter():
            vector = train_steering_vector(GIVEN[given](model), tiny.tokenizer(), SAMPLES)
        assert_vectors_close(vector, vector_by_hand(bare, tiny.blocks(bare)))
        assert_vectors_close(
            train_steering_vector(GIVEN[given](model), tiny.tokenizer(), SAMPLES),
            vector_by_hand(model, tiny.blocks(as_inner(model))),
        )

    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_on_the_merged_model_gives_the_adapted_models_vector(self, model: Any, merge: str) -> None:
        expected = vector_by_hand(model, tiny.blocks(as_inner(model)))
        merged = getattr(model, merge)() or model
        with unchanged(merged):
            vector = train_steering_vector(merged, tiny.tokenizer(), SAMPLES)
        assert_vectors_close(vector, expected)

    def test_is_not_under_the_adapters_dropout(self) -> None:
        model = with_adapter(lora_dropout=0.5)
        expected = vector_by_hand(model, tiny.blocks(as_inner(model)))
        model.train()
        with unchanged(model):
            vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES)
        assert_vectors_close(vector, expected)

    def test_leaves_the_adapters_gradients_alone(self) -> None:
        model = with_adapter()
        wanted = [parameter.requires_grad for parameter in model.parameters()]
        train_steering_vector(model, tiny.tokenizer(), SAMPLES)
        assert [parameter.requires_grad for parameter in model.parameters()] == wanted
        assert any(wanted)
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_costs_no_more_logits_than_the_bare_models(self) -> None:
        """A vocabulary is far wider than a model; a head over all tokens would cost more than the model."""
        model = with_adapter()
        inner, tokens = as_inner(model), []
        inner.lm_head.register_forward_hook(lambda _module, args, _output: tokens.append(args[0].shape[1]))
        train_steering_vector(inner, tiny.tokenizer(), SAMPLES)
        bare, tokens[:] = tokens[:], []
        train_steering_vector(model, tiny.tokenizer(), SAMPLES)
        assert tokens == bare


class TestSteering:
    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("called", GIVEN)
    @pytest.mark.parametrize("entered", GIVEN)
    def test_is_as_by_hand_whichever_is_entered_and_whichever_called(
        self, model: Any, entered: str, called: str, selection: str
    ) -> None:
        inner, runs = as_inner(model), GIVEN[called](model)
        check_steered(GIVEN[entered](model), runs, runs, tiny.blocks(inner), selection)

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_under_ia3_is_as_by_hand(self, selection: str) -> None:
        model = with_adapter(kind="ia3")
        check_steered(model, model, model, tiny.blocks(as_inner(model)), selection)

    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
    def test_of_a_merged_model_is_as_by_hand(self, model: Any, merge: str, selection: str) -> None:
        tokens, first_column = SELECTIONS[selection]
        with steered_by_hand(tiny.blocks(as_inner(model)), some_vector(), first_column):
            expected = answer_by_hand(model)
        merged = getattr(model, merge)() or model
        inner = as_inner(merged) if merged is model else merged
        check_steered(merged, merged, merged, tiny.blocks(inner), selection)
        with some_vector().apply(merged, tokens=tokens):
            assert_close(answer(merged), expected)

    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("order", ["adapter off, then steered", "steered, then adapter off"])
    def test_with_the_adapter_off_is_that_of_the_bare_model(
        self, model: Any, architecture: str, order: str, selection: str
    ) -> None:
        tokens, first_column = SELECTIONS[selection]
        bare, inner = tiny.shared(architecture), as_inner(model)
        with steered_by_hand(tiny.blocks(bare), some_vector(), first_column):
            expected = answer_by_hand(bare)
        with steered_by_hand(tiny.blocks(inner), some_vector(), first_column):
            adapted = answer_by_hand(model)
        assert (expected - adapted).abs().max() > 0.1
        if order == "adapter off, then steered":
            with model.disable_adapter():
                check_steered(model, model, model, tiny.blocks(inner), selection)
                with some_vector().apply(model, tokens=tokens):
                    assert_close(answer(model), expected)
        else:
            with unchanged(model), some_vector().apply(model, tokens=tokens):
                with model.disable_adapter():
                    assert_close(answer(model), expected)
                assert_close(answer(model), adapted)

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_outlives_merging_and_unmerging_within_the_block(self, model: Any, selection: str) -> None:
        tokens, first_column = SELECTIONS[selection]
        plain = answer_by_hand(model)
        with steered_by_hand(tiny.blocks(as_inner(model)), some_vector(), first_column):
            expected = answer_by_hand(model)
        with some_vector().apply(model, tokens=tokens):
            model.merge_adapter()
            assert_close(answer(model), expected)
            model.unmerge_adapter()
            assert_close(answer(model), expected)
            merged = model.merge_and_unload()
            assert_close(answer(merged), expected)
        assert_close(answer(merged), plain)

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_outlives_a_change_of_adapters(self, selection: str) -> None:
        tokens, first_column = SELECTIONS[selection]
        model = with_adapter()
        model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
        blocks, expected = tiny.blocks(as_inner(model)), {}
        for name in ("default", "other"):
            model.set_adapter(name)
            with steered_by_hand(blocks, some_vector(), first_column):
                expected[name] = answer_by_hand(model)
        assert (expected["default"] - expected["other"]).abs().max() > 0.1
        with some_vector().apply(model, tokens=tokens):
            for name, logits in expected.items():
                model.set_adapter(name)
                assert_close(answer(model), logits)

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_holds_where_each_row_has_an_adapter_of_its_own(self, selection: str) -> None:
        tokens, first_column = SELECTIONS[selection]
        model = with_adapter()
        names = ["default", "__base__"]
        with steered_by_hand(tiny.blocks(as_inner(model)), some_vector(), first_column):
            adapted = answer_by_hand(model)
            with model.disable_adapter():
                bare = answer_by_hand(model)
        with unchanged(model), some_vector().apply(model, tokens=tokens):
            mixed = answer(model, adapter_names=names)
        assert_close(mixed, torch.stack([adapted[0], bare[1]]))

    @pytest.mark.parametrize("layer_type", ["self_attn", "mlp"])
    def test_of_parts_that_an_adapter_wraps_adds_the_direction_to_what_the_adapter_gives(
        self, model: Any, layer_type: Any
    ) -> None:
        vector = SteeringVector(some_vector().layer_activations, layer_type)

        def run() -> tuple[Tensor, Tensor]:
            with record_activations(model, layer_type, layers=LAYER) as records, torch.no_grad():
                logits = model(**INPUTS).logits
            return records[LAYER][0], logits

        plain, plain_logits = run()
        with model.disable_adapter():
            bare, _ = run()
        assert (plain - bare).abs().max() > 1e-2
        with vector.apply(model):
            steered, logits = run()
        assert torch.equal(steered, plain + vector.layer_activations[LAYER])
        assert (logits - plain_logits).abs().max() > 0.1

    def test_numbers_the_layers_of_a_model_that_an_adapter_made_deeper(self) -> None:
        model = with_adapter(layer_replication=[[0, 2], [1, 3]])
        blocks = tiny.blocks(as_inner(model))
        assert len(blocks) == 4
        vector = SteeringVector({3: some_vector().layer_activations[LAYER]})
        before = recorded(model, model)
        with vector.apply(model):
            after = recorded(model, model)
        assert sorted(before) == [0, 1, 2, 3]
        assert_moved(*({LAYER - 1: run[2], LAYER: run[3]} for run in (before, after)), some_vector(), 0)
        check_trained(model, model, blocks)


class TestTrainingAnAdapterWhileSteered:
    def test_gives_the_gradients_that_plain_hooks_give(self) -> None:
        model = with_adapter()

        def gradients() -> dict[str, Tensor]:
            model.zero_grad(set_to_none=True)
            model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        plain = gradients()
        with steered_by_hand(tiny.blocks(as_inner(model)), some_vector(), 0):
            expected = gradients()
        with some_vector().apply(model):
            found = gradients()
        assert found.keys() == expected.keys() == plain.keys()
        assert any((plain[name] - expected[name]).abs().max() > 1e-2 for name in plain)
        for name, gradient in expected.items():
            assert_close(found[name], gradient)


def test_rows_extracted_within_disable_adapter_are_the_bare_models() -> None:
    """What model diffing needs: the same prompts with the adapter and without, from one model."""
    model, bare = with_adapter(), tiny.shared("llama")
    rows = {}
    for name, context in {"on": nullcontext(), "off": model.disable_adapter()}.items():
        with context:
            rows[name] = extract_activations(model, tiny.tokenizer(), SAMPLES, layers=LAYER)[0][LAYER]
    expected = extract_activations(bare, tiny.tokenizer(), SAMPLES, layers=LAYER)[0][LAYER]
    assert_close(torch.cat(rows["off"]), torch.cat(expected))
    assert (torch.cat(rows["on"]) - torch.cat(expected)).abs().max() > 1e-2


PROMPT_LEARNING = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning", "ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("part", ["the model", "its decoder"])
@pytest.mark.parametrize("kind", PROMPT_LEARNING)
class TestPromptLearningAfterTheSteering:
    """A model that is wrapped inside the block gets virtual tokens, which no selection of the inner model's counts."""

    def runs(self, kind: str) -> list[Callable[[Any], Any]]:
        by_call: list[Callable[[Any], Any]] = [lambda wrapped: wrapped(**INPUTS)]
        # This PEFT hands over the prefix under a name that transformers ignores in generation from 5.24 on.
        return by_call if kind == "prefix tuning" else [*by_call, answer, partial(answer, use_cache=False)]

    def steered(self, model: Any, part: str) -> Any:
        return model if part == "the model" else model.model

    def test_a_selection_is_refused_in_each_way_to_run_it(self, kind: str, part: str) -> None:
        model = tiny.build("llama")
        vector = some_vector()
        for tokens in (from_index(1), generated(INPUTS), generated()):
            for run in self.runs(kind):
                with vector.apply(self.steered(model, part), tokens=tokens):
                    wrapped = peft.get_peft_model(model, PROMPT_LEARNING[kind]()).eval()
                    with pytest.raises(ValueError, match="prompt learning puts virtual tokens before the prompt's own"):
                        run(wrapped)

    def test_all_tokens_are_steered_and_so_is_the_model_without_its_wrapper(self, kind: str, part: str) -> None:
        model = tiny.build("llama")
        vector = some_vector()
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, PROMPT_LEARNING[kind]()).eval()
        plain, inner = wrapped(**INPUTS).logits, answer(model)
        with vector.apply(self.steered(model, part)):
            assert (wrapped(**INPUTS).logits - plain).abs().max() > 0.1
        with vector.apply(self.steered(model, part), tokens=generated(INPUTS)):
            assert (answer(model) - inner).abs().max() > 0.1
            embeddings = model.get_input_embeddings()(INPUTS["input_ids"])
            by_ids = model(**INPUTS).logits
            mask = INPUTS["attention_mask"]
            assert_close(model(inputs_embeds=embeddings, attention_mask=mask).logits, by_ids)
