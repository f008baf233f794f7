"""Prompts with images: read and trained on as transformers runs them, and steered, on whichever transformers is installed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    SteeringVectorTrainingSample,
    after,
    completion,
    extract_activations,
    from_index,
    generated,
    prompted,
    read_activations,
    record_activations,
    residual_norms,
    steer,
    train_steering_vector,
)
from tests import tiny, tiny_vision
from tests.tiny_vision import answered, asked, image, inputs_of

RED, GREEN = image(220), image(30, 200)


@pytest.fixture(params=tiny_vision.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def states(model: Any, processor: Any, chat: list[dict[str, Any]], **options: Any) -> list[Tensor]:
    """The model's own hidden states for a chat, ``(seq, hidden)`` for each layer but the last, which has a norm behind."""
    with torch.no_grad():
        found = model(**inputs_of(processor, chat, **options), output_hidden_states=True).hidden_states
    return [state[0] for state in found[1:-1]]


def continued() -> dict[str, Any]:
    return {"add_generation_prompt": False, "continue_final_message": True}


def close(some: Tensor, other: Tensor) -> bool:
    return torch.allclose(some, other, rtol=1e-4, atol=1e-5)


def hooks_of(model: Any) -> list[tuple[list[int], list[int]]]:
    return [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in model.modules()]


class TestReading:
    @pytest.mark.parametrize("index", [-1, -3, 0, 7, 12])
    def test_rows_are_the_models_own_hidden_states(self, family: str, index: int) -> None:
        model, processor = tiny_vision.shared(family)
        chats = [asked(RED), asked(GREEN, "And that?"), asked(RED, "Why?")]
        rows = read_activations(model, processor, chats, read_token_index=index)
        for number, chat in enumerate(chats):
            for layer, state in enumerate(states(model, processor, chat)):
                assert close(rows[layer][number], state[index])

    def test_rows_of_equal_tokens_differ_by_their_images(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        rows = read_activations(model, processor, [asked(RED), asked(GREEN), asked(RED)], layers=1)[1]
        assert torch.equal(rows[0], rows[2])
        assert not close(rows[0], rows[1])

    def test_the_completion_is_the_answers_tokens(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        chat = answered(RED, "A hat")
        rows = read_activations(model, processor, [chat], tokens=completion())
        for layer, state in enumerate(states(model, processor, chat, **continued())):
            assert close(rows[layer][0], state[-len("A hat") :].mean(dim=0))

    def test_an_answer_is_read_where_it_ends(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        chat = answered(RED, "A hat")
        rows = read_activations(model, processor, [chat])
        for layer, state in enumerate(states(model, processor, chat, **continued())):
            assert close(rows[layer][0], state[-1])

    def test_selectors_count_an_images_tokens(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        ids = inputs_of(processor, asked(RED))["input_ids"][0].tolist()
        rows = read_activations(model, processor, [asked(RED)], layers=0, tokens=from_index(1), pool=False)[0]
        assert close(rows[0], states(model, processor, asked(RED))[0][1:])
        marker = processor.tokenizer("What", add_special_tokens=False)["input_ids"]
        rows = read_activations(model, processor, [asked(RED)], layers=0, tokens=after(marker), pool=False)[0]
        start = next(n for n in range(len(ids)) if ids[n : n + 4] == marker) + 3
        assert close(rows[0], states(model, processor, asked(RED))[0][start:])

    @pytest.mark.parametrize("word", ["user", "it"])
    def test_a_callable_index_finds_words_on_both_sides_of_an_image(self, family: str, word: str) -> None:
        model, processor = tiny_vision.shared(family)

        def find(text: str) -> int:
            place: int = processor.tokenizer(text).char_to_token(text.index(word))
            return place

        rows = read_activations(model, processor, [asked(RED)], layers=0, read_token_index=find)[0]
        ids = inputs_of(processor, asked(RED))["input_ids"][0].tolist()
        part = processor.tokenizer(word, add_special_tokens=False)["input_ids"]
        place = next(n for n in range(len(ids)) if ids[n : n + len(part)] == part)
        assert close(rows[0], states(model, processor, asked(RED))[0][place])

    def test_a_callable_index_between_images_is_refused(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        parts = [{"type": "image", "image": RED}, {"type": "text", "text": "or"}, {"type": "image", "image": GREEN}]
        chat = [{"role": "user", "content": parts}]
        rows = read_activations(model, processor, [chat], layers=0)[0]
        assert close(rows[0], states(model, processor, chat)[0][-1])

        def find(text: str) -> int:
            place: int = processor.tokenizer(text).char_to_token(text.index("or"))
            return place

        with pytest.raises(ValueError, match=r"prompt 0: token \d+ of tokenizer\(text\) .* stands between images"):
            read_activations(model, processor, [chat], read_token_index=find)

    def test_several_rows_of_a_prompt_come_from_one_pass(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        read_activations(model, processor, [asked(RED)])
        calls = []
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
        rows = read_activations(model, processor, [asked(RED), asked(GREEN)], layers=1, read_token_index=[-1, -2, 3])
        handle.remove()
        assert len(calls) == 4  # a pass for each, and the first prompt's two that are compared
        for number, chat in enumerate([asked(RED), asked(GREEN)]):
            assert close(rows[1][number], states(model, processor, chat)[1][[-1, -2, 3]])

    def test_texts_beside_images_are_read_as_before(self, family: str) -> None:
        if family == "llava" and tiny.ON_TRANSFORMERS_4:
            pytest.skip("LLaVA can't run without an image there")
        model, processor = tiny_vision.shared(family)
        chat = [{"role": "user", "content": [{"type": "text", "text": "What is a hat?"}]}]
        prompts: list[Any] = ["a hat", asked(RED), chat, [5, 6, 7], asked(GREEN), "a coat"]
        rows = read_activations(model, processor, prompts)
        for number in (0, 2, 3, 5):
            tokenizer = processor.tokenizer
            alone = read_activations(model, tokenizer, [prompts[number]])
            assert all(close(rows[layer][number], alone[layer][0]) for layer in rows)
        for number in (1, 4):
            for layer, state in enumerate(states(model, processor, prompts[number])):
                assert close(rows[layer][number], state[-1])

    def test_a_pass_ends_after_the_last_layer_to_read(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        ran = []
        handle = model.lm_head.register_forward_hook(lambda *_: ran.append(1)) if hasattr(model, "lm_head") else None
        handle = handle or model.language_model.lm_head.register_forward_hook(lambda *_: ran.append(1))
        read_activations(model, processor, [asked(RED)] * 4, layers=0)
        handle.remove()
        assert len(ran) == 1  # the pass that is compared

    def test_norms_are_of_all_tokens_but_the_first(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        norms = residual_norms(model, processor, [asked(RED)])
        state = states(model, processor, asked(RED))[1]
        assert norms[1] == pytest.approx(float(torch.quantile(state[1:].norm(dim=-1), 0.5)), rel=1e-4)


class TestTraining:
    def test_pairs_and_sets_have_the_difference_of_hidden_states(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        positive, negative = [asked(RED), asked(RED, "Why?")], [asked(GREEN), asked(GREEN, "Why?")]
        trained = train_steering_vector(model, processor, list(zip(positive, negative)))
        sets = train_steering_vector(model, processor, {"positive": positive, "negative": [*negative, asked(RED)]})

        def mean(chats: list[Any], layer: int) -> Tensor:
            return torch.stack([states(model, processor, chat)[layer][-1] for chat in chats]).mean(dim=0)

        for layer in range(tiny.LAYERS - 1):
            assert close(trained.layer_activations[layer], mean(positive, layer) - mean(negative, layer))
            expected = mean(positive, layer) - mean([*negative, asked(RED)], layer)
            assert close(sets.layer_activations[layer], expected)

    def test_samples_read_indices_count_the_rows_tokens(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        sample = SteeringVectorTrainingSample(answered(RED, "Red"), answered(GREEN, "Green"), -2, 8)
        positive, negative = extract_activations(model, processor, [sample], layers=1)
        assert close(positive[1][0][0], states(model, processor, answered(RED, "Red"), **continued())[1][-2])
        assert close(negative[1][0][0], states(model, processor, answered(GREEN, "Green"), **continued())[1][8])

    def test_pixels_are_in_the_models_dtype(self, family: str) -> None:
        model, processor = tiny_vision.made(family)
        model.to(torch.bfloat16)
        rows = read_activations(model, processor, [asked(RED)], layers=1)[1]
        inputs = inputs_of(processor, asked(RED))
        inputs = {name: part.bfloat16() if part.is_floating_point() else part for name, part in inputs.items()}
        with torch.no_grad():
            expected = model(**inputs, output_hidden_states=True).hidden_states[2][0, -1]
        assert torch.equal(rows[0], expected.float())

    def test_metadata_tell_images_apart(self) -> None:
        model, processor = tiny_vision.shared("llava")
        hashes = [
            train_steering_vector(model, processor, [(asked(first), asked(GREEN))]).metadata["samples_hash"]
            for first in (RED, RED, image(90))
        ]
        assert hashes[0] == hashes[1] != hashes[2]

    def test_nothing_is_left_behind(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        with torch.no_grad():
            model(**inputs_of(processor, asked(image(90).resize((60, 20)))))
        deltas = [module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")]
        hooks = hooks_of(model)
        model.train()
        try:
            read_activations(model, processor, [asked(RED)], layers=1)
            assert all(module.training for module in model.modules())
        finally:
            model.eval()
        after = [module.rope_deltas for module in model.modules() if hasattr(module, "rope_deltas")]
        assert all(now is before for now, before in zip(after, deltas))
        assert hooks_of(model) == hooks

    def test_rows_read_inside_apply_are_steered(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        vector = SteeringVector({0: torch.ones(tiny.HIDDEN)})
        plain = read_activations(model, processor, [asked(RED)], layers=0)[0]
        for tokens in (None, from_index(2)):
            with vector.apply(model, multiplier=2, tokens=tokens):
                assert close(read_activations(model, processor, [asked(RED)], layers=0)[0], plain + 2)

    def test_few_images_are_held_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = tiny_vision.shared("llava")
        monkeypatch.setattr("steering_vectors._extraction.walk._MOST_BYTES", 1)
        passes = []
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
        taken = []

        def pairs() -> Iterator[Any]:
            for number in range(3):
                taken.append((number, len(passes)))
                yield asked(RED), asked(image(40 * number))

        trained = train_steering_vector(model, processor, pairs(), layers=1)
        handle.remove()
        counts = [count for _, count in taken]
        # The first pair's passes have others beside them, which check the way to read that was chosen.
        assert counts[0] == 0
        assert counts[2] - counts[1] == 2
        whole = train_steering_vector(
            model, processor, [(asked(RED), asked(image(40 * n))) for n in range(3)], layers=1
        )
        assert close(trained.layer_activations[1], whole.layer_activations[1])


class TestSteering:
    """Law 1, and what generate prints, of a vector that was trained on images."""

    def test_activations_change_by_the_direction_at_the_selected_tokens(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        vector = train_steering_vector(model, processor, [(asked(RED), asked(GREEN))], layers=[0])
        inputs = inputs_of(processor, asked(RED, "Look"))
        delta = vector.layer_activations[0]
        seq = inputs["input_ids"].shape[1]
        for tokens, mask in (
            (None, torch.ones(seq, dtype=torch.bool)),
            (from_index(9), torch.arange(seq) >= 9),
            (generated(inputs), torch.arange(seq) >= seq - 1),
        ):
            with torch.no_grad(), record_activations(model, layers=0) as plain:
                model(**inputs)
            with vector.apply(model, tokens=tokens), torch.no_grad(), record_activations(model, layers=0) as steered:
                model(**inputs)
            change = steered[0][0] - plain[0][0]
            assert close(change[0, mask], delta.expand(int(mask.sum()), -1))
            assert torch.equal(steered[0][0][0, ~mask], plain[0][0][0, ~mask])

    def test_generation_with_an_image_is_steered_with_and_without_a_cache(self, family: str) -> None:
        model, processor = tiny_vision.shared(family)
        vector = train_steering_vector(model, processor, [(asked(RED), asked(GREEN))], layers=[0, 1])
        inputs = inputs_of(processor, asked(RED, "Look"))

        def logits(**options: Any) -> Tensor:
            out = model.generate(
                **inputs, **options, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            return torch.stack(out.logits, dim=1)

        plain = logits()
        if family == "gemma3" and tiny.ON_TRANSFORMERS_4:
            pytest.skip("cached, it has other logits than uncached, whoever steers it")
        for tokens in (generated(inputs), prompted(inputs), None):
            with vector.apply(model, multiplier=4, tokens=tokens):
                steered = logits()
                assert torch.allclose(steered, logits(use_cache=False), atol=1e-4)
            assert not torch.allclose(steered, plain, atol=1e-2)
        with steer(model, lambda activation: 0 * activation):
            assert torch.equal(logits(), plain)


class TestRefusals:
    def test_a_tokenizer_takes_no_images(self) -> None:
        model, processor = tiny_vision.shared("llava")
        message = "prompt 0: the chat has an image, but a tokenizer takes none: pass the model's own processor"
        with pytest.raises(ValueError, match=message):
            read_activations(model, processor.tokenizer, [asked(RED)])

    def test_a_processor_of_texts_takes_no_images(self) -> None:
        model, processor = tiny_vision.shared("llava")

        class OfTexts:
            tokenizer = processor.tokenizer
            chat_template = processor.chat_template

            def __call__(self) -> None: ...

        with pytest.raises(ValueError, match="the chat has an image, but OfTexts, a processor, takes none"):
            read_activations(model, OfTexts(), [asked(RED)])

    def test_a_processor_needs_a_template(self) -> None:
        model, processor = tiny_vision.made("llava")
        processor.chat_template = processor.tokenizer.chat_template = None
        with pytest.raises(ValueError, match=r"the processor has no chat template.*set processor\.chat_template"):
            read_activations(model, processor, [asked(RED)])

    def test_a_template_of_the_tokenizer_will_do(self) -> None:
        model, processor = tiny_vision.made("llava")
        expected = read_activations(model, processor, [asked(RED)], layers=0)[0]
        processor.chat_template = None
        assert torch.equal(read_activations(model, processor, [asked(RED)], layers=0)[0], expected)

    def test_a_text_models_class_takes_no_images(self) -> None:
        _, processor = tiny_vision.shared("llava")
        message = "prompt 0: the prompt has images, but LlamaForCausalLM takes none.*no pixel_values.*ImageTextToText"
        with pytest.raises(ValueError, match=message):
            read_activations(tiny.shared("llama"), processor, [asked(RED)])

    @pytest.mark.parametrize("kind", ["video", "audio"])
    def test_other_parts_are_refused_by_name(self, kind: str) -> None:
        model, processor = tiny_vision.shared("llava")
        chat = [{"role": "user", "content": [{"type": kind, "path": "x"}]}]
        with pytest.raises(ValueError, match=f"may hold only text and images, got a part of type {kind}"):
            read_activations(model, processor, [chat])

    def test_an_image_needs_a_source(self) -> None:
        model, processor = tiny_vision.shared("llava")
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        with pytest.raises(ValueError, match="needs an 'image', a 'url' or a 'path'"):
            read_activations(model, processor, [chat])

    def test_an_image_that_is_not_there_is_named(self) -> None:
        model, processor = tiny_vision.shared("llava")
        chat = [{"role": "user", "content": [{"type": "image", "path": "no such.png"}]}]
        with pytest.raises(ValueError, match=r"prompt 0: LlavaProcessor failed on the chat's images.*no such\.png"):
            read_activations(model, processor, [chat])

    def test_what_a_processor_returned_is_no_prompt(self) -> None:
        model, processor = tiny_vision.shared("llava")
        inputs = inputs_of(processor, asked(RED))
        with pytest.raises(ValueError, match="token ids with .*pixel_values beside them can't be read: give the chat"):
            read_activations(model, processor, [inputs])

    def test_a_model_that_looks_ahead_is_refused(self) -> None:
        model, processor = tiny_vision.made("llava")

        def sees_what_follows(_module: Any, _args: Any, output: Any) -> Any:
            first = output if isinstance(output, Tensor) else output[0]
            changed = first + first.mean(dim=1, keepdim=True)
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        model.get_decoder().layers[0].register_forward_hook(sees_what_follows)
        with pytest.raises(ValueError, match="in a prompt with images, an activation changes with the tokens that"):
            read_activations(model, processor, [asked(RED)])

    def test_activations_that_are_not_finite_are_refused(self) -> None:
        model, processor = tiny_vision.made("llava")
        with torch.no_grad():
            next(model.get_decoder().layers[1].parameters()).fill_(float("nan"))
        with pytest.raises(ValueError, match="has NaN or infinite activations at layer 1"):
            read_activations(model, processor, [asked(RED)], layers=[0, 1])


def test_images_come_from_files_too(tmp_path: Any) -> None:
    model, processor = tiny_vision.shared("llava")
    path = tmp_path / "red.png"
    RED.save(path)
    chats = [[{"role": "user", "content": [{"type": "image", "path": str(path)}]}]]
    chats.append([{"role": "user", "content": [{"type": "image", "image": Image.open(path)}]}])
    rows = read_activations(model, processor, chats, layers=0)[0]
    assert torch.equal(rows[0], rows[1])
