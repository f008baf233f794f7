"""Rows of single prompts."""

from typing import Any

import numpy as np
import pytest
import torch

from steering_vectors import (
    SteeringVector,
    SteeringVectorTrainingSample,
    completion,
    extract_activations,
    from_index,
    read_activations,
    train_steering_vector,
)
from tests import tiny

TEXTS = ["I love it", "I hate it", "I", "You"]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mamba"])
def test_rows_are_each_prompt_s_last_token_in_their_order(architecture: str) -> None:
    model, tokenizer = tiny.shared(architecture), tiny.tokenizer()
    rows = read_activations(model, tokenizer, TEXTS)
    assert sorted(rows) == list(range(tiny.LAYERS))
    for number, text in enumerate(TEXTS):
        for layer, expected in enumerate(tiny.hidden_states(model, tokenizer(text)["input_ids"])):
            torch.testing.assert_close(rows[layer][number], expected[-1], atol=1e-5, rtol=1e-5)


def test_texts_and_their_token_ids_are_read_alike() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    for kwargs in ({}, {"read_token_index": 0}, {"tokens": from_index(0)}):
        by_text = read_activations(model, tokenizer, iter(TEXTS), layers=[1], **kwargs)
        by_ids = read_activations(model, tokenizer, ids, layers=[1], batch_size=3, **kwargs)
        torch.testing.assert_close(by_text[1], by_ids[1], atol=1e-5, rtol=1e-5)


def test_rows_are_those_that_training_reads_also_under_a_steering() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])]
    for tokens in (None, from_index(1)):
        with SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(model, tokens=tokens):
            positive, negative = extract_activations(model, tokenizer, pairs, layers=[1])
            rows = read_activations(model, tokenizer, [*(p for p, _ in pairs), *(n for _, n in pairs)], layers=[1])
        expected = torch.cat([*positive[1], *negative[1]])
        torch.testing.assert_close(rows[1], expected, atol=1e-5, rtol=1e-5)


def test_chats_are_read_as_in_training() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer(chat_template=tiny.CHATML)
    chats = [
        [{"role": "user", "content": "How?"}, {"role": "assistant", "content": said}] for said in ("Well.", "Ill!")
    ]
    for tokens in (None, completion()):
        positive, negative = extract_activations(model, tokenizer, [tuple(chats)], layers=[1], tokens=tokens)
        rows = read_activations(model, tokenizer, chats, layers=[1], tokens=tokens)
        torch.testing.assert_close(rows[1], torch.cat([*positive[1], *negative[1]]), atol=1e-5, rtol=1e-5)


def test_half_precision_gives_float32() -> None:
    model = tiny.build("llama").to(torch.bfloat16)
    assert read_activations(model, tiny.tokenizer(), TEXTS, layers=[0])[0].dtype is torch.float32


@pytest.mark.parametrize(
    ("prompts", "kind", "message"),
    [
        ([], ValueError, "prompts is empty"),
        ("I love it", TypeError, "prompts must be texts, chats or lists of token ids, got str"),
        (["a", ""], ValueError, "prompt 1: the prompt is empty"),
        (["a", 3], TypeError, "prompt 1: expected a text, a list of chat messages or token ids, got int"),
        ([[{"role": "user", "content": "Hi"}]], ValueError, "prompt 0: the tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_read(prompts: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        read_activations(tiny.shared("llama"), tiny.tokenizer(), prompts)


def test_a_position_outside_names_the_prompt() -> None:
    with pytest.raises(ValueError, match="prompt 2: read_token_index 3 is outside the prompt, which has 1 tokens"):
        read_activations(tiny.shared("llama"), tiny.tokenizer(), TEXTS, read_token_index=3)


def test_rows_read_under_inference_mode_may_be_learnt_from() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    with torch.inference_mode():
        rows = read_activations(model, tokenizer, ["a b", "c"], layers=[1])[1]
        vector = train_steering_vector(model, tokenizer, [("a b", "c")], layers=[1])
        positive, _ = extract_activations(model, tokenizer, [("a b", "c")], layers=[1])
    for made in (rows, vector.layer_activations[1], positive[1][0]):
        weight = torch.ones(made.shape[-1], requires_grad=True)
        (made @ weight).sum().backward()
        assert weight.grad is not None


def test_token_ids_may_be_an_array_librarys_numbers() -> None:
    model, ids = tiny.shared("llama"), [5, 6, 7]
    got = read_activations(model, tiny.tokenizer(), [[np.int64(n) for n in ids], [torch.tensor(n) for n in ids]])
    expected = read_activations(model, tiny.tokenizer(), [ids, ids])
    assert all(torch.equal(got[layer], expected[layer]) for layer in expected)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", [tiny.CHATML, "<s>" + tiny.CHATML])
def test_a_place_found_with_the_tokenizer_is_that_of_the_word(template: str, bos: bool) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer(bos=bos, chat_template=template)
    chat = [{"role": "user", "content": "The owl is here"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for prompt, text, special in (
        ("The owl is here", "The owl is here", True),
        ("<s>The owl is here", "<s>The owl is here", False),
        (chat, rendered, False),
    ):
        row = read_activations(
            model,
            tokenizer,
            [prompt],
            layers=1,
            read_token_index=lambda text: tokenizer(text).char_to_token(text.index("owl")),
        )[1][0]
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        place = tokenizer.convert_ids_to_tokens(ids).index("o")
        assert tokenizer.decode(ids[place : place + 3]) == "owl"
        torch.testing.assert_close(row, tiny.hidden_states(model, ids)[1][place], atol=1e-5, rtol=1e-5)


def test_a_chat_is_read_on_the_tokens_that_generate_runs_on() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer(bos=True, chat_template=tiny.CHATML)
    chat = [{"role": "user", "content": "How?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    expected = tiny.hidden_states(model, inputs["input_ids"][0].tolist())[1]
    by_kind = [read_activations(model, tokenizer, [p], layers=1)[1][0] for p in (chat, inputs, inputs["input_ids"])]
    for row in by_kind:
        torch.testing.assert_close(row, expected[-1], atol=1e-5, rtol=1e-5)
    mean = read_activations(model, tokenizer, [chat], layers=1, tokens=from_index(0))[1][0]
    torch.testing.assert_close(mean, expected.mean(dim=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("return_tensors", [None, "pt"])
def test_pairs_may_be_what_the_tokenizer_returns(return_tensors: str | None) -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    pair = tuple(tokenizer(text, return_tensors=return_tensors) for text in TEXTS[:2])
    expected = train_steering_vector(model, tokenizer, [(TEXTS[0], TEXTS[1])], layers=[1])
    for sample in (pair, list(pair), tuple(side["input_ids"] for side in pair), SteeringVectorTrainingSample(*pair)):
        vector = train_steering_vector(model, tokenizer, [sample], layers=[1])
        assert vector == expected


PROMPTS = ["I love it so", "I hate it", "Well, I love owls", "I love it"]


class TestSeveralRowsOfAPrompt:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
    def test_are_those_that_are_read_one_by_one(self, name: str) -> None:
        model, tokenizer = tiny.shared(name), tiny.tokenizer()
        indices = [-1, 0, -3]
        found = read_activations(model, tokenizer, PROMPTS, layers=[0, 2], read_token_index=indices, batch_size=2)
        for place, index in enumerate(indices):
            alone = read_activations(model, tokenizer, PROMPTS, layers=[0, 2], read_token_index=index)
            for layer, rows in alone.items():
                torch.testing.assert_close(found[layer][:, place], rows, atol=1e-5, rtol=1e-5)

    def test_without_pooling_are_the_hidden_states_of_the_selected_tokens(self) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
        found = read_activations(model, tokenizer, PROMPTS, layers=1, tokens=from_index(1), pool=False)
        assert list(found) == [1]
        for prompt, rows in zip(PROMPTS, found[1], strict=True):
            with torch.no_grad():
                states = model(**tokenizer(prompt, return_tensors="pt"), output_hidden_states=True).hidden_states
            torch.testing.assert_close(rows, states[2][0, 1:], atol=1e-5, rtol=1e-5)

    def test_run_each_distinct_beginning_once(self) -> None:
        model = tiny.build("llama")
        few, many = (self.tokens_run(model, read_token_index=index) for index in (-1, [-1, -2, -3]))
        assert many <= few + 26  # one more prompt is run alone to compare

    def tokens_run(self, model: Any, **options: Any) -> int:
        seen: list[int] = []
        block = tiny.blocks(model)[0]
        run = type(block).forward

        def counting(module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append((args[0] if args else kwargs["hidden_states"])[..., 0].numel() if module is block else 0)
            return run(module, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(block), "forward", counting)
            read_activations(model, tiny.tokenizer(), ["one two three four five six"] * 3, layers=1, **options)
        return sum(seen)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"read_token_index": []}, ValueError, "read_token_index is empty"),
            ({"read_token_index": [-1], "tokens": from_index(1)}, ValueError, "were given: choose one of them"),
            ({"read_token_index": [-1, 0.5]}, TypeError, "prompt 0: read_token_index must be a whole number"),
            ({"read_token_index": [-1, -99]}, ValueError, "prompt 0: read_token_index -99 is outside the prompt"),
            ({"pool": False}, ValueError, "pool=False reads each of several tokens: select them with tokens="),
        ],
    )
    def test_bad_arguments(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            read_activations(tiny.shared("llama"), tiny.tokenizer(), PROMPTS, **options)
