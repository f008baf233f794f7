"""accelerate's offloading: a layer's weights are on ``meta`` until it runs, so only its activation tells where it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from steering_vectors import SteeringVector, record_activations, train_steering_vector
from steering_vectors._models import anatomy_of
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
    check_steered,
    check_trained,
    recorded,
    some_vector,
    steered_by_hand,
    unchanged,
)

accelerate = pytest.importorskip("accelerate")

DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def dispatched(model: Any, folder: Path) -> Any:
    return accelerate.dispatch_model(model, DEVICE_MAP, main_device="cpu", offload_dir=folder / "offload")


def offloaded_to_cpu(model: Any, _folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def offloaded_to_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder / "offload", execution_device="cpu")


def loaded_with_a_device_map(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "model")
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=DEVICE_MAP, offload_folder=folder / "offload", torch_dtype=model.dtype
    )
    loaded.generation_config = model.generation_config
    return loaded


OFFLOADED: list[Callable[[Any, Path], Any]] = [
    dispatched,
    offloaded_to_cpu,
    offloaded_to_disk,
    loaded_with_a_device_map,
]


@pytest.fixture(params=OFFLOADED, ids=lambda offload: offload.__name__)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    model = request.param(tiny.build("llama"), tmp_path)
    assert {weight.device.type for weight in model.model.layers[LAYER].parameters()} == {"meta"}
    return model


class TestTraining:
    def test_gives_the_bare_models_vector(self, model: Any) -> None:
        check_trained(model, tiny.shared("llama"), tiny.blocks(tiny.shared("llama")))
        vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES)
        assert {direction.device.type for direction in vector.layer_activations.values()} == {"cpu"}

    def test_through_tied_weights_gives_the_bare_models_vector(self, tmp_path: Path) -> None:
        model = offloaded_to_disk(tiny.build("gpt2"), tmp_path)
        check_trained(model, tiny.shared("gpt2"), tiny.blocks(tiny.shared("gpt2")))

    def test_brings_training_mode_back(self, model: Any) -> None:
        model.train()
        model.model.layers[0].eval()
        with unchanged(model):
            train_steering_vector(model, tiny.tokenizer(), SAMPLES)


class TestSteering:
    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_is_that_of_the_bare_model(self, model: Any, selection: str) -> None:
        bare = tiny.shared("llama")
        check_steered(model, model, model, tiny.blocks(model), selection)
        tokens, first_column = SELECTIONS[selection]
        with steered_by_hand(tiny.blocks(bare), some_vector(), first_column):
            expected = answer_by_hand(bare)
        with some_vector().apply(model, tokens=tokens):
            assert_close(answer(model), expected)

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_stays_in_the_streams_dtype(self, selection: str, tmp_path: Path) -> None:
        model = dispatched(tiny.build("llama").to(torch.bfloat16), tmp_path)
        tokens, first_column = SELECTIONS[selection]
        before = recorded(model, model)
        with some_vector().apply(model, tokens=tokens):
            after = recorded(model, model)
        assert before[LAYER].dtype is torch.bfloat16
        assert_moved(before, after, some_vector(), first_column)

    def test_is_in_the_streams_dtype_where_the_layers_weights_have_another(self, tmp_path: Path) -> None:
        bare = tiny.build("llama")
        for norm in (bare.model.layers[LAYER].input_layernorm, bare.model.layers[LAYER].post_attention_layernorm):
            norm.to(torch.float16)
        model = dispatched(bare, tmp_path)
        for layer_type in ("decoder_block", "input_layernorm"):
            vector = SteeringVector(some_vector().layer_activations, layer_type)
            runs = []
            for multiplier in (0, 1):
                with (
                    vector.apply(model, multiplier=multiplier),
                    record_activations(model, layer_type) as records,
                    torch.no_grad(),
                ):
                    model(**INPUTS)
                runs.append(records[LAYER][0])
            assert runs[0].dtype is runs[1].dtype is torch.float32
            assert torch.equal(runs[1], runs[0] + vector.layer_activations[LAYER])

    @pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"])
    def test_of_parts_is_that_of_the_bare_model(self, model: Any, layer_type: Any) -> None:
        vector = SteeringVector(some_vector().layer_activations, layer_type)
        logits = []
        for each in (tiny.shared("llama"), model):
            with vector.apply(each), torch.no_grad():
                logits.append(each(**INPUTS).logits)
        assert_close(*logits)

    def test_takes_directions_that_require_gradients(self, model: Any) -> None:
        gradients = []
        for each in (tiny.shared("llama"), model):
            direction = some_vector().layer_activations[LAYER].requires_grad_()
            with SteeringVector({LAYER: direction}).apply(each):
                (gradient,) = torch.autograd.grad(each(**INPUTS).logits.logsumexp(dim=-1).sum(), direction)
            gradients.append(gradient)
        assert gradients[0].abs().max() > 0.1
        assert_close(*gradients)

    def test_outlives_the_removal_of_accelerates_hooks(self, tmp_path: Path) -> None:
        """They replace a module's ``forward``; ours stand around it."""
        model = offloaded_to_cpu(tiny.build("llama"), tmp_path)
        with steered_by_hand(tiny.blocks(model), some_vector(), 0):
            expected = answer_by_hand(model)
        with some_vector().apply(model):
            accelerate.hooks.remove_hook_from_submodules(model)
            assert {weight.device.type for weight in model.parameters()} == {"cpu"}
            assert_close(answer(model), expected)


def test_inputs_go_where_weights_are_that_are_not_offloaded(model: Any) -> None:
    assert anatomy_of(model).input_device == torch.device("cpu")
