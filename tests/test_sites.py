"""Vectors that were trained at other modules than the model's layers steer these modules again, from files too."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from steering_vectors import SteeringVector, train_steering_vector
from tests import tiny
from tests.test_steering import logits

PAIRS: Any = [([5, 6, 7], [5, 6, 9]), ([8, 11], [8, 12])]


def only(name: str) -> Any:
    """A matcher for one module, as layer 0."""
    return lambda _model, number: name if number == 0 else ""


# what is passed → the module of layer 0
SITES: dict[str, tuple[Any, str, str]] = {
    "a projection": ("model.layers.{num}.self_attn.o_proj", "self_attn", "model.layers.0.self_attn.o_proj"),
    "a projection by a callable": (
        lambda _model, number: f"model.layers.{number}.mlp.down_proj",
        "mlp",
        "model.layers.0.mlp.down_proj",
    ),
    "the embedding": (only("model.embed_tokens"), "decoder_block", "model.embed_tokens"),
    "the final norm": (only("model.norm"), "decoder_block", "model.norm"),
    "a norm in place of a block": (
        "model.layers.{num}.input_layernorm",
        "decoder_block",
        "model.layers.0.input_layernorm",
    ),
}


def trained(matcher: Any, layer_type: Any, **kwargs: Any) -> SteeringVector:
    settings: dict[str, Any] = {
        "layers": [0],
        "layer_type": layer_type,
        "layer_config": {layer_type: matcher},
        **kwargs,
    }
    return train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), PAIRS, **settings)


@pytest.mark.parametrize(("matcher", "layer_type", "name"), SITES.values(), ids=SITES)
def test_a_vector_acts_where_it_was_trained(matcher: Any, layer_type: Any, name: str, tmp_path: Path) -> None:
    model, vector = tiny.shared("llama"), trained(matcher, layer_type)
    direction = vector.layer_activations[0]
    assert direction.norm() > 0.1
    with torch.no_grad():
        hook = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: output + direction)
        expected = logits(model)
        hook.remove()
    vector.save(tmp_path / "v")
    loaded = SteeringVector.load(tmp_path / "v")
    made = [
        vector,
        loaded,
        copy.deepcopy(loaded),
        pickle.loads(pickle.dumps(loaded)),
        loaded[0],
        loaded.to(torch.float32),
        2 * loaded - vector,
        (loaded + vector) / 2,
    ]
    for same in made:
        with same.apply(model):
            torch.testing.assert_close(logits(model), expected)
    other: Any = {layer_type: "model.layers.{num}"}
    with vector.apply(model, other):
        assert not torch.allclose(logits(model), expected)


def test_a_config_that_names_the_model_s_own_layers_leaves_no_mark() -> None:
    for matcher in ("model.layers.{num}", lambda _model, number: f"model.layers.{number}"):
        assert "layer_config" not in trained(matcher, "decoder_block").metadata
    mlp: Any = {"mlp": "model.layers.{num}.mlp.down_proj"}
    assert "layer_config" not in trained("model.layers.{num}", "decoder_block", layer_config=mlp).metadata


def test_a_config_for_another_type_of_layer_changes_nothing() -> None:
    model, vector = tiny.shared("llama"), trained("model.layers.{num}.mlp.down_proj", "mlp")
    with vector.apply(model):
        expected = logits(model)
    with vector.apply(model, {"self_attn": "model.layers.{num}.self_attn.o_proj"}):
        assert torch.equal(logits(model), expected)


def test_a_model_without_such_modules_is_refused_until_they_are_named() -> None:
    model, vector = tiny.shared("gpt2"), trained("model.layers.{num}.mlp.down_proj", "mlp")
    vector.metadata = {n: text for n, text in vector.metadata.items() if n not in ("model_type", "layers_of_model")}
    with pytest.raises(ValueError, match=r"was trained with layer_config=.*down_proj.*no module of GPT2LMHeadModel"):
        vector.apply(model)
    with vector.apply(model, {"mlp": "transformer.h.{num}.mlp.c_proj"}):
        logits(model)


def test_vectors_of_different_modules_are_not_equal_and_not_combined() -> None:
    some = trained("model.layers.{num}.mlp.down_proj", "mlp")
    other = SteeringVector(dict(some.layer_activations), "mlp")
    assert some != other
    assert some == copy.deepcopy(some)
    for combine in (lambda: some + other, lambda: other - some, lambda: some.cosine_similarity(other)):
        with pytest.raises(ValueError, match="belong to different modules"):
            combine()


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        "{}",
        '{"mlp": 3}',
        '{"mlp": "no number"}',
        '{"mlp": {"x": "a"}}',
        '{"decoder_block": "a.{num}"}',
        "[" * 9999,
    ],
)
def test_other_texts_are_refused_by_files_and_by_models(text: str, tmp_path: Path) -> None:
    vector = SteeringVector({0: torch.ones(tiny.HIDDEN)}, "mlp", metadata={"layer_config": text})
    message = r"metadata\['layer_config'\] must be JSON"
    with pytest.raises(ValueError, match=message):
        vector.save(tmp_path / "v")
    with pytest.raises(ValueError, match=message):
        vector.apply(tiny.shared("llama"))
    headers = {
        "format": "steering-vectors",
        "format_version": "1",
        "layer_type": "mlp",
        "hidden_size": str(tiny.HIDDEN),
    }
    tensors: dict[str, Tensor] = {"mlp.0": torch.ones(tiny.HIDDEN)}
    safetensors.torch.save_file(tensors, tmp_path / "v", {**headers, "layer_config": text})
    with pytest.raises(ValueError, match=message):
        SteeringVector.load(tmp_path / "v")
