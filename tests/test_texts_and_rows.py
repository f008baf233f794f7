"""Passes in which a row holds several texts, begins another one, or isn't the row that it was: each steered by hand."""

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from steering_vectors import SteeringVector, at, completion, from_index, generated, prompted
from tests import tiny

FIRST, SECOND, THIRD = [11, 12, 13], [21, 22, 23, 24, 25], [31]
VECTOR = SteeringVector({1: 3 * torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(0))})
SPLITS_TEXTS = pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="it doesn't tell texts apart by position ids")


def by_hand(model: Any, text: list[int], is_selected: Callable[[int], bool]) -> Tensor:
    """The logits ``(seq, vocabulary)`` of one text alone, steered by a hook written here."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        activation = (output if isinstance(output, Tensor) else output[0]).clone()
        for n in range(activation.shape[1]):
            if is_selected(n):
                activation[:, n] += VECTOR.layer_activations[1]
        return activation if isinstance(output, Tensor) else (activation, *output[1:])

    handle = tiny.blocks(model)[1].register_forward_hook(add)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([text]), use_cache=False).logits[0]
    handle.remove()
    return logits


def run(model: Any, tokens: Any, **arguments: Any) -> Any:
    with VECTOR.apply(model, tokens=tokens), torch.no_grad():
        return model(**arguments)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


def cache_name(model: Any) -> str:
    parameters = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in parameters)


BY_INDEX: list[tuple[Any, Callable[[int], bool]]] = [
    (from_index(1), lambda n: n >= 1),
    (at([0]), lambda n: n == 0),
    (slice(2, 4), lambda n: n in (2, 3)),
]


class TestSeveralTextsInARow:
    texts = (FIRST, SECOND, THIRD, FIRST)
    row = torch.tensor([[*FIRST, *SECOND, *THIRD, *FIRST]])
    places = torch.tensor([[*range(3), *range(5), 0, *range(3)]])

    def block_diagonal(self) -> Tensor:
        text = torch.repeat_interleave(torch.arange(4), torch.tensor([len(text) for text in self.texts]))
        seen = (text[:, None] == text) & torch.ones(len(text), len(text)).tril().bool()
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    @SPLITS_TEXTS
    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
    def test_are_each_steered_as_alone_by_position_ids(self, architecture: str, first: int) -> None:
        model = tiny.shared(architecture)
        if first and architecture == "gpt2":
            pytest.skip("its positions are absolute")
        for tokens, is_selected in BY_INDEX:
            got = run(model, tokens, input_ids=self.row, position_ids=self.places + first, use_cache=False).logits[0]
            close(got, torch.cat([by_hand(model, text, is_selected) for text in self.texts]))

    @pytest.mark.parametrize("with_ids", [True, False])
    def test_are_each_steered_as_alone_by_a_mask(self, with_ids: bool) -> None:
        model = tiny.shared("llama")
        more = {"position_ids": self.places} if with_ids else {}
        arguments = {"input_ids": self.row, "attention_mask": self.block_diagonal(), "use_cache": False, **more}
        seen: list[Any] = []

        def note(positions: Any) -> Tensor:
            seen.append(positions)
            return positions.index >= 1

        got = run(model, note, **arguments).logits[0]
        assert seen[0].index.tolist() == self.places.tolist()
        assert seen[0].several_texts
        if with_ids:
            close(got, torch.cat([by_hand(model, text, lambda n: n >= 1) for text in self.texts]))

    @pytest.mark.parametrize("tokens", [generated([3]), generated(), completion(), [0, -1], slice(-2, None)], ids=repr)
    def test_are_refused_where_a_prompt_or_a_row_s_end_is_meant(self, tokens: Any) -> None:
        with pytest.raises(ValueError, match="rows that hold several texts"):
            run(tiny.shared("llama"), tokens, input_ids=self.row, position_ids=self.places, use_cache=False)

    def test_are_refused_for_a_mask_by_column(self) -> None:
        mask = torch.ones(1, 12, dtype=torch.bool)
        with pytest.raises(ValueError, match="rows that hold several texts"):
            run(tiny.shared("llama"), mask, input_ids=self.row, position_ids=self.places, use_cache=False)

    def test_are_refused_beside_a_mask_that_makes_them_one(self) -> None:
        with pytest.raises(ValueError, match=r"begin again within a row, .* attention_mask or its cache make one text"):
            run(
                tiny.shared("llama"),
                from_index(1),
                input_ids=self.row,
                position_ids=self.places,
                attention_mask=torch.ones_like(self.row),
            )

    @pytest.mark.parametrize("places", [[1, 1, 1, 0, 1, 2], [0, 1, 2, 7, 8, 9], [0, 0, 1, 1, 2, 2]], ids=str)
    def test_are_not_guessed_from_ids_that_go_another_way(self, places: list[int]) -> None:
        ids = torch.tensor([[*FIRST, *FIRST]])
        with pytest.raises(ValueError, match="neither count on by one nor begin again at the row's first id"):
            run(tiny.shared("llama"), at([0]), input_ids=ids, position_ids=torch.tensor([places]))

    @pytest.mark.parametrize("on_padding", [0, 1])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_are_not_seen_in_padding(self, side: str, on_padding: int) -> None:
        padding = [0, 0]
        row, mask, places = [*padding, *FIRST], [0, 0, 1, 1, 1], [on_padding] * 2 + [0, 1, 2]
        if side == "right":
            row, mask, places = [*FIRST, *padding], mask[::-1], [0, 1, 2] + [on_padding] * 2
        arguments = {"input_ids": [row], "attention_mask": [mask], "position_ids": [places]}
        own = slice(2, None) if side == "left" else slice(0, 3)
        for tokens, is_selected in BY_INDEX:
            got = run(tiny.shared("llama"), tokens, **{k: torch.tensor(v) for k, v in arguments.items()}).logits[0, own]
            close(got, by_hand(tiny.shared("llama"), FIRST, is_selected))


@pytest.mark.parametrize("kept", [True, False])
def test_padding_that_sees_itself_in_a_mask_of_the_caller_s_is_not_counted(kept: bool) -> None:
    model, row = tiny.shared("llama"), torch.tensor([[0, 0, *FIRST]])
    visible = torch.ones(5, 5).tril().bool()
    visible[2:, :2] = False
    visible[1, 0] = False
    mask = torch.zeros(5, 5).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    places = torch.tensor([[0, 0, 0, 1, 2]])
    for tokens, is_selected in [*BY_INDEX, (generated([3]), lambda n: n >= 2)]:
        arguments = {"input_ids": row, "attention_mask": mask, "position_ids": places, "use_cache": kept}
        close(run(model, tokens, **arguments).logits[0, 2:], by_hand(model, FIRST, is_selected))


class TestASecondPrompt:
    """Classifier-free guidance runs a second prompt beside the first."""

    @staticmethod
    def inputs_of(prompt: list[int]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64)}

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize(
        "negative", [None, torch.tensor([THIRD]), torch.tensor([[*FIRST, *SECOND]])], ids=["none", "short", "long"]
    )
    @pytest.mark.parametrize("by", ["inputs", "lengths", "mask", "the same first token"])
    def test_is_refused_in_words_that_name_it(self, by: str, negative: Tensor | None, use_cache: bool) -> None:
        if by != "inputs" and negative is not None and negative.shape[1] > 5 and not use_cache:
            pytest.skip("a long row without a cache looks like a prompt with its answer")
        inputs = self.inputs_of([9, *FIRST, 9] if by == "the same first token" else SECOND)
        tokens = {"lengths": [5], "mask": {"attention_mask": inputs["attention_mask"]}}.get(by, inputs)
        model = tiny.shared("llama")
        with (
            VECTOR.apply(model, tokens=generated(tokens)),
            pytest.raises(ValueError, match=r"guidance_scale.*generated\(\)"),
        ):
            model.generate(
                **inputs, negative_prompt_ids=negative, guidance_scale=1.7, max_new_tokens=3, use_cache=use_cache
            )

    def test_is_steered_from_its_own_end_by_generated_without_inputs(self) -> None:
        model, scale = tiny.shared("llama"), 1.7
        with VECTOR.apply(model, tokens=generated()):
            out = model.generate(
                **self.inputs_of(SECOND),
                guidance_scale=scale,
                max_new_tokens=3,
                do_sample=False,
                output_scores=True,
                return_dict_in_generate=True,
            )
        conditional, unconditional = SECOND, SECOND[-1:]
        for step, scores in enumerate(out.scores):
            one, other = (
                by_hand(model, text, lambda n, start=start: n >= start)[-1].log_softmax(-1)
                for text, start in ((conditional, 4), (unconditional, 0))
            )
            close(scores[0], scale * (one - other) + other)
            new = [int(out.sequences[0, 5 + step])]
            conditional, unconditional = conditional + new, unconditional + new


class TestADecoderBesideAnEncoder:
    @staticmethod
    def build() -> Any:
        config = transformers.T5Config(
            vocab_size=64, d_model=tiny.HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(config).eval()

    @pytest.mark.parametrize("first", [0, 9])
    def test_refuses_the_encoder_s_inputs(self, first: int) -> None:
        ids = torch.tensor([[first, 8, 7, 6, 5]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model = self.build()
        with VECTOR.apply(model, tokens=generated(inputs)), pytest.raises(ValueError, match="got the encoder's inputs"):
            model.generate(**inputs, max_new_tokens=3)

    def test_takes_its_own_inputs_or_lengths(self) -> None:
        ids, start = torch.tensor([[9, 8, 7, 6, 5]]), torch.tensor([[0, 11, 12]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": start}
        model, answers = self.build(), []
        for tokens in (generated(inputs), generated(3), generated(), from_index(2)):
            with VECTOR.apply(model, tokens=tokens):
                answers.append(model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist())
        assert answers == [answers[-1]] * 4


class TestTheFirstPass:
    """``generated()`` takes it for the prompt, and for no more."""

    row = torch.tensor([SECOND])

    @pytest.mark.parametrize("tokens", [generated(), prompted(), completion()], ids=repr)
    def test_is_no_prompt_where_no_cache_was_asked_for(self, tokens: Any) -> None:
        for arguments in ({}, {"use_cache": False}, {"use_cache": None}):
            with pytest.raises(
                ValueError, match="a cache, given or asked for with use_cache=True, whose first pass was"
            ):
                run(tiny.shared("llama"), tokens, input_ids=self.row, **arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the model ran, but .* selected none")
            run(tiny.shared("llama"), tokens, input_ids=self.row, use_cache=True)

    @pytest.mark.parametrize("drafted", [2, 5])
    def test_is_no_prompt_where_it_may_hold_a_draft(self, drafted: int) -> None:
        """Prompt lookup drafts from the prompt itself, also in its first pass."""
        model, ids = tiny.shared("llama"), torch.tensor([[*SECOND, *SECOND, *SECOND]])
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 319}
        with VECTOR.apply(model, tokens=generated()), pytest.raises(ValueError, match="the prompt and no more"):
            model.generate(ids, prompt_lookup_num_tokens=drafted, **options)
        with VECTOR.apply(model, tokens=generated([15])):
            drafts = model.generate(ids, prompt_lookup_num_tokens=drafted, **options)
            assert torch.equal(drafts, model.generate(ids, **options))


@pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="there its states can't be copied")
class TestACacheWithoutALength:
    """A recurrent model's, as Mamba's."""

    row = torch.tensor([SECOND])

    def test_that_was_copied_or_filled_before_is_refused_or_counted_by_a_mask(self) -> None:
        model = tiny.shared("mamba")
        name = cache_name(model)
        with torch.no_grad():
            filled = model(self.row[:, :4], use_cache=True)[name]
        expected = by_hand(model, SECOND, lambda n: n == 4)[-1]
        for cache in (filled, copy.deepcopy(filled)):
            with pytest.raises(ValueError, match="doesn't say how many tokens it holds"):
                run(model, at([4]), input_ids=self.row[:, 4:], **{name: copy.deepcopy(cache)})
            mask = torch.ones(1, 5, dtype=torch.int64)
            close(
                run(model, at([4]), input_ids=self.row[:, 4:], attention_mask=mask, **{name: cache}).logits[0, -1],
                expected,
            )

    def test_is_followed_until_another_pass_changes_it(self) -> None:
        model = tiny.shared("mamba")
        name, expected = cache_name(model), by_hand(model, SECOND, lambda n: n == 4)[-1]
        with VECTOR.apply(model, tokens=at([4])), torch.no_grad():
            cache = model(self.row[:, :4], use_cache=True)[name]
            cache.reorder_cache(torch.tensor([0]))
            close(model(self.row[:, 4:], **{name: cache}).logits[0, -1], expected)
            for layer in cache.layers:
                layer.recurrent_states[0].mul_(2)
            with pytest.raises(ValueError, match="doesn't say how many tokens it holds, and some were put in while"):
                model(self.row[:, 4:], **{name: cache})
            cache.reset()
            close(model(self.row, **{name: cache}).logits[0, -1], expected)

    def test_is_recognized_in_a_copy_that_was_made_after_its_last_pass(self) -> None:
        model = tiny.shared("mamba")
        name, expected = cache_name(model), by_hand(model, SECOND, lambda n: n == 4)[-1]
        with VECTOR.apply(model, tokens=at([4])), torch.no_grad():
            cache = model(self.row[:, :4], use_cache=True)[name]
            for again in (copy.deepcopy(cache), copy.deepcopy(cache)):
                close(model(self.row[:, 4:], **{name: again}).logits[0, -1], expected)
            advanced = copy.deepcopy(cache)
            model(self.row[:, 4:], **{name: cache})
            with pytest.raises(ValueError, match="doesn't say how many tokens it holds"):
                model(self.row[:, 4:], **{name: advanced})


@pytest.mark.parametrize("ids_by", ["column", "token"])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_caller_s_position_ids_over_a_cache_count_each_row_from_its_first_token(
    kind: str, with_mask: bool, ids_by: str
) -> None:
    model: Any = tiny.shared("llama")
    of_a_size = {"max_batch_size": 2} if tiny.ON_TRANSFORMERS_4 else {}
    static = transformers.StaticCache(config=model.config, max_cache_len=16, **of_a_size) if kind == "static" else None
    cache = {cache_name(model): static or transformers.DynamicCache()}
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    tokens = torch.randint(5, 300, mask.shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9).expand(2, -1) if ids_by == "column" else (mask.cumsum(1) - 1).clamp(min=0)
    seen = []

    def look(given: Any) -> Tensor:
        seen.append(given.index)
        return given.index >= 2

    with VECTOR.apply(model, tokens=look), torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
            told = {"attention_mask": mask[:, :stop]} if with_mask or start == 0 else {}
            now = slice(start, stop)
            model(tokens[:, now], position_ids=positions[:, now], use_cache=True, **told, **cache)
    assert torch.cat(seen, dim=1).tolist() == [[-1, -1, -1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
