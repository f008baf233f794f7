"""Mistakes in training are told at the call, in words that help; model and tokenizer stay as they were."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from steering_vectors import (
    SteeringVector,
    SteeringVectorTrainingSample,
    aggregate_activations,
    at,
    completion,
    extract_activations,
    from_index,
    logistic_aggregator,
    mean_aggregator,
    pca_aggregator,
    train_steering_vector,
)
from steering_vectors._extraction import walk
from tests import tiny

SAMPLES: list[Any] = [("I love it", "I hate it"), ("Great", "Bad")]
_BERT_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def chat(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def state_of(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> Any:
    """All that training could leave behind."""
    return (
        {name: (value.data_ptr(), value._version) for name, value in model.state_dict(keep_vars=True).items()},
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [[*m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks] for m in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        tokenizer.backend_tokenizer.to_str(),
        dict(tokenizer.special_tokens_map),
        dict(vars(tokenizer)),
    )


class Watched:
    """A model in mixed modes with somebody's hook on it, and a tokenizer; counts the passes."""

    def __init__(self, **tokenizer: Any) -> None:
        self.model = tiny.build("llama").train()
        tiny.blocks(self.model)[1].eval()
        self.passes = 0
        self.model.register_forward_hook(self._count)
        self.tokenizer = tiny.tokenizer(pad=False, **tokenizer)
        self.before = state_of(self.model, self.tokenizer)

    def _count(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.passes += 1

    def assert_untouched(self) -> None:
        assert state_of(self.model, self.tokenizer) == self.before


@pytest.fixture(params=[train_steering_vector, extract_activations], ids=["train", "extract"])
def function(request: pytest.FixtureRequest) -> Callable[..., Any]:
    made: Callable[..., Any] = request.param
    return made


def refused(
    function: Callable[..., Any],
    error: type[Exception],
    message: str,
    samples: Any = None,
    *,
    passes: int = 0,
    tokenizer: dict[str, Any] | None = None,
    **arguments: Any,
) -> None:
    """``function`` raises ``error`` with ``message`` after so many passes of the model, and nothing is changed."""
    watched = Watched(**(tokenizer or {}))
    with pytest.raises(error, match=message):
        function(watched.model, watched.tokenizer, SAMPLES if samples is None else samples, **arguments)
    assert watched.passes == passes
    watched.assert_untouched()


class TestSamples:
    @pytest.mark.parametrize("samples", [[], (), iter(())], ids=["list", "tuple", "iterator"])
    def test_none_at_all(self, function: Callable[..., Any], samples: Any) -> None:
        refused(
            function, ValueError, r"training_samples is empty: give at least one pair \(positive, negative\)", samples
        )

    @pytest.mark.parametrize(
        ("sample", "got"),
        [
            ("a text", "str"),
            (("one",), "tuple of length 1"),
            (("one", "two", "three"), "tuple of length 3"),
            ([], "list of length 0"),
            (None, "NoneType"),
            ([*chat("a"), *chat("b")], "list of length 2 that holds chat messages: put each chat in a list of its own"),
        ],
        ids=str,
    )
    def test_one_that_is_no_pair(self, function: Callable[..., Any], sample: Any, got: str) -> None:
        message = rf"sample 2 must be a pair \(positive, negative\) or a SteeringVectorTrainingSample, got {got}$"
        refused(function, TypeError, message, [*SAMPLES, sample])

    @pytest.mark.parametrize("samples", ["a text", 3, None.__class__])
    def test_no_pairs_but_something_else(self, function: Callable[..., Any], samples: Any) -> None:
        refused(function, TypeError, r"training_samples must be pairs \(positive, negative\), got", samples)

    def test_a_pair_in_place_of_a_list_of_pairs(self, function: Callable[..., Any]) -> None:
        refused(function, TypeError, r"training_samples is a single pair: put it in a list", ("love", "hate"))

    @pytest.mark.parametrize("empty", ["", [], ()])
    @pytest.mark.parametrize("side", ["positive", "negative"])
    def test_an_empty_prompt(self, function: Callable[..., Any], side: str, empty: Any) -> None:
        pair = (empty, "x") if side == "positive" else ("x", empty)
        refused(function, ValueError, f"^sample 2, {side} side: the prompt is empty", [*SAMPLES, pair])

    @pytest.mark.parametrize("prompt", [None, 3, 2.0, b"bytes", ["a", "b"]])
    def test_a_prompt_of_another_kind(self, function: Callable[..., Any], prompt: Any) -> None:
        message = "^sample 0, negative side: expected a text, a list of chat messages or token ids, got"
        refused(function, TypeError, message, [("x", prompt)])
        refused(function, TypeError, message, [SteeringVectorTrainingSample("x", prompt)])

    def test_a_late_one_in_a_stream_after_some_work(
        self, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(walk, "WINDOW", 2)

        def stream() -> Iterator[Any]:
            yield from SAMPLES
            yield ("", "x")

        watched = Watched()
        with pytest.raises(ValueError, match="^sample 2, positive side: the prompt is empty"):
            function(watched.model, watched.tokenizer, stream())
        assert watched.passes > 0
        watched.assert_untouched()

    @pytest.mark.parametrize(("ids", "wrong"), [([5, 320], 320), ([-1, 5], -1), ([10**9], 10**9)], ids=str)
    def test_token_ids_that_the_model_has_not(self, function: Callable[..., Any], ids: list[int], wrong: int) -> None:
        message = f"^sample 1, negative side: the prompt has the token id {wrong}, but the model has only 320 tokens"
        refused(function, ValueError, message, [([1], [2]), ([1, 2], ids)])

    @pytest.mark.parametrize("prompt", [torch.tensor([5.0]), torch.tensor(5), [5.0, 6.0], [True, False]], ids=str)
    def test_what_is_no_prompt(self, function: Callable[..., Any], prompt: Any) -> None:
        message = "^sample 0, negative side: expected a text, a list of chat messages or token ids, got"
        refused(function, TypeError, message, [("a", prompt)])

    @pytest.mark.parametrize("prompt", ["c" * 129, list(range(5, 134)), "c" * 5000])
    @pytest.mark.parametrize("where", [{}, {"read_token_index": 3}, {"tokens": from_index(1)}], ids=str)
    def test_more_tokens_than_the_model_has_positions(
        self, function: Callable[..., Any], prompt: Any, where: dict[str, Any]
    ) -> None:
        message = (
            f"^sample 1, negative side: the prompt has {len(prompt)} tokens, but GPT2LMHeadModel has position "
            f"embeddings for only 128: shorten it$"
        )
        with pytest.raises(ValueError, match=message):
            function(tiny.shared("gpt2"), tiny.tokenizer(), [("a" * 128, "b" * 128), ("c" * 128, prompt)], **where)

    def test_as_many_tokens_as_it_likes_where_positions_are_computed(self, function: Callable[..., Any]) -> None:
        function(tiny.shared("llama"), tiny.tokenizer(), [("a" * 200, "b" * 200)])

    def test_positions_that_a_text_s_own_special_tokens_may_move(self, function: Callable[..., Any]) -> None:
        text, tokenizer = "<s>The owl", tiny.tokenizer(bos=True)
        for index in (1, 5):
            for sample in ((text, "x" * 9), SteeringVectorTrainingSample(text, "x" * 9, index, -1)):
                message = (
                    f"^sample 0, positive side: read_token_index {index} may count .* once or, .* twice: leave them"
                )
                where = {"read_token_index": index} if isinstance(sample, tuple) else {}
                with pytest.raises(ValueError, match=message):
                    function(tiny.shared("llama"), tokenizer, [sample], **where)
        for index in (0, -3):
            function(tiny.shared("llama"), tokenizer, [(text, "x" * 9)], read_token_index=index)


class TestReading:
    @pytest.mark.parametrize("index", [9, 100, -10])
    def test_a_position_outside_the_prompt(self, function: Callable[..., Any], index: int) -> None:
        message = f"^sample 0, positive side: read_token_index {index} is outside the prompt, which has 9 tokens"
        refused(function, ValueError, message, read_token_index=index)

    def test_a_samples_own_position_outside_the_prompt(self, function: Callable[..., Any]) -> None:
        sample = SteeringVectorTrainingSample("love", "hate", 3, -5)
        message = "^sample 1, negative side: read_token_index -5 is outside the prompt, which has 4 tokens"
        refused(function, ValueError, message, [SAMPLES[0], sample])

    def test_a_callables_position_outside_the_prompt(self, function: Callable[..., Any]) -> None:
        message = "^sample 1, negative side: read_token_index 4 is outside the prompt, which has 3 tokens"
        refused(function, ValueError, message, read_token_index=lambda _text: 4)

    @pytest.mark.parametrize("index", [1.0, "1", None, True, [1]])
    def test_a_position_of_another_kind(self, function: Callable[..., Any], index: Any) -> None:
        message = "^sample 0, positive side: read_token_index must be a whole number or a callable that returns one"
        refused(function, TypeError, message, read_token_index=index)
        refused(function, TypeError, message, read_token_index=lambda _text: index)

    def test_a_callable_that_finds_nothing(self, function: Callable[..., Any]) -> None:
        message = "^sample 1, positive side: substring not found"
        refused(function, ValueError, message, read_token_index=lambda text: text.index("I"))

    @pytest.mark.parametrize("error", [KeyError("nowhere"), ZeroDivisionError("nowhere"), RuntimeError("nowhere")])
    def test_a_callable_that_fails(self, function: Callable[..., Any], error: Exception) -> None:
        def fail(_given: Any) -> Any:
            raise error

        message = f"^sample 0, positive side: {type(error).__name__}: .?nowhere"
        refused(function, ValueError, message, read_token_index=fail)
        refused(function, ValueError, message, tokens=fail)

    def test_a_position_and_a_selection(self, function: Callable[..., Any]) -> None:
        message = "read_token_index and tokens were given: choose one of them"
        for index in (0, -2, lambda _text: 0):
            refused(function, ValueError, message, read_token_index=index, tokens=from_index(1))

    def test_a_samples_own_position_and_a_selection(self, function: Callable[..., Any]) -> None:
        message = "^sample 0, negative side: the sample's read index and tokens were given: choose one"
        sample = SteeringVectorTrainingSample("love", "hate", read_negative_token_index=0)
        refused(function, ValueError, message, [sample], tokens=from_index(1))

    @pytest.mark.parametrize("tokens", [from_index(3), at(7), slice(3, None), [5], torch.zeros(3, dtype=torch.bool)])
    def test_a_selection_of_no_token(self, function: Callable[..., Any], tokens: Any) -> None:
        message = "^sample 1, negative side: tokens=.* selects none of the prompt's 3 tokens"
        samples = [("abcdefgh", "abcdefghi"), ("abcdefgh", "bad")]
        if isinstance(tokens, Tensor):
            message, samples = "^sample 0, positive side: tokens=.* selects none of the prompt's 8 tokens", samples[:1]
        refused(function, ValueError, message, samples, tokens=tokens)

    @pytest.mark.parametrize("tokens", [3, "generated", 1.0])
    def test_a_selection_of_another_kind(self, function: Callable[..., Any], tokens: Any) -> None:
        refused(function, TypeError, r"tokens must be a selector such as generated\(inputs\), a list", tokens=tokens)

    @pytest.mark.parametrize("mask", [torch.tensor([0, 2]), torch.tensor([0.5, 1.0])])
    def test_a_mask_of_other_numbers_than_zero_and_one(self, function: Callable[..., Any], mask: Tensor) -> None:
        refused(function, ValueError, "a mask of tokens must hold only 0 and 1", tokens=mask)

    @pytest.mark.parametrize("shape", [(), (1, 2, 3), (0,)])
    def test_a_mask_of_a_wrong_shape(self, function: Callable[..., Any], shape: tuple[int, ...]) -> None:
        refused(
            function, ValueError, r"tokens must have the shape \(seq,\) or \(batch, seq\)", tokens=torch.ones(shape)
        )

    def test_a_mask_of_several_rows(self, function: Callable[..., Any]) -> None:
        message = "^sample 0, positive side: the mask of tokens is given for 2 rows"
        refused(function, ValueError, message, tokens=torch.tensor([[0, 1], [1, 0]]))

    @pytest.mark.parametrize("weights", [-1.0, float("nan"), float("inf")])
    def test_weights_that_make_no_mean(self, function: Callable[..., Any], weights: float) -> None:
        message = "^sample 0, positive side: (tokens=.* returned negative weights|the selector .* NaN or infinite)"
        refused(function, ValueError, message, tokens=lambda positions: positions.index * weights)

    def test_a_selectors_tensor_of_a_wrong_shape(self, function: Callable[..., Any]) -> None:
        message = r"^sample 0, positive side: the selector .* returned a tensor of shape \(9,\), expected \(batch"
        refused(function, ValueError, message, tokens=lambda positions: positions.column > 0)

    def test_a_selector_that_gives_no_tensor(self, function: Callable[..., Any]) -> None:
        message = r"^sample 0, positive side: the selector .* returned list, expected a tensor"
        refused(function, TypeError, message, tokens=lambda positions: positions.index.tolist())

    def test_the_completion_of_a_text(self, function: Callable[..., Any]) -> None:
        message = r"^sample 0, positive side: tokens=completion\(\) needs to know where the prompt ends .*: give chat messages"
        refused(function, ValueError, message, tokens=completion())

    def test_the_completion_of_a_chat_that_ends_in_a_question(self, function: Callable[..., Any]) -> None:
        message = r"^sample 0, positive side: tokens=completion\(\) selects none of the prompt's \d+ tokens"
        samples = [(chat("Hi"), chat("Ho"))]
        refused(function, ValueError, message, samples, tokens=completion(), tokenizer={"chat_template": tiny.CHATML})

    def test_the_completion_of_an_empty_answer(self, function: Callable[..., Any]) -> None:
        message = r"^sample 0, negative side: tokens=completion\(\) selects none of the prompt's \d+ tokens"
        answers = [[*chat("Hi"), {"role": "assistant", "content": text}] for text in ("Ho", "")]
        tokenizer = {"chat_template": tiny.CHATML}
        refused(function, ValueError, message, [tuple(answers)], tokens=completion(), tokenizer=tokenizer)


class TestChats:
    def test_without_a_template(self, function: Callable[..., Any]) -> None:
        message = (
            r"^sample 1, positive side: the tokenizer has no chat template.*give texts, or set tokenizer\.chat_template"
        )
        refused(function, ValueError, message, [SAMPLES[0], (chat("x"), chat("Hi"))])

    @pytest.mark.parametrize(
        ("kind", "problem"),
        [
            ("image", "the chat has an image, but a tokenizer takes none: pass the model's own processor"),
            ("audio", "chat messages may hold only text and images, got a part of type audio"),
        ],
    )
    def test_with_other_content_than_text(self, function: Callable[..., Any], kind: str, problem: str) -> None:
        message = f"^sample 0, negative side: {problem}"
        content = [{"type": kind, "url": "x"}, {"type": "text", "text": "What is it?"}]
        samples = [(chat("Hi"), chat(content))]
        refused(function, ValueError, message, samples, tokenizer={"chat_template": tiny.CHATML})

    @pytest.mark.parametrize("messages", [[{"content": "Hi"}], [{"role": "user"}], [{}]])
    def test_with_messages_that_lack_role_or_content(self, function: Callable[..., Any], messages: Any) -> None:
        message = "^sample 0, positive side: a chat message must have a role and a content, got"
        refused(function, ValueError, message, [(messages, chat("x"))], tokenizer={"chat_template": tiny.CHATML})

    def test_that_the_template_refuses(self, function: Callable[..., Any]) -> None:
        template = "{{ raise_exception('System role not supported') }}"
        message = "^sample 0, positive side: .*System role not supported"
        refused(function, ValueError, message, [(chat("Hi"), chat("x"))], tokenizer={"chat_template": template})

    @pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "continue_final_message"])
    def test_with_template_arguments_that_are_ours(self, function: Callable[..., Any], name: str) -> None:
        message = f"chat_template_kwargs can't hold .*{name}"
        refused(function, ValueError, message, chat_template_kwargs={name: True})


class TestLayers:
    @pytest.mark.parametrize("layers", [3, [0, 3], -4, range(5)])
    def test_that_the_model_has_not(self, function: Callable[..., Any], layers: Any) -> None:
        message = "^layer (3|-4) does not exist: the model has 3 layers, 0 to 2, or -3 to -1 from the end$"
        refused(function, ValueError, message, layers=layers)

    def test_none_at_all(self, function: Callable[..., Any]) -> None:
        refused(function, ValueError, "layers is empty", layers=[])

    @pytest.mark.parametrize("layers", ["1", 1.5, ["1"], [1.0], True])
    def test_that_are_no_numbers(self, function: Callable[..., Any], layers: Any) -> None:
        refused(function, TypeError, "layer", layers=layers)

    def test_of_an_unknown_type(self, function: Callable[..., Any]) -> None:
        message = "unknown layer type 'attn'; expected one of decoder_block, self_attn, mlp"
        refused(function, ValueError, message, layer_type="attn")

    def test_of_a_config_that_matches_nothing(self, function: Callable[..., Any]) -> None:
        message = r"layer_config\['decoder_block'\] = 'h\.\{num\}' matches no module of LlamaForCausalLM.*model\.layers"
        refused(function, ValueError, message, layer_config={"decoder_block": "h.{num}"})

    def test_of_a_config_that_is_none(self, function: Callable[..., Any]) -> None:
        refused(
            function, TypeError, "layer_config must be a mapping from layer types to matchers", layer_config="h.{num}"
        )


class TestArguments:
    @pytest.mark.parametrize("batch_size", [0, -1, 2.0, "2", None])
    def test_a_batch_size_that_is_none(self, function: Callable[..., Any], batch_size: Any) -> None:
        refused(function, ValueError, "batch_size must be a whole number of at least 1, got", batch_size=batch_size)

    @pytest.mark.parametrize("aggregator", ["mean", None, 3])
    def test_an_aggregator_that_cannot_be_called(self, aggregator: Any) -> None:
        refused(train_steering_vector, TypeError, r"aggregator must be callable.*got", aggregator=aggregator)

    def test_an_aggregator_that_was_not_made(self) -> None:
        """``aggregator=mean_aggregator`` without its parentheses."""
        watched = Watched()
        with pytest.raises(TypeError, match="mean_aggregator"):
            train_steering_vector(watched.model, watched.tokenizer, SAMPLES, aggregator=mean_aggregator)  # type: ignore[arg-type]
        watched.assert_untouched()

    @pytest.mark.parametrize("direction", [lambda p, n: p, lambda p, n: p[0] * float("nan"), lambda p, n: None])
    def test_an_aggregator_that_gives_no_direction(self, direction: Any) -> None:
        watched = Watched()
        with pytest.raises((TypeError, ValueError), match=r"returned|NaN or infinite"):
            train_steering_vector(watched.model, watched.tokenizer, SAMPLES, aggregator=direction)
        watched.assert_untouched()

    @pytest.mark.parametrize(
        ("direction", "error", "message"),
        [
            (None, TypeError, "returned NoneType, expected a tensor"),
            (torch.ones(5), ValueError, r"returned a tensor of shape \(5,\), expected \(32,\)"),
        ],
        ids=str,
    )
    def test_an_aggregator_that_streams_and_gives_no_direction(
        self, direction: Any, error: type[Exception], message: str
    ) -> None:
        watched = Watched()
        with pytest.raises(error, match=f"the aggregator Streaming {message}"):
            train_steering_vector(watched.model, watched.tokenizer, SAMPLES, aggregator=Streaming(direction))
        watched.assert_untouched()

    @pytest.mark.parametrize("streams", [True, False])
    def test_directions_are_float32_without_gradients_whatever_the_aggregator_gives(self, streams: bool) -> None:
        given = torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
        aggregator: Any = Streaming(given) if streams else lambda _positive, _negative: given
        vector = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), SAMPLES, aggregator=aggregator)
        assert all(d.dtype is torch.float32 and not d.requires_grad for d in vector.layer_activations.values())


class Streaming:
    """An aggregator that streams, and its accumulator, which gives what it was told to."""

    def __init__(self, gives: Any) -> None:
        self.gives = gives

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        raise AssertionError

    def __repr__(self) -> str:
        return "Streaming"

    def accumulator(self, hidden: int) -> "Streaming":
        return self

    def add(self, rows: Tensor, side: str, samples: Any) -> None:
        pass

    def merge(self, other: Any) -> None:
        pass

    def direction(self) -> Any:
        return self.gives


class TestModels:
    @pytest.mark.parametrize("samples", [SAMPLES, [("a", "b")]], ids=["texts", "single tokens"])
    @pytest.mark.parametrize("with_head", [True, False])
    def test_an_encoder(self, function: Callable[..., Any], with_head: bool, samples: Any) -> None:
        model: PreTrainedModel = (BertLMHeadModel if with_head else BertModel)(BertConfig(**_BERT_SIZES)).train()
        tokenizer = tiny.tokenizer(pad=False)
        before = state_of(model, tokenizer)
        with pytest.raises(ValueError, match=f"^{type(model).__name__} is not a decoder-only language model"):
            function(model, tokenizer, samples)
        assert state_of(model, tokenizer) == before

    def test_an_encoder_decoder(self, function: Callable[..., Any]) -> None:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2}
        model = T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **sizes)).train()
        tokenizer = tiny.tokenizer(pad=False)
        before = state_of(model, tokenizer)
        with pytest.raises(ValueError, match="^T5ForConditionalGeneration is an encoder-decoder model"):
            function(model, tokenizer, SAMPLES)
        assert state_of(model, tokenizer) == before

    def test_a_pipeline(self, function: Callable[..., Any]) -> None:
        class Pipeline:
            model = tiny.shared("llama")

        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module.*got Pipeline: pass its \.model"):
            function(Pipeline(), tiny.tokenizer(), SAMPLES)

    @pytest.mark.parametrize("model", ["gpt2", None])
    def test_a_name(self, function: Callable[..., Any], model: Any) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module such as a Hugging Face model, got"):
            function(model, tiny.tokenizer(), SAMPLES)

    def test_a_tokenizer_in_its_place(self, function: Callable[..., Any]) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
            function(tiny.tokenizer(), tiny.tokenizer(), SAMPLES)

    @pytest.mark.parametrize("tokenizer", [None, "gpt2"])
    def test_no_tokenizer(self, function: Callable[..., Any], tokenizer: Any) -> None:
        with pytest.raises(TypeError, match="tokenizer must be a Hugging Face tokenizer or processor, got"):
            function(tiny.shared("llama"), tokenizer, SAMPLES)

    def test_model_and_tokenizer_changed_about(self, function: Callable[..., Any]) -> None:
        with pytest.raises(
            TypeError, match="tokenizer must be a Hugging Face tokenizer or processor, got LlamaForCausalLM"
        ):
            function(tiny.tokenizer(), tiny.shared("llama"), SAMPLES)

    @pytest.mark.parametrize("batch_size", [1, 2])
    @pytest.mark.parametrize("first", [[1, 3], [5, 9], [20, 40]])
    def test_one_that_is_steered_row_by_row(
        self, function: Callable[..., Any], first: list[int], batch_size: int
    ) -> None:
        """Which prompt is which row of a pass is the library's own affair, so the steering can't be meant."""
        watched = Watched()
        steering = SteeringVector({0: torch.ones(tiny.HIDDEN)})
        long = [("a prompt that is rather long, with some forty tokens", "short"), ("another one", "and another")]
        with pytest.raises(ValueError, match="row"), steering.apply(watched.model, tokens=from_index(first)):
            function(watched.model, watched.tokenizer, long, batch_size=batch_size)
        watched.assert_untouched()


class TestWhatIsNoAggregator:
    @pytest.mark.parametrize("aggregator", [mean_aggregator, pca_aggregator, logistic_aggregator, lambda rows: rows])
    def test_a_factory_that_was_not_called(self, aggregator: Any) -> None:
        with pytest.raises(TypeError, match="aggregator must be callable with 2 arguments, such as mean_aggregator()"):
            train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), [("a", "b")], aggregator=aggregator)
        with pytest.raises(TypeError, match="aggregator must be callable with 2 arguments"):
            aggregate_activations({0: [torch.ones(1, 2)]}, {0: [torch.ones(1, 2)]}, aggregator)

    def test_no_rows(self) -> None:
        with pytest.raises(ValueError, match="layer 0 has no rows"):
            aggregate_activations({0: []}, {0: []})

    def test_equal_sides_have_no_logistic_direction(self) -> None:
        with pytest.raises(ValueError, match="all differences between the sides are zero"):
            logistic_aggregator()(torch.ones(2, 3), torch.ones(2, 3))


def test_an_empty_text_is_an_empty_prompt_even_where_the_tokenizer_begins_each_text() -> None:
    with pytest.raises(ValueError, match="sample 0, positive side: the prompt is empty"):
        train_steering_vector(tiny.shared("llama"), tiny.tokenizer(bos=True), [("", "b")])
