"""A model that sees images is steered alike in vLLM and in Hugging Face, with and without an image in the prompt."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_vision
from tests.vllm.plugin.comparison import SIZES, apart, expected, prepared, run
from tests.vllm.plugin.conftest import ShowCase
from tests.vllm.plugin.test_exact import EXACT

pytest.importorskip("vllm")


def test_prompts_with_images_beside_prompts_without(tmp_path: Path, show: ShowCase) -> None:
    """The vision tower has as many blocks as the language model, whose blocks are steered."""
    model, processor = tiny_vision.made("idefics3", **SIZES)
    served = prepared(tmp_path, model)
    processor.save_pretrained(served.path)
    red, blue = tiny_vision.image(200), tiny_vision.image(40, 40, 200)
    paths = {}
    for name, picture in (("red", red), ("blue", blue)):
        paths[name] = tmp_path / f"{name}.png"
        picture.save(paths[name])
    chats = {
        "red": tiny_vision.asked(red),
        "blue": tiny_vision.asked(blue),
        None: [{"role": "user", "content": [{"type": "text", "text": "What is a picture? " * 3}]}],
    }
    # One batch, and then one after the other through the prefix cache, where the image lies in the first block.
    mixed = [
        ("red", None),
        ("red", "first:1"),
        ("blue", "middle:-1.5@generated"),
        (None, "both:1"),
        ("blue", "first:0.5,both:1"),
        (None, "middle:1@generated"),
    ]
    in_turn = [("red", None), ("red", "both:1"), ("red", "both:1@generated"), ("blue", "both:1"), ("red", "both:1")]
    texts = {name: processor.apply_chat_template(chat, add_generation_prompt=True) for name, chat in chats.items()}
    batches = [
        [([texts[name], name and str(paths[name])], steering, 6) for name, steering in batch]
        for batch in (mixed, *([one] for one in in_turn))
    ]
    options = {"skip_tokenizer_init": False, "block_size": 32, "max_model_len": 128, "enable_prefix_caching": True}
    made = run(served, batches, limit_mm_per_prompt={"image": 1}, **options)
    assert_alike(show, served, processor, chats, [*mixed, *in_turn], made["answers"])
    assert [answer["cached"] for answer in made["answers"][len(mixed) :]] == [32, 0, 32, 0, 32]


def assert_alike(
    show: ShowCase, served: Any, processor: Any, chats: Any, asked: list[tuple[Any, Any]], answers: list[Any]
) -> None:
    off, effect = 0.0, math.inf
    for (name, steering), answer in zip(asked, answers, strict=True):
        inputs = tiny_vision.inputs_of(processor, chats[name])
        prompt = inputs.pop("input_ids")[0].tolist()
        assert answer["prompt"] == prompt
        images = {key: value for key, value in inputs.items() if key.startswith("pixel")}
        assert bool(images) == bool(name)
        for wanted in (steering, None):
            distance = apart(answer["steps"], expected(served, (prompt, wanted, 6), answer["tokens"], **images))
            if wanted == steering:
                off = max(off, distance)
            else:
                effect = min(effect, distance)
    show("idefics3, prompts with and without images", off, effect)
    assert off < EXACT
    assert effect > 100 * EXACT
