"""Mistakes that are easily made, and what their errors say to write instead."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering_vectors import (
    SteeringVector,
    ablate_everywhere,
    active_patches,
    completion,
    extract_activations,
    read_activations,
    record_activations,
    residual_norms,
    train_steering_vector,
)
from tests import tiny

PAIRS = [("I love it", "I hate it"), ("a good day", "a bad day")]
CHAT = [{"role": "user", "content": "Well?"}]
ONE = torch.ones(tiny.HIDDEN)


def train(samples: Any, **options: Any) -> SteeringVector:
    return train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), samples, layers=1, **options)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ((["I love", "good"], ["I hate", "bad"]), "as in list(zip(positives, negatives))"),
        ([["a", "b", "c"], ["d", "e", "f"]], "as in list(zip(positives, negatives))"),
        ([(CHAT, "I hate it")], "sample 0 has a chat on one side and a text on the other"),
        ([{"good": "a", "bad": "b"}], "got a mapping with the keys ['bad', 'good'], expected the keys positive and"),
        ([("a", float("nan"))], "sample 0, negative side: expected a prompt, got ('a', nan): leave empty rows out"),
        (
            [({"role": "user", "content": "a"}, {"role": "user", "content": "b"})],
            "of length 2 that holds chat messages: put each chat in a list of its own",
        ),
        ("a text", "training_samples must be pairs (positive, negative), got str"),
        (("I love", "I hate"), "training_samples is a single pair: put it in a list, [(positive, negative)]"),
        ((CHAT, CHAT), "training_samples is a single pair: put it in a list, [(positive, negative)]"),
        (
            ["I love", "I hate", "Good"],
            "training_samples is a list of texts: expected pairs, as list(zip(positives, negatives)) makes them",
        ),
        (([CHAT] * 3, [CHAT] * 3), "as in list(zip(positives, negatives))"),
        ([("positive", "negative"), ("a", "b")], "sample 0 is the header of a table: read it with csv.DictReader"),
        (
            [{"\ufeffpositive": "a", "negative": "b"}],
            'begins with a byte order mark, so open it with encoding="utf-8-sig"',
        ),
        ([{"chosen": "a", "rejected": "b"}], 'write [(row["chosen"], row["rejected"]) for row in rows]'),
    ],
)
def test_samples_that_are_no_pairs(samples: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        train(samples)


class Table:
    """A table as pandas makes them: it iterates over its columns' names."""

    columns = ("positive", "negative")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, orient: str) -> list[dict[str, str]]:
        assert orient == "records"
        return [dict(zip(self.columns, pair, strict=True)) for pair in PAIRS]


def test_a_table_is_taken_row_by_row() -> None:
    table = Table()
    with pytest.raises(TypeError, match=re.escape('pass its rows, as in table.to_dict("records")')):
        train(table)
    assert train(table.to_dict("records")) == train(PAIRS)


@pytest.mark.parametrize(
    "samples",
    [
        [{"positive": positive, "negative": negative, "id": 3} for positive, negative in PAIRS],
        np.array(PAIRS),
        [np.array(pair) for pair in PAIRS],
        [list(pair) for pair in PAIRS],
    ],
    ids=["mappings", "array", "arrays", "lists"],
)
def test_rows_of_other_kinds_are_pairs(samples: Any) -> None:
    assert train(samples) == train(PAIRS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_steering_vector(tiny.shared("llama"), PAIRS), "begin with model, tokenizer, training_samples"),
        (lambda: train(PAIRS, layer=1), "the argument is layers="),
        (lambda: train(PAIRS, read_token_inde=-1), "did you mean read_token_index=?"),
        (lambda: train(PAIRS, tokens=-1), "for one token, pass a list, [-1]"),
        (lambda: train([(CHAT[0], "b")]), "of length 2 that holds chat messages"),
        (lambda: read_activations(tiny.shared("llama"), tiny.tokenizer(), "one"), "put it in a list, ['one']"),
        (lambda: read_activations(tiny.shared("llama"), tiny.tokenizer(), [CHAT[0]]), "put the message in a list"),
    ],
)
def test_arguments_of_training(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: record_activations(model, layer=1),
            "got an unexpected keyword argument 'layer'; the argument is",
        ),
        (lambda model: read_activations(model, tiny.tokenizer(), ["a"], batchsize=1), "did you mean batch_size=?"),
        (lambda model: read_activations(model, ["a"]), "'prompts'; the arguments begin with model, tokenizer, prompts"),
        (lambda model: residual_norms(model, ["a"]), "the arguments begin with model, tokenizer, texts"),
        (lambda model: extract_activations(model, PAIRS), "begin with model, tokenizer, training_samples"),
        (ablate_everywhere, "the arguments begin with model, direction"),
    ],
)
def test_arguments_of_the_other_functions(call: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(tiny.shared("llama"))


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ '<' + m.content }}{% endfor %}", "{% for m in messages %}<{{ m.content }}{% endfor %}"],
)
def test_parts_that_the_template_does_not_take(template: str) -> None:
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("good", "bad")]
    with pytest.raises(
        ValueError, match="sample 0, positive side: the chat template .* give each message its text alone"
    ):
        train_steering_vector(tiny.shared("llama"), tiny.tokenizer(chat_template=template), [chats], layers=1)


@pytest.mark.parametrize(
    ("samples", "options", "read"),
    [
        (PAIRS, {"read_token_index": 0}, "'I' and 'I' were read"),
        ([("yes", "yes"), ("no", "no")], {"layers": [0, 1]}, "'s' and 's' were read"),
    ],
)
def test_sides_that_read_the_same(samples: Any, options: dict[str, Any], read: str) -> None:
    samples = [(f"I {positive}", f"I {negative}") for positive, negative in samples]
    with pytest.warns(UserWarning, match=f"all directions are zeros: .* {read}. Does the chat template") as told:
        train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), samples, **{"layers": 1, **options})
    assert told[0].filename == __file__


def test_a_completion_of_texts() -> None:
    with pytest.raises(ValueError, match="where the prompt ends .* which only a chat shows: give chat messages"):
        train(PAIRS, tokens=completion())


@pytest.mark.parametrize("way", ["apply", "patch"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 2}, "the argument is multiplier="),
        ({"layers": 16}, "choose layers of the vector first, as in vector[16].apply(model)"),
        ({"multiplyer": 2}, "did you mean multiplier=?"),
        ({"multiplier": {16: 2}}, "for one number for each layer, use vector.scaled({16: 2})"),
        ({"operator": ablate_everywhere}, "such as ablation_operator(), but ablate_everywhere returns one instead"),
    ],
)
def test_arguments_of_steering(way: str, options: dict[str, Any], message: str) -> None:
    model = tiny.shared("llama")
    with pytest.raises(TypeError, match=re.escape(message)):
        getattr(SteeringVector({1: ONE}), way)(model, **options)
    assert active_patches(model) == []


def test_a_missing_model() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'model'"):
        SteeringVector({1: ONE}).apply()  # type: ignore[call-arg]


def test_layers_of_a_vector() -> None:
    vector = SteeringVector(dict.fromkeys(range(10, 20), ONE), metadata={"layers_of_model": "20"})
    assert vector[-1].layers == [19]
    assert vector[-3:-1].layers == [17, 18]
    with pytest.raises(TypeError, match="must be a whole number, got '16'"):
        vector["16"]  # type: ignore[index]
    with pytest.raises(LookupError, match=re.escape("no direction for layers [0-9, 20-98], only for [10-19]")):
        vector[0:99]
    with pytest.raises(LookupError, match="the depth of its model, from whose end negative numbers count, is unknown"):
        SteeringVector({1: ONE}, metadata={"layers_of_model": "many"})[-1]


def test_a_vector_as_the_direction_to_ablate() -> None:
    model = tiny.shared("llama")
    with ablate_everywhere(model, ONE):
        expected = model(torch.tensor([[5, 6, 7]])).logits
    with ablate_everywhere(model, SteeringVector({1: ONE})):
        assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, expected)
    with pytest.raises(ValueError, match=re.escape("has those of layers [0, 1]: choose one, as in vector[16]")):
        ablate_everywhere(model, SteeringVector({0: ONE, 1: ONE}))


def test_files_folders_and_repositories_name_each_other(tmp_path: Path) -> None:
    vector = SteeringVector({1: ONE})
    vector.save(tmp_path / "vector.safetensors")
    with pytest.raises(ValueError, match=r"is a file: load it with SteeringVector.load, or give its folder"):
        SteeringVector.from_pretrained(tmp_path / "vector.safetensors")
    with pytest.raises(FileNotFoundError, match="is a folder: load it with SteeringVector.from_pretrained"):
        SteeringVector.load(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="there is no file user/name; for a repository, use SteeringVector.from_pretrained"
    ):
        SteeringVector.load("user/name")


def test_positives_and_negatives_as_two_arguments() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    with pytest.raises(TypeError, match=re.escape("expected pairs, as list(zip(positives, negatives))")):
        train_steering_vector(model, tokenizer, ["I love it"], ["I hate it"])  # type: ignore[list-item, arg-type]
    with pytest.raises(
        TypeError, match=re.escape('both sides are one argument, training_samples={"positive": prompts')
    ):
        train_steering_vector(model, tokenizer, positive=["a"], negative=["b"])  # type: ignore[call-arg]


def test_prompts_that_are_read_at_their_first_token() -> None:
    samples = [("I", "you"), ("I love it", "I hate it"), ("I like it", "I loathe it")]
    tokenizer = tiny.tokenizer()
    count = sum(len(tokenizer(text)["input_ids"]) == 1 for sample in samples for text in sample)
    assert count == 1
    with pytest.warns(UserWarning, match="1 of 6 prompts were read at their first token, such as 'I'. In many") as told:
        vector = train(samples)
    assert told[0].filename == __file__
    assert vector.shares()
    with pytest.warns(UserWarning, match="2 of 2 prompts were read at their first token"):
        vector = train([("I", "a")])
    assert vector.shares() == {}  # the stream's norm isn't known
