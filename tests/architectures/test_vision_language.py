"""Every vision-language class of the installed transformers, with a vision tower shallower and deeper than its text model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors import SteeringVector, from_index, generated, prompted, record_activations
from steering_vectors.layer_matching import find_layers
from tests.architectures.reading import check_reading
from tests.architectures.test_causal import Note, by_hand, close
from tests.architectures.tiny_models import tiny_vision_language_model, vision_language_model_types

TEXT_LAYERS = 3

# A policy for robots: its own transformer beside a whole vision-language model.
REFUSED = {"pi0": "can't tell which modules are the decoder blocks"}
# Where the blocks are, told by hand, in the models that don't run on text alone.
BLOCKS_BY_HAND = {
    "blip": "text_decoder.bert.encoder.layer",
    "blip-2": "language_model.model.decoder.layers",
    "florence2": "model.language_model.decoder.layers",
    "idefics": "model.layers",
    "instructblip": "language_model.model.decoder.layers",
    "instructblipvideo": "language_model.model.decoder.layers",
    "kosmos-2": "text_model.model.layers",
    "llama4": "language_model.model.layers",
    "mllama": "model.language_model.layers",
    "pix2struct": "decoder.layer",
    "pp_formulanet": "model.decoder.layers",
    "t5gemma2": "model.decoder.layers",
    "udop": "decoder.block",
    "vision-encoder-decoder": "decoder.transformer.h",
}


NO_TEXT_ALONE = {
    *BLOCKS_BY_HAND,
    *REFUSED,
    "diffusion_gemma",  # fills in a canvas
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),  # their tiny configs lack what places images
}
# What can't be read for training, and the words in which it is refused.
NOT_READ = {
    **dict.fromkeys(("gemma3n", "glm5_next", "hy_v4_vl"), "can't find the tokens of a pass"),
    "paligemma": "an activation changes with the tokens that follow it",  # all of a prompt sees all of it
}


@pytest.mark.parametrize("vision_layers", [2, 5])
@pytest.mark.parametrize("model_type", vision_language_model_types())
def test_layers_are_the_text_model_s(model_type: str, vision_layers: int, note: Note) -> None:
    torch.set_num_threads(1)
    model = tiny_vision_language_model(model_type, vision_layers=vision_layers)
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            find_layers(model)
        note(model_type, "text layers", "refused")
        return
    found = find_layers(model)
    if model_type in BLOCKS_BY_HAND:
        path = BLOCKS_BY_HAND[model_type]
        assert found.names == {n: f"{path}.{n}" for n in range(TEXT_LAYERS)}
        note(model_type, "text layers", "as told by hand")
        return
    with record_activations(model) as activations, torch.no_grad():
        states = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    assert sorted(activations) == list(range(found.count))
    for layer in range(found.count - 1):
        assert torch.equal(activations[layer][0], states[layer + 1])
    note(model_type, "text layers", "as hidden_states")


@pytest.mark.parametrize("model_type", [n for n in vision_language_model_types() if n not in NO_TEXT_ALONE])
def test_rows_of_texts_are_read_as_of_each_prompt_alone(model_type: str, note: Note) -> None:
    torch.set_num_threads(1)
    model = tiny_vision_language_model(model_type, vision_layers=2)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    note(model_type, "reads", check_reading(model, NOT_READ.get(model_type)))


def with_image(model_type: str) -> tuple[Any, dict[str, Tensor]]:
    """A model, and two prompts with an image each, the first one padded on the left."""
    generator = torch.Generator().manual_seed(0)
    image, start = 4, {"qwen2_5_vl": [99]}.get(model_type, [])
    overrides = {"gemma3": {"mm_tokens_per_image": image}}.get(model_type, {})
    model: Any = tiny_vision_language_model(model_type, vision_layers=5, **overrides)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    model.generation_config.eos_token_id = None
    token = model.config.image_token_id
    rows = [[5, *start, *[token] * image, 6, 7], [8, 9, 10, *start, *[token] * image, 11, 12]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if model_type == "qwen2_5_vl":
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        inputs["pixel_values"] = torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=generator)
        inputs["mm_token_type_ids"] = (ids == token).int()
    else:
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    if model_type == "gemma3":
        inputs["token_type_ids"] = (ids == token).long()
    return model, inputs


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_5_vl"])
def test_generation_with_an_image_is_steered_by_token(model_type: str, note: Note) -> None:
    model, inputs = with_image(model_type)
    vector = SteeringVector({0: torch.randn(32), 2: torch.randn(32)})

    def logits(**options: Any) -> Tensor:
        out = model.generate(
            **inputs, **options, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.stack(out.logits, dim=1)

    plain = logits()
    assert close(plain, logits(use_cache=False))
    for tokens in (generated(inputs), prompted(inputs), from_index(2)):
        with vector.apply(model, tokens=tokens):
            steered = logits()
            assert close(steered, logits(use_cache=False))
        assert not close(steered, plain)
    first = inputs["input_ids"].shape[1] - 1
    with by_hand(model, vector, model_type, first_column=first, cached=True):
        expected = logits()
    with vector.apply(model, tokens=generated(inputs)):
        assert close(logits(), expected)
    note(model_type, "images", "in the prompt")
