"""The training call and its two halves."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors import (
    SteeringVector,
    SteeringVectorTrainingSample,
    TokenPositions,
    aggregate_activations,
    at,
    completion,
    extract_activations,
    from_index,
    generated,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    prompted,
    record_activations,
    train_steering_vector,
)
from steering_vectors._extraction import walk
from tests import tiny
from tests.test_extraction import states_of

SAMPLES = [
    ("I love this film", "I hate this film"),
    ("Great!", "Awful, and far too long"),
    ("So good", "Bad"),
    ("It was a joy to watch", "It was a chore"),
    ("yes", "no"),
]
SMALL = SAMPLES[:2]


def ids_of(text: str, bos: bool = False) -> list[int]:
    ids: list[int] = tiny.tokenizer(bos=bos)(text)["input_ids"]
    return ids


def by_hand(
    model: Any, samples: list[tuple[str, str]], read: Callable[[Tensor], Tensor] = lambda rows: rows[-1]
) -> dict[int, Tensor]:
    """Contrastive activation addition, written out: the mean difference of what ``read`` takes of (seq, hidden)."""
    directions: dict[int, Tensor] = {}
    for positive, negative in samples:
        sides = [tiny.hidden_states(model, ids_of(text)) for text in (positive, negative)]
        for layer, (good, bad) in enumerate(zip(*sides, strict=True)):
            difference = (read(good).double() - read(bad).double()) / len(samples)
            directions[layer] = directions.get(layer, torch.zeros_like(difference)) + difference
    return {layer: direction.float() for layer, direction in directions.items()}


def assert_directions(vector: SteeringVector, expected: dict[int, Tensor]) -> None:
    assert vector.layers == sorted(expected)
    for layer, direction in expected.items():
        torch.testing.assert_close(vector.layer_activations[layer], direction, atol=1e-5, rtol=1e-5)


def assert_same(one: SteeringVector, other: SteeringVector) -> None:
    assert one.layer_type == other.layer_type
    assert_directions(one, other.layer_activations)


def mode_of(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


class TestDirections:
    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_mean_differences_of_each_prompt_alone(self, architecture: str, batch_size: int) -> None:
        model = tiny.shared(architecture)
        vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=batch_size)
        assert_directions(vector, by_hand(model, SAMPLES))
        assert vector.layer_type == "decoder_block"
        assert {(d.dtype, tuple(d.shape)) for d in vector.layer_activations.values()} == {
            (torch.float32, (tiny.HIDDEN,))
        }

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_mean_differences_of_hugging_faces_hidden_states(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        vector = train_steering_vector(model, tiny.tokenizer(), SMALL, batch_size=2)
        for layer in vector.layers[:-1]:
            sides = [[states_of(model, ids_of(text))[layer][-1] for text in side] for side in zip(*SMALL, strict=True)]
            expected = torch.stack(sides[0]).mean(dim=0) - torch.stack(sides[1]).mean(dim=0)
            torch.testing.assert_close(vector.layer_activations[layer], expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("pad", [True, False], ids=["padding token", "no padding token"])
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "bloom", "gemma2", "mamba"])
    def test_do_not_depend_on_the_tokenizers_padding(self, architecture: str, pad: bool, padding_side: str) -> None:
        model, tokenizer = tiny.shared(architecture), tiny.tokenizer(padding_side=padding_side, pad=pad)
        assert_directions(train_steering_vector(model, tokenizer, SAMPLES, batch_size=3), by_hand(model, SAMPLES))
        assert tokenizer.padding_side == padding_side
        assert (tokenizer.pad_token is None) is not pad

    @settings(deadline=None, max_examples=20)
    @given(order=st.permutations(SAMPLES), batch_size=st.integers(1, 6), window=st.integers(1, 6))
    def test_do_not_depend_on_order_or_partition(
        self, order: list[tuple[str, str]], batch_size: int, window: int
    ) -> None:
        model = tiny.shared("gpt2")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(walk, "WINDOW", window)
            vector = train_steering_vector(model, tiny.tokenizer(), order, layers=[0, 2], batch_size=batch_size)
        expected = by_hand(model, SAMPLES)
        assert_directions(vector, {layer: expected[layer] for layer in (0, 2)})

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_narrow_models_are_float32_and_summed_widely(self, dtype: torch.dtype) -> None:
        model = tiny.build("llama").to(dtype)
        many = SAMPLES * 40
        vector = train_steering_vector(model, tiny.tokenizer(), many, batch_size=8)
        positive, negative = extract_activations(model, tiny.tokenizer(), many, batch_size=8)
        for layer, direction in vector.layer_activations.items():
            assert direction.dtype is torch.float32
            wide = torch.cat(positive[layer]).double().mean(dim=0) - torch.cat(negative[layer]).double().mean(dim=0)
            torch.testing.assert_close(direction, wide.float(), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("aggregator", [mean_aggregator(), pca_aggregator(), logistic_aggregator()], ids=repr)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("n", [1, 5])
    def test_of_any_aggregator_are_finite_float32(self, aggregator: Any, dtype: torch.dtype, n: int) -> None:
        model = tiny.build("llama").to(dtype)
        vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES[:n], aggregator=aggregator, layers=1)
        assert vector.layer_activations[1].dtype is torch.float32
        assert vector.layer_activations[1].isfinite().all()

    def test_of_a_model_whose_lists_are_named_by_hand(self) -> None:
        model = tiny.shared("llama")
        config: Any = {"decoder_block": "model.layers.{num}.mlp"}
        vector = train_steering_vector(model, tiny.tokenizer(), SMALL, layer_config=config)
        expected = train_steering_vector(model, tiny.tokenizer(), SMALL, layer_type="mlp")
        assert_directions(vector, expected.layer_activations)
        assert (vector.layer_type, expected.layer_type) == ("decoder_block", "mlp")

    @pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"])
    @pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral", "gpt2"])
    def test_of_other_layer_types_are_those_modules(self, architecture: str, layer_type: Any) -> None:
        model = tiny.shared(architecture)
        vector = train_steering_vector(model, tiny.tokenizer(), SMALL, layer_type=layer_type, batch_size=2)
        rows: list[dict[int, Tensor]] = []
        for text in (text for pair in SMALL for text in pair):
            with record_activations(model, layer_type) as records, torch.no_grad():
                model(torch.tensor([ids_of(text)]))
            rows.append({n: a[0].reshape(-1, tiny.HIDDEN)[-1] for n, a in records.items()})
        for layer, direction in vector.layer_activations.items():
            expected = (rows[0][layer] - rows[1][layer] + rows[2][layer] - rows[3][layer]) / 2
            torch.testing.assert_close(direction, expected, atol=1e-5, rtol=1e-5)

    def test_steer_where_they_were_read(self) -> None:
        model = tiny.shared("llama")
        vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES, layers=[1])
        ids = torch.tensor([ids_of("It is")])
        with record_activations(model, layers=1) as plain, torch.no_grad():
            model(ids)
        with vector.apply(model), record_activations(model, layers=1) as steered, torch.no_grad():
            model(ids)
        torch.testing.assert_close(steered[1][0], plain[1][0] + vector.layer_activations[1])

    def test_carry_no_gradients(self) -> None:
        vector = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), SMALL)
        assert not any(direction.requires_grad for direction in vector.layer_activations.values())

    def test_inside_a_steering_are_read_from_what_was_steered(self) -> None:
        model = tiny.shared("llama")
        ablate = SteeringVector({0: torch.ones(tiny.HIDDEN)})
        plain = train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=2)
        with ablate.apply(model, operator=lambda activation, _direction: -activation):
            steered = train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=2)
        assert torch.equal(steered.layer_activations[0], torch.zeros(tiny.HIDDEN))
        assert torch.equal(steered.layer_activations[2], torch.zeros(tiny.HIDDEN))
        assert plain.norms()[0] > 0

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_inside_a_steering_of_some_tokens_are_read_from_what_was_steered(self, batch_size: int) -> None:
        model = tiny.shared("llama")
        steering = SteeringVector({0: torch.ones(tiny.HIDDEN)})
        plain, _ = extract_activations(model, tiny.tokenizer(), SAMPLES, layers=0, batch_size=batch_size)
        with steering.apply(model, tokens=from_index(6)):
            steered, _ = extract_activations(model, tiny.tokenizer(), SAMPLES, layers=0, batch_size=batch_size)
        changes = torch.cat(steered[0]) - torch.cat(plain[0])
        expected = torch.tensor([float(len(ids_of(positive)) > 6) for positive, _ in SAMPLES])
        torch.testing.assert_close(changes, expected[:, None].expand_as(changes), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("tokens", [[-1], slice(-2, None)], ids=str)
    def test_inside_a_steering_that_counts_from_the_end_are_each_prompts_own_or_refused(self, tokens: Any) -> None:
        """The end of a pass is padding for most of its prompts."""
        model = tiny.shared("llama")
        with SteeringVector({0: torch.ones(tiny.HIDDEN)}).apply(model, tokens=tokens):
            alone = [
                tiny.hidden_states(model, ids_of(positive))[1][-1] - tiny.hidden_states(model, ids_of(negative))[1][-1]
                for positive, negative in SAMPLES
            ]
            try:
                vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES, layers=1, batch_size=5)
            except ValueError:
                return
        assert_directions(vector, {1: torch.stack(alone).mean(dim=0)})


class TestSamples:
    def test_may_be_tuples_lists_and_samples_mixed(self) -> None:
        model = tiny.shared("gpt2")
        mixed = [SAMPLES[0], list(SAMPLES[1]), SteeringVectorTrainingSample(*SAMPLES[2])]
        vector = train_steering_vector(model, tiny.tokenizer(), mixed)
        assert_directions(vector, by_hand(model, SAMPLES[:3]))

    @pytest.mark.parametrize(
        "make", [list, tuple, iter, lambda s: (pair for pair in s), lambda s: dict.fromkeys(s).keys()]
    )
    def test_may_come_from_any_sequence_or_iterator(self, make: Any) -> None:
        model = tiny.shared("gpt2")
        assert_directions(train_steering_vector(model, tiny.tokenizer(), make(SAMPLES)), by_hand(model, SAMPLES))

    @pytest.mark.parametrize("window", [1, 2, 3])
    def test_of_an_iterator_are_taken_once_and_in_windows(self, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(walk, "WINDOW", window)
        model = tiny.build("gpt2")
        taken: list[int] = []
        taken_at_pass: list[int] = []
        model.register_forward_hook(lambda _m, _a, _o: taken_at_pass.append(len(taken)))

        def stream() -> Iterator[tuple[str, str]]:
            for number, pair in enumerate(SAMPLES):
                taken.append(number)
                yield pair

        vector = train_steering_vector(model, tiny.tokenizer(), stream())
        assert_directions(vector, by_hand(model, SAMPLES))
        assert taken == list(range(len(SAMPLES)))
        assert min(taken_at_pass) <= window

    def test_may_have_equal_sides(self) -> None:
        vector = train_steering_vector(tiny.shared("gpt2"), tiny.tokenizer(), [("same", "same")])
        assert all(torch.equal(direction, torch.zeros(tiny.HIDDEN)) for direction in vector.layer_activations.values())

    @pytest.mark.parametrize("bos", [True, False])
    def test_that_begin_with_the_bos_token_get_no_second(self, bos: bool) -> None:
        model = tiny.shared("llama")
        written = [(f"<s>{positive}", f"<s>{negative}") for positive, negative in SMALL]
        plain = train_steering_vector(model, tiny.tokenizer(bos=True), SMALL)
        assert_same(train_steering_vector(model, tiny.tokenizer(bos=bos), written), plain)
        assert_directions(plain, by_hand_ids(model, [[ids_of(text, bos=True) for text in pair] for pair in SMALL]))


def by_hand_ids(model: Any, pairs: list[list[list[int]]]) -> dict[int, Tensor]:
    directions: dict[int, Tensor] = {}
    for positive, negative in pairs:
        sides = [tiny.hidden_states(model, ids) for ids in (positive, negative)]
        for layer, (good, bad) in enumerate(zip(*sides, strict=True)):
            directions[layer] = directions.get(layer, 0) + (good[-1] - bad[-1]) / len(pairs)
    return directions


class TestReadPositions:
    @pytest.mark.parametrize("index", [0, 1, 2, -1, -2, np.int64(-2), torch.tensor(1)])
    def test_count_the_prompts_own_tokens(self, index: Any) -> None:
        model = tiny.shared("gpt2")
        vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES[:4], read_token_index=index, batch_size=4)
        assert_directions(vector, by_hand(model, SAMPLES[:4], lambda rows: rows[int(index)]))

    def test_may_come_from_a_callable_that_gets_the_text(self) -> None:
        model = tiny.shared("gpt2")
        seen: list[str] = []

        def read(text: str) -> int:
            seen.append(text)
            return text.index("t")

        samples = [SAMPLES[0], SAMPLES[3], ("beats", "meet")]
        vector = train_steering_vector(model, tiny.tokenizer(), samples, read_token_index=read)
        assert seen == [text for pair in samples for text in pair]
        expected: dict[int, Tensor] = {}
        for positive, negative in samples:
            good, bad = (tiny.hidden_states(model, ids_of(text)) for text in (positive, negative))
            for layer in range(3):
                difference = good[layer][positive.index("t")] - bad[layer][negative.index("t")]
                expected[layer] = expected.get(layer, torch.zeros(tiny.HIDDEN)) + difference / 3
        assert_directions(vector, expected)

    def test_of_a_sample_take_the_place_of_the_calls(self) -> None:
        model = tiny.shared("gpt2")
        good, bad = (tiny.hidden_states(model, ids_of(text)) for text in SAMPLES[0])
        for own, expected in (
            ((1, 2), (1, 2)),
            ((0, None), (0, 3)),
            ((None, -2), (3, -2)),
            ((None, None), (3, 3)),
        ):
            sample = SteeringVectorTrainingSample(
                *SAMPLES[0], read_positive_token_index=own[0], read_negative_token_index=own[1]
            )
            vector = train_steering_vector(model, tiny.tokenizer(), [sample], read_token_index=3)
            assert_directions(vector, {n: good[n][expected[0]] - bad[n][expected[1]] for n in range(3)})

    @pytest.mark.parametrize("bos", [True, False])
    def test_count_the_bos_token_that_the_tokenizer_adds(self, bos: bool) -> None:
        model = tiny.shared("gpt2")
        positive, _ = extract_activations(
            model, tiny.tokenizer(bos=bos), [("hello", "world")], layers=1, read_token_index=0
        )
        expected = tiny.hidden_states(model, ids_of("hello", bos=bos))[1][0]
        torch.testing.assert_close(positive[1][0][0], expected, atol=1e-5, rtol=1e-5)


class TestTokens:
    """``tokens=``: the mean over the selected tokens of each prompt."""

    @pytest.mark.parametrize(
        ("tokens", "chosen"),
        [
            (from_index(1), lambda n: range(1, n)),
            (from_index(0), range),
            (at([0, 2]), lambda n: [0, 2] if n > 2 else [0]),
            (generated(2), lambda n: range(1, n)),
            (prompted(3), lambda n: range(2)),
            ([1], lambda n: [1]),
            ([0, -1], lambda n: [0, n - 1]),
            (slice(1, None), lambda n: range(1, n)),
            (slice(-2, None), lambda n: range(n - 2, n)),
            (slice(0, 4, 2), lambda n: [i for i in (0, 2) if i < n]),
            (torch.tensor([0, 1, 1]), lambda n: [i for i in (1, 2) if i < n]),
            (torch.tensor([[True, True, False]]), lambda n: [0, 1]),
            (lambda positions: positions.index % 2 == 0, lambda n: range(0, n, 2)),
        ],
        ids=lambda value: "" if callable(value) and value.__class__.__name__ == "function" else str(value),
    )
    @pytest.mark.parametrize("batch_size", [1, 5])
    def test_are_selected_and_averaged(self, tokens: Any, chosen: Callable[[int], Any], batch_size: int) -> None:
        model = tiny.shared("gpt2")
        vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES, tokens=tokens, batch_size=batch_size)
        assert_directions(vector, by_hand(model, SAMPLES, lambda rows: rows[list(chosen(len(rows)))].mean(dim=0)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
    def test_may_be_weighted(self, dtype: torch.dtype) -> None:
        model = tiny.shared("gpt2")
        vector = train_steering_vector(
            model, tiny.tokenizer(), SAMPLES, tokens=lambda positions: (positions.index + 1).to(dtype), batch_size=3
        )

        def mean(rows: Tensor) -> Tensor:
            weights = torch.arange(1.0, len(rows) + 1)
            return (weights @ rows) / weights.sum()

        assert_directions(vector, by_hand(model, SAMPLES, mean))

    def test_a_selector_sees_one_prompt_at_a_time(self) -> None:
        seen: list[TokenPositions] = []

        def look(positions: TokenPositions) -> Tensor:
            seen.append(positions)
            return positions.index >= 0

        train_steering_vector(tiny.shared("gpt2"), tiny.tokenizer(), [SAMPLES[0]], tokens=look, batch_size=4)
        for positions, text in zip(seen, SAMPLES[0], strict=True):
            n = len(ids_of(text))
            assert torch.equal(positions.index, torch.arange(n)[None])
            assert torch.equal(positions.column, torch.arange(n))
            assert positions.input_ids is not None
            assert positions.input_ids.tolist() == [ids_of(text)]
            assert positions.prompt_length is None

    def test_of_narrow_models_are_averaged_widely(self) -> None:
        model = tiny.build("llama").to(torch.bfloat16)
        text = "a long text, whose mean needs more digits than bfloat16 has"
        (rows,), _ = (
            side[1]
            for side in extract_activations(model, tiny.tokenizer(), [(text, text)], tokens=from_index(1), layers=1)
        )
        expected = tiny.hidden_states(model, ids_of(text))[1][1:].double().mean(dim=0).float()
        assert rows.dtype is torch.float32
        torch.testing.assert_close(rows[0], expected, atol=1e-6, rtol=1e-6)

    def test_the_first_token_is_left_out_where_it_is_a_sink(self) -> None:
        """The reason for ``from_index(1)``: one row would drown the others."""
        model = tiny.build("llama")

        def sink(_module: Any, _args: Any, output: Any) -> Any:
            activation = (output if isinstance(output, Tensor) else output[0]).clone()
            activation[:, 0] *= 1e4
            return activation if isinstance(output, Tensor) else (activation, *output[1:])

        tiny.blocks(model)[2].register_forward_hook(sink)
        plain = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), SAMPLES, layers=2, tokens=from_index(1))
        assert_same(train_steering_vector(model, tiny.tokenizer(), SAMPLES, layers=2, tokens=from_index(1)), plain)


def chat(question: str, answer: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


class TestChats:
    HEADER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    def train(self, positive: Any, negative: Any, **kwargs: Any) -> SteeringVector:
        tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
        return train_steering_vector(tiny.shared("llama"), tokenizer, [(positive, negative)], **kwargs)

    def test_that_end_in_an_answer_are_read_at_its_last_token(self) -> None:
        vector = self.train(chat("Hi", "Great"), chat("Hi", "Awful"))
        expected = by_hand(tiny.shared("llama"), [(f"{self.HEADER}Great", f"{self.HEADER}Awful")])
        assert_directions(vector, expected)

    def test_that_end_in_a_question_are_read_at_the_generation_prompts_last_token(self) -> None:
        vector = self.train(chat("Hi"), chat("Ho"))
        expected = by_hand(tiny.shared("llama"), [(self.HEADER, self.HEADER.replace("Hi", "Ho"))])
        assert_directions(vector, expected)

    def test_completion_is_the_mean_over_the_answer(self) -> None:
        vector = self.train(chat("Hi", "Great"), chat("Hi", "An awful thing"), tokens=completion())
        start = len(ids_of(self.HEADER))
        samples = [(f"{self.HEADER}Great", f"{self.HEADER}An awful thing")]
        assert_directions(vector, by_hand(tiny.shared("llama"), samples, lambda rows: rows[start:].mean(dim=0)))

    @pytest.mark.parametrize("answer", ["i", "A", "assistant", " spaced ", "naïve 🙂"])
    def test_completion_begins_at_the_right_token(self, answer: str) -> None:
        seen: list[int | None] = []

        def look(positions: TokenPositions) -> Tensor:
            assert positions.prompt_length is not None
            seen.append(int(positions.prompt_length))
            return completion()(positions)

        self.train(chat("Hi", answer), chat("Hi", "no"), tokens=look)
        assert seen == [len(ids_of(self.HEADER))] * 2

    def test_callables_get_the_rendered_text_as_far_as_it_is_read(self) -> None:
        seen: list[str] = []
        self.train(chat("Hi", "Great"), chat("Hi"), read_token_index=lambda text: seen.append(text) or 0)
        assert seen == [f"{self.HEADER}Great", self.HEADER]

    def test_integers_count_in_the_rendered_text(self) -> None:
        vector = self.train(chat("Hi", "Great"), chat("Hi", "Awful"), read_token_index=-5)
        samples = [(f"{self.HEADER}Great", f"{self.HEADER}Awful")]
        assert_directions(vector, by_hand(tiny.shared("llama"), samples, lambda rows: rows[-5]))

    def test_have_one_bos_token_where_the_tokenizer_adds_it(self) -> None:
        tokenizer = tiny.tokenizer(bos=True, chat_template="{{ bos_token }}" + tiny.CHATML)
        vector = train_steering_vector(tiny.shared("llama"), tokenizer, [(chat("Hi", "Great"), chat("Hi", "Awful"))])
        pairs = [[[1, *ids_of(f"{self.HEADER}{answer}")] for answer in ("Great", "Awful")]]
        assert_directions(vector, by_hand_ids(tiny.shared("llama"), pairs))

    def test_template_arguments_reach_the_template(self) -> None:
        template = tiny.CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n{{ mood }}")
        tokenizer = tiny.tokenizer(chat_template=template)
        samples = [(chat("Hi"), chat("Ho"))]
        vector = train_steering_vector(
            tiny.shared("llama"), tokenizer, samples, chat_template_kwargs={"mood": "gladly"}
        )
        header = f"{self.HEADER}gladly"
        assert_directions(vector, by_hand(tiny.shared("llama"), [(header, header.replace("Hi", "Ho"))]))

    def test_may_stand_in_samples_with_read_positions(self) -> None:
        sample = SteeringVectorTrainingSample(chat("Hi", "Great"), chat("Hi", "Awful"), -3, -3)
        tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
        vector = train_steering_vector(tiny.shared("llama"), tokenizer, [sample])
        samples = [(f"{self.HEADER}Great", f"{self.HEADER}Awful")]
        assert_directions(vector, by_hand(tiny.shared("llama"), samples, lambda rows: rows[-3]))

    def test_a_processor_may_stand_in_the_tokenizers_place(self) -> None:
        class Processor:
            chat_template = tiny.CHATML
            tokenizer = tiny.tokenizer()

            def __call__(self, **_kwargs: Any) -> Any:
                raise AssertionError("texts are the tokenizer's")

            def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
                return self.tokenizer.apply_chat_template(conversation, chat_template=self.chat_template, **kwargs)

        for samples in ([(chat("Hi", "Great"), chat("Hi", "Awful"))], SMALL):
            vector = train_steering_vector(tiny.shared("llama"), Processor(), samples)
            tokenizer = tiny.tokenizer(chat_template=tiny.CHATML)
            assert_same(vector, train_steering_vector(tiny.shared("llama"), tokenizer, samples))


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            (None, [0, 1, 2]),
            (1, [1]),
            (-1, [2]),
            (range(1, 3), [1, 2]),
            ([2, 0, -1, 2], [0, 2]),
            ((-3, 1), [0, 1]),
            ({2}, [2]),
            (np.int64(1), [1]),
            (np.array([2, 0]), [0, 2]),
        ],
        ids=str,
    )
    def test_come_in_any_form(self, layers: Any, expected: list[int]) -> None:
        model = tiny.shared("gpt2")
        everything = by_hand(model, SMALL)
        vector = train_steering_vector(model, tiny.tokenizer(), SMALL, layers=layers, batch_size=2)
        assert_directions(vector, {layer: everything[layer] for layer in expected})
        assert list(vector.layer_activations) == expected

    def test_may_come_from_a_generator(self) -> None:
        vector = train_steering_vector(tiny.shared("gpt2"), tiny.tokenizer(), SMALL, layers=(n for n in (2, -3)))
        assert vector.layers == [0, 2]


class TestTheModelAndTokenizer:
    @pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
    @pytest.mark.parametrize("function", [train_steering_vector, extract_activations])
    def test_batch_size_bounds_the_rows_of_a_pass(self, function: Any, batch_size: int) -> None:
        model = tiny.build("gpt2")
        """Or as many as have the 512 tokens of a pack."""
        tokenizer = tiny.tokenizer()
        longest = max(len(tokenizer(text)["input_ids"]) for sample in SAMPLES for text in sample)
        samples = [(positive * (100 // longest), negative * (100 // longest)) for positive, negative in SAMPLES]
        longest = max(len(tokenizer(text)["input_ids"]) for sample in samples for text in sample)
        most = max(2 * batch_size, 512 // longest)
        rows: list[int] = []
        tiny.blocks(model)[0].register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
        function(model, tokenizer, samples, batch_size=batch_size)
        assert max(rows) <= most
        checking = 2 + 4  # two passes tell decoders from encoders, and some prompts are run alone
        assert len(rows) <= checking + -(-2 * len(samples) // most)

    def test_a_model_in_training_mode_is_read_without_dropout_and_put_back_module_by_module(self) -> None:
        model = tiny.build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        expected = by_hand(model, SAMPLES)
        model.train()
        tiny.blocks(model)[1].eval()
        before = mode_of(model)
        assert_directions(train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=2), expected)
        assert mode_of(model) == before
        assert len(set(before)) == 2

    def test_are_put_back_after_an_error_on_the_way(self) -> None:
        model = tiny.build("gpt2").train()

        def fail(_positive: Tensor, _negative: Tensor) -> Tensor:
            raise KeyError("somebody's own aggregator")

        with pytest.raises(KeyError):
            train_steering_vector(model, tiny.tokenizer(), SAMPLES, aggregator=fail)
        assert all(mode_of(model))
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0

    def test_keep_weights_and_gradients(self) -> None:
        model = tiny.build("llama")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train_steering_vector(model, tiny.tokenizer(), SAMPLES)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())

    def test_the_tokenizer_is_not_changed(self) -> None:
        tokenizer = tiny.tokenizer(pad=False, padding_side="left")
        before = (tokenizer.backend_tokenizer.to_str(), dict(tokenizer.special_tokens_map), dict(vars(tokenizer)))
        train_steering_vector(tiny.shared("llama"), tokenizer, SAMPLES, batch_size=3)
        assert (
            tokenizer.backend_tokenizer.to_str(),
            dict(tokenizer.special_tokens_map),
            dict(vars(tokenizer)),
        ) == before

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when torch.compile is imported
    def test_wrappers_are_trained_through(self) -> None:
        class Parallel(torch.nn.Module):
            def __init__(self, module: torch.nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return self.module(*args, **kwargs)

        model = tiny.shared("gpt2")
        vector = train_steering_vector(Parallel(model), tiny.tokenizer(), SAMPLES, batch_size=2)
        assert_directions(vector, by_hand(model, SAMPLES))

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
    @pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
    def test_adapters_are_part_of_the_model(self, kind: str) -> None:
        peft = pytest.importorskip("peft")
        if kind == "lora":
            config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        else:
            config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        wrapped = peft.get_peft_model(tiny.build("llama"), config).eval()
        positive, _ = extract_activations(wrapped, tiny.tokenizer(), SAMPLES, layers=1, batch_size=3)
        for row, (text, _) in zip(torch.cat(positive[1]), SAMPLES, strict=True):
            with record_activations(wrapped, layers=1) as records, torch.no_grad():
                wrapped(input_ids=torch.tensor([ids_of(text)]))
            torch.testing.assert_close(row, records[1][0][0, -1], atol=1e-5, rtol=1e-5)

    def test_the_bare_model_gives_the_same(self) -> None:
        model = tiny.shared("gpt2")
        assert_directions(train_steering_vector(model.base_model, tiny.tokenizer(), SAMPLES), by_hand(model, SAMPLES))


class TestExtracting:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
    def test_gives_batches_in_the_samples_order(self, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(walk, "WINDOW", 2)
        model = tiny.shared("gpt2")
        sides = extract_activations(model, tiny.tokenizer(), SAMPLES, layers=[2, 0], batch_size=batch_size)
        for side, texts in zip(sides, zip(*SAMPLES, strict=True), strict=True):
            assert list(side) == [0, 2]
            for layer, batches in side.items():
                sizes = [min(batch_size, 5 - start) for start in range(0, 5, batch_size)]
                assert [len(batch) for batch in batches] == sizes
                expected = torch.stack([tiny.hidden_states(model, ids_of(text))[layer][-1] for text in texts])
                torch.testing.assert_close(torch.cat(batches), expected, atol=1e-5, rtol=1e-5)

    def test_gives_the_models_dtype(self) -> None:
        model = tiny.build("llama").to(torch.bfloat16)
        positive, negative = extract_activations(model, tiny.tokenizer(), SMALL)
        assert {batch.dtype for side in (positive, negative) for rows in side.values() for batch in rows} == {
            torch.bfloat16
        }

    @pytest.mark.parametrize("aggregator", [mean_aggregator(), pca_aggregator(), logistic_aggregator()], ids=repr)
    def test_and_aggregating_is_training(self, aggregator: Any) -> None:
        model = tiny.shared("llama")
        halves = aggregate_activations(*extract_activations(model, tiny.tokenizer(), SAMPLES, batch_size=2), aggregator)
        vector = train_steering_vector(model, tiny.tokenizer(), SAMPLES, batch_size=2, aggregator=aggregator)
        for layer, direction in vector.layer_activations.items():
            torch.testing.assert_close(halves[layer], direction, atol=1e-4, rtol=1e-4)

    def test_takes_tokens_and_template_arguments_too(self) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer(chat_template=tiny.CHATML + "{{ mood }}")
        samples = [(chat("Hi"), chat("Ho"))]
        kwargs: dict[str, Any] = {"tokens": from_index(1), "chat_template_kwargs": {"mood": "gladly"}}
        halves = aggregate_activations(*extract_activations(model, tokenizer, samples, **kwargs))
        for layer, direction in train_steering_vector(model, tokenizer, samples, **kwargs).layer_activations.items():
            torch.testing.assert_close(halves[layer], direction)

    def test_moves_to_the_cpu_what_is_asked(self) -> None:
        model = tiny.shared("llama")
        positive, _ = extract_activations(model, tiny.tokenizer(), SMALL, move_to_cpu=True)
        assert positive[0][0].device.type == "cpu"
        assert_same(
            train_steering_vector(model, tiny.tokenizer(), SMALL, move_to_cpu=True),
            train_steering_vector(model, tiny.tokenizer(), SMALL),
        )

    def test_training_does_not_go_through_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        training = sys.modules["steering_vectors.train_steering_vector"]  # as an attribute, it is the function
        monkeypatch.setattr(training, "extract_activations", None)
        monkeypatch.setattr(training, "aggregate_activations", None)
        assert_directions(
            train_steering_vector(tiny.shared("gpt2"), tiny.tokenizer(), SMALL), by_hand(tiny.shared("gpt2"), SMALL)
        )


class TestProgress:
    @pytest.mark.parametrize("window", [2, 4096])
    @pytest.mark.parametrize("batch_size", [1, 2, 16])
    @pytest.mark.parametrize("function", [train_steering_vector, extract_activations])
    def test_one_bar_counts_pairs(
        self,
        function: Any,
        batch_size: int,
        window: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(walk, "WINDOW", window)
        function(
            tiny.shared("gpt2"),
            tiny.tokenizer(),
            SAMPLES,
            show_progress=True,
            batch_size=batch_size,
            tqdm_desc="Reading pairs",
        )
        printed = capsys.readouterr().err
        assert "Reading pairs: 100%" in printed
        assert "5/5" in printed
        assert printed.count("\n") == 1

    @pytest.mark.parametrize(
        ("function", "description"),
        [(train_steering_vector, "Training steering vector"), (extract_activations, "Extracting activations")],
    )
    def test_of_an_iterator_counts_without_an_end(
        self, function: Any, description: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        function(tiny.shared("gpt2"), tiny.tokenizer(), iter(SAMPLES), show_progress=True)
        assert f"{description}: 5" in capsys.readouterr().err

    @pytest.mark.parametrize("function", [train_steering_vector, extract_activations])
    def test_is_silent_unless_asked(self, function: Any, capsys: pytest.CaptureFixture[str]) -> None:
        function(tiny.shared("gpt2"), tiny.tokenizer(), SAMPLES)
        assert capsys.readouterr() == ("", "")
