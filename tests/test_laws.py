"""The laws: what holds for every architecture."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import transformers
from torch import Tensor, nn

from steering_vectors import (
    SteeringVector,
    TokenPositions,
    ablate_everywhere,
    active_patches,
    after,
    at,
    clamp_operator,
    extract_activations,
    from_index,
    generated,
    prompted,
    read_activations,
    record_activations,
    select,
    steer,
    train_steering_vector,
)
from tests import families, tiny
from tests.ablated_by_hand import WRITTEN, ablated_by_hand
from tests.families import FIRST_PASS, SELECTIONS

PROMPTS = [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33]]
STEPS = 4
WITH_CHUNKS = hasattr(transformers.GenerationConfig(), "prefill_chunk_size")


def random_vector(layers: list[int], scale: float = 1.0, seed: int = 0) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    return SteeringVector({layer: scale * torch.randn(tiny.HIDDEN, generator=generator) for layer in layers})


def padded(prompts: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, prompts))
    rows = [([0] * (width - len(p)) + p if side == "left" else p + [0] * (width - len(p))) for p in prompts]
    masks = [([0] * (width - len(p)) + [1] * len(p)) for p in prompts]
    if side == "right":
        masks = [mask[::-1] for mask in masks]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def generate(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The answers' token ids and each step's logits ``(batch, steps, vocabulary)``."""
    out = model.generate(
        **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


OPERATORS = {name: case.make() for name, case in families.OPERATORS.items()}


def operator_by_hand(name: str, direction: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda h: families.OPERATORS[name].by_hand(h, direction)


Weight: TypeAlias = Callable[[int, int, list[int]], float]


def of(selection: families.Selection) -> tuple[Callable[[dict[str, Tensor]], Any], Weight]:
    return selection.tokens, selection.selects


def fading_away(step: Tensor) -> Tensor:
    return 0.5**step


class TestReadWhereYouWrite:
    """Law 1."""

    # Every selection under addition, and every operator at all tokens and at those of the answer.
    @pytest.mark.parametrize(
        ("selection", "operator"),
        [
            *((selection, "addition_operator") for selection in SELECTIONS),
            *(
                (selection, operator)
                for selection in ("all", "generated(inputs)")
                for operator in OPERATORS
                if operator != "addition_operator"
            ),
        ],
    )
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_recording_inside_is_outside_plus_delta(self, architecture: str, selection: str, operator: str) -> None:
        model = tiny.shared(architecture)
        vector = random_vector([1])
        prompt = PROMPTS[1]
        select, is_selected = of(SELECTIONS[selection])
        inputs = padded([prompt])
        with record_activations(model, layers=[0, 1]) as plain, torch.no_grad():
            model(**inputs)
        with (
            vector.apply(model, operator=OPERATORS[operator], tokens=select(inputs)),
            record_activations(model, layers=[0, 1]) as steered,
            torch.no_grad(),
        ):
            model(**inputs)
        change = operator_by_hand(operator, vector.layer_activations[1])
        assert torch.equal(steered[0][0], plain[0][0])
        for n in range(len(prompt)):
            before, after = plain[1][0][0, n], steered[1][0][0, n]
            weight = is_selected(n, len(prompt), prompt)
            if weight:
                expected = before + weight * (change(before) - before)
                torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(after, before)


class TestTheCacheDoesNotMatter:
    """Law 2."""

    @pytest.mark.parametrize("selection", SELECTIONS)
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_cached_and_uncached_generation_equal_a_loop_steered_by_hand(
        self, architecture: str, selection: str
    ) -> None:
        self.check(architecture, *of(SELECTIONS[selection]), "addition_operator", cached=(True, False))

    @pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "addition_operator"])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_under_every_operator(self, architecture: str, operator: str) -> None:
        self.check(architecture, *of(SELECTIONS["generated(inputs)"]), operator, cached=(True, False))

    @pytest.mark.parametrize("selection", FIRST_PASS)
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_the_first_pass_of_a_cache_is_the_prompt(self, architecture: str, selection: str) -> None:
        self.check(architecture, *of(FIRST_PASS[selection]), "addition_operator", cached=(True,))

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_with_a_multiplier_for_each_row(self, architecture: str) -> None:
        if architecture in tiny.IGNORE_PADDING | tiny.UNLIKE_UNCACHED:
            pytest.skip("the model itself takes padding for tokens, or differs with a cache")
        model, vector, inputs = tiny.shared(architecture), random_vector([0, 2]), padded(PROMPTS)
        multipliers = [1.5, 0.0, -2.0]
        select, is_selected = of(SELECTIONS["generated(inputs)"])
        for use_cache in (True, False):
            with vector.apply(model, multiplier=multipliers, tokens=select(inputs)):
                answers, logits = generate(model, inputs, use_cache=use_cache)
            for row, (prompt, multiplier) in enumerate(zip(PROMPTS, multipliers, strict=True)):
                moves = {
                    n: operator_by_hand("addition_operator", multiplier * d)
                    for n, d in vector.layer_activations.items()
                }
                expected_answer, expected_logits = by_hand_loop(model, prompt, moves, is_selected)
                assert answers[row].tolist() == expected_answer
                torch.testing.assert_close(logits[row], expected_logits, atol=2e-4, rtol=1e-3)

    @staticmethod
    def check(
        architecture: str,
        select: Callable[[dict[str, Tensor]], Any],
        is_selected: Weight,
        operator: str,
        cached: tuple[bool, ...],
    ) -> None:
        if architecture in tiny.UNLIKE_UNCACHED:
            cached = tuple(use_cache for use_cache in cached if not use_cache)
        model = tiny.shared(architecture)
        vector = random_vector([0, 2])
        by_hand = {layer: operator_by_hand(operator, d) for layer, d in vector.layer_activations.items()}
        # Recurrent models of transformers 4 can't leave padding out, whoever steers them.
        batches = [[p] for p in PROMPTS] if architecture in tiny.IGNORE_PADDING else [PROMPTS]
        for prompts in batches:
            inputs = padded(prompts)
            expected = [by_hand_loop(model, prompt, by_hand, is_selected) for prompt in prompts]
            for use_cache in cached:
                with vector.apply(model, operator=OPERATORS[operator], tokens=select(inputs)):
                    answers, logits = generate(model, inputs, use_cache=use_cache)
                for row, (expected_answer, expected_logits) in enumerate(expected):
                    assert answers[row].tolist() == expected_answer
                    torch.testing.assert_close(logits[row], expected_logits, atol=2e-4, rtol=1e-3)


def by_hand_loop(
    model: Any,
    prompt: list[int],
    by_hand: dict[int, Callable[[Tensor], Tensor]],
    is_selected: Weight,
) -> tuple[list[int], Tensor]:
    def steer(layer: int, _module: nn.Module, _args: Any, output: Any) -> Any:
        activation = (output if isinstance(output, Tensor) else output[0]).clone()
        for n in range(activation.shape[1]):
            weight = is_selected(n, len(prompt), ids)
            if weight:
                before = activation[0, n].clone()
                activation[0, n] += weight * (by_hand[layer](before) - before)
        return activation if isinstance(output, Tensor) else type(output)([activation, *output[1:]])

    blocks = tiny.blocks(model)
    handles = [
        blocks[layer].register_forward_hook(lambda m, a, o, layer=layer: steer(layer, m, a, o)) for layer in by_hand
    ]
    ids, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(STEPS):
            logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    for handle in handles:
        handle.remove()
    return ids[len(prompt) :], torch.stack(logits)


class TestEveryWayOfGenerating:
    """Law 2 where one prompt has several rows, where it comes in chunks, and under a static cache."""

    @pytest.mark.parametrize("architecture", tiny.WITH_BEAMS)
    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
    def test_beams_are_steered_as_their_prompts(self, architecture: str, options: dict[str, Any]) -> None:
        model, vector = tiny.shared(architecture), random_vector([1], scale=2.0)
        inputs = padded(PROMPTS[:2])
        kwargs = {**inputs, **options, "max_new_tokens": STEPS, "do_sample": False, "use_cache": True}
        with vector.apply(model, tokens=generated(inputs)):
            steered = model.generate(**kwargs)
        # By hand, on what generate runs without a cache: whole rows, repeated for the beams of each prompt.
        starts = inputs["input_ids"].shape[1] - 1

        def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
            activation = (output if isinstance(output, Tensor) else output[0]).clone()
            activation[:, starts:] += vector.layer_activations[1]
            return activation if isinstance(output, Tensor) else type(output)([activation, *output[1:]])

        handle = tiny.blocks(model)[1].register_forward_hook(steer)
        by_hand = model.generate(**{**kwargs, "use_cache": False})
        handle.remove()
        assert torch.equal(steered, by_hand)
        assert not torch.equal(steered, model.generate(**kwargs))

    @pytest.mark.parametrize("architecture", tiny.WITH_BEAMS)
    def test_beams_fade_from_their_prompts_ends_and_combine(self, architecture: str) -> None:
        model, vector, inputs = tiny.shared(architecture), random_vector([1], scale=2.0), padded(PROMPTS[:2])
        kwargs = {**inputs, "num_beams": 3, "max_new_tokens": STEPS, "do_sample": False}
        tokens = generated(inputs, strength=fading_away) | 0.5 * (~generated(inputs) & from_index([1, 2]))
        starts = inputs["input_ids"].shape[1] - 1

        def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
            activation = (output if isinstance(output, Tensor) else output[0]).clone()
            for row in range(len(activation)):
                prompt = row // 3
                for column in range(activation.shape[1]):
                    index = column - (starts + 1 - len(PROMPTS[prompt]))
                    weight = 0.5 ** (column - starts) if column >= starts else 0.5 * (index >= 1 + prompt)
                    activation[row, column] += weight * vector.layer_activations[1]
            return activation if isinstance(output, Tensor) else type(output)([activation, *output[1:]])

        handle = tiny.blocks(model)[1].register_forward_hook(steer)
        by_hand = model.generate(**kwargs, use_cache=False)
        handle.remove()
        for use_cache in (True, False):
            if use_cache and tiny.ON_TRANSFORMERS_4 and architecture == "mamba":
                continue  # its cached states are not reordered with the beams, whoever steers it
            with vector.apply(model, tokens=tokens):
                assert torch.equal(model.generate(**kwargs, use_cache=use_cache), by_hand)
        assert not torch.equal(by_hand, model.generate(**kwargs))

    @pytest.mark.parametrize("architecture", tiny.WITH_BEAMS)
    def test_beams_are_steered_each_by_what_it_has_said(self, architecture: str) -> None:
        if tiny.ON_TRANSFORMERS_4 and architecture in ("gpt2", "mamba", "mpt", "opt"):
            pytest.skip("there the cache is a tuple that generate makes anew, or its rows don't follow the beams")
        model, vector, inputs = tiny.shared(architecture), random_vector([1], scale=2.0), padded(PROMPTS[:2])
        kwargs: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False}
        answers = model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]
        early = answers[:, :3]
        # One that about half of the answers hold, and no padding.
        said = min(early.unique().tolist(), key=lambda t: (t == 0, abs(int((early == t).any(dim=1).sum()) - 3)))
        given: list[Tensor] = []

        def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
            activation = (output if isinstance(output, Tensor) else output[0]).clone()
            activation[(given[-1] == said).cumsum(dim=1) > 0] += vector.layer_activations[1]
            return activation if isinstance(output, Tensor) else type(output)([activation, *output[1:]])

        handles = [
            model.register_forward_pre_hook(lambda m, a, k: given.append(k["input_ids"]), with_kwargs=True),
            tiny.blocks(model)[1].register_forward_hook(steer),
        ]
        by_hand = model.generate(**inputs, **kwargs, use_cache=False)
        for handle in handles:
            handle.remove()
        for use_cache in (True, False):
            with vector.apply(model, tokens=after(said)):
                assert torch.equal(model.generate(**inputs, **kwargs, use_cache=use_cache), by_hand)
        assert not torch.equal(by_hand, model.generate(**inputs, **kwargs))

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_a_rejected_draft_was_not_said(self, architecture: str) -> None:
        if tiny.ON_TRANSFORMERS_4 and architecture == "gpt2":
            pytest.skip("there the cache is a tuple that generate makes anew")
        model, vector = tiny.shared(architecture), random_vector([1], scale=2.0)
        inputs = {"input_ids": torch.tensor([PROMPTS[0] * 2]), "attention_mask": torch.ones(1, 10).long()}
        kwargs: dict[str, Any] = {**inputs, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 1}
        drafted = PROMPTS[0][0]  # it follows the prompt's last token where that stood before
        for token in (drafted, *model.generate(**kwargs)[0, 10:14].tolist()):
            with vector.apply(model, tokens=at(0) | after([15, token])):
                expected = model.generate(**kwargs)
                assert torch.equal(model.generate(**kwargs, prompt_lookup_num_tokens=3), expected)

    @pytest.mark.skipif(not WITH_CHUNKS, reason="generate has no prefill_chunk_size in transformers 4.46")
    @pytest.mark.parametrize("chunk", [2, 3, 7])
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "qwen3"])
    def test_prefill_in_chunks_is_prefill_at_once(self, architecture: str, chunk: int) -> None:
        model, inputs, config = tiny.shared(architecture), padded(PROMPTS), {}
        if tiny.CHUNKS_ARE_ONE_GRAPH:  # and their positions take no account of padding, whoever steers them
            if architecture == "gpt2":
                pytest.skip("there GPT-2 isn't prefilled in chunks")
            inputs = padded(PROMPTS[1:2])
            config["compile_config"] = transformers.CompileConfig(backend="eager", fullgraph=False)
        for tokens in (
            *(generated(inputs), prompted(inputs), from_index(3), [1, 4, 8], after([14, 15]) | after(23)),
            *(generated(inputs, strength=fading_away), ~generated(inputs) & slice(1, None) | 0.5 * select([0])),
        ):
            with random_vector([1], scale=2.0).apply(model, tokens=tokens):
                expected, expected_logits = generate(model, inputs)
                answers, logits = generate(model, inputs, prefill_chunk_size=chunk, **config)
            assert torch.equal(answers, expected)
            torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)

    @pytest.mark.skipif(not tiny.CHUNKS_ARE_ONE_GRAPH, reason="generate doesn't compile them as one graph")
    def test_where_chunks_are_compiled_as_one_graph_the_error_says_what_to_write(self) -> None:
        model, inputs = tiny.build("llama"), padded(PROMPTS)
        with (
            pytest.raises(Exception, match=r"compile_config=CompileConfig\(fullgraph=False\)"),
            random_vector([1]).apply(model, tokens=generated(inputs)),
        ):
            generate(model, inputs, prefill_chunk_size=3)

    @pytest.mark.skipif(not tiny.ON_TRANSFORMERS_4, reason="transformers 5 loads contrastive search from the hub")
    @pytest.mark.parametrize(
        "selection",
        ["all", "generated(inputs)", "from_index(1)", "from_index(per row)", "after"],
    )
    def test_contrastive_search_steers_prompts_together_as_alone(self, selection: str) -> None:
        model, vector = tiny.shared("llama"), random_vector([1], scale=2.0)
        options = {"penalty_alpha": 0.6, "top_k": 3}
        said = families.Selection(lambda inputs: after([12, 13]) | after(22) | after(31), lambda index, n, ids: True)
        select, _ = of({**SELECTIONS, "after": said}[selection])
        together = padded(PROMPTS)
        with vector.apply(model, tokens=select(together)):
            answers, _ = generate(model, together, **options)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            alone = padded([prompt])
            with vector.apply(model, tokens=select(alone)):
                assert torch.equal(generate(model, alone, **options)[0][0], answer)
            assert not torch.equal(generate(model, alone, **options)[0][0], answer)

    @pytest.mark.parametrize("selection", [*SELECTIONS, *FIRST_PASS])
    @pytest.mark.parametrize("architecture", tiny.WITH_STATIC_CACHE)
    def test_a_static_cache_is_a_cache(self, architecture: str, selection: str) -> None:
        model, inputs = tiny.shared(architecture), padded(PROMPTS)
        select, _ = of({**SELECTIONS, **FIRST_PASS}[selection])
        vector = random_vector([1], scale=2.0)
        with vector.apply(model, tokens=select(inputs)):
            expected, expected_logits = generate(model, inputs)
        for _ in range(2):  # the second run finds the first one's cache
            with vector.apply(model, tokens=select(inputs)):
                answers, logits = generate(model, inputs, cache_implementation="static")
            assert torch.equal(answers, expected)
            torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)


class TestALoopThatIsWrittenByHand:
    """Law 2 where the model makes its cache, and the caller hands it back without a mask."""

    SELECTIONS = (
        ("from_index", from_index(5), lambda index: index >= 5),
        ("at", at([3, 6]), lambda index: index in (3, 6)),
        ("slice", slice(2, 7, 2), lambda index: index in (2, 4, 6)),
        ("callable", lambda positions: positions.index % 3 == 1, lambda index: index % 3 == 1),
        ("generated", generated([4]), lambda index: index >= 3),
        ("after", after([22, 23]) & ~after(26), lambda index: 2 <= index < 5),
        ("after until", after(22, until=[25, 26]), lambda index: 1 <= index < 5),
    )

    @pytest.mark.parametrize("cuts", [[8], [4, 1, 1, 1, 1], [1] * 8, [3, 3, 2]], ids=str)
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_steers_the_tokens_of_one_uncached_pass(self, architecture: str, cuts: list[int]) -> None:
        model, vector = tiny.shared(architecture), random_vector([1])
        if architecture in ("mamba", "rwkv") and cuts == [3, 3, 2]:
            pytest.skip("the model takes one token at a time after its first pass")
        if tiny.ON_TRANSFORMERS_4 and (
            architecture in ("gemma2", "gemma3") or (architecture == "mamba" and cuts[0] == 1)
        ):
            pytest.skip("the model itself differs then, or makes too small a cache")
        prompt = torch.tensor([PROMPTS[1]])
        for name, tokens, is_selected in self.SELECTIONS:
            mask = torch.tensor([is_selected(n) for n in range(prompt.shape[1])])
            moves = mask[:, None] * vector.layer_activations[1]

            def add(_m: nn.Module, _a: Any, output: Any, moves: Tensor = moves) -> Any:
                activation = output if isinstance(output, Tensor) else output[0]
                return activation + moves if isinstance(output, Tensor) else (activation + moves, *output[1:])

            handle = tiny.blocks(model)[1].register_forward_hook(add)
            with torch.no_grad():
                expected = model(prompt, use_cache=False).logits
            handle.remove()
            with vector.apply(model, tokens=tokens), torch.no_grad():
                logits = by_pieces(model, prompt, cuts)
            torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="there the model makes tuples of tensors")
    def test_counts_no_padding_of_the_first_pass_also_in_a_cache_that_was_cut(self) -> None:
        model = tiny.shared("llama")
        seen: list[list[list[int]]] = []

        def note(positions: Any) -> Tensor:
            seen.append(positions.index.tolist())
            return positions.index >= 0

        first = padded(PROMPTS[:2])
        with random_vector([1]).apply(model, tokens=note), torch.no_grad():
            name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
            cache = model(**first, use_cache=True)[name]
            for _ in range(2):
                model(torch.tensor([[9], [9]]), **{name: cache})
            cache.crop(-2)
            model(torch.tensor([[9], [9]]), **{name: cache})
        assert seen[1:3] == [[[5], [8]], [[6], [9]]]
        assert seen[3] == [[5], [8]]

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="there the model makes tuples of tensors")
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
    def test_goes_on_over_a_cache_whose_rows_were_repeated_or_selected(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        seen: list[list[list[int]]] = []

        def note(positions: Any) -> Tensor:
            seen.append(positions.index.tolist())
            return positions.index >= 0

        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        even, uneven = padded([PROMPTS[0], PROMPTS[0]]), padded(PROMPTS[:2])
        with random_vector([1]).apply(model, tokens=note), torch.no_grad():
            for change, rows in (("batch_repeat_interleave", 4), ("batch_select_indices", 1)):
                cache = model(**even, use_cache=True)[name]
                getattr(cache, change)(2 if rows == 4 else torch.tensor([0]))
                model(torch.full((rows, 1), 9), **{name: cache})
                assert seen[-1] == [[5]] * rows
                cache = model(**uneven, use_cache=True)[name]
                getattr(cache, change)(2 if rows == 4 else torch.tensor([0]))
                model(torch.full((rows, 1), 9), **{name: cache})
                assert seen[-1] == ([[5], [5], [8], [8]] if rows == 4 else [[5]])
                cache = model(**uneven, use_cache=True)[name]
                for layer in cache.layers:
                    layer.keys = torch.randn_like(layer.keys)
                with pytest.raises(ValueError, match="unknown to which prompts the 2 rows of this pass belong"):
                    model(torch.full((2, 1), 9), **{name: cache})

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="there the model makes tuples of tensors")
    @pytest.mark.parametrize("return_dict", [True, False])
    def test_a_mask_of_the_pass_alone_and_outputs_as_tuples_are_understood(self, return_dict: bool) -> None:
        model, prompt = tiny.shared("llama"), torch.tensor([PROMPTS[1]])
        seen: list[list[list[int]]] = []

        def note(positions: Any) -> Tensor:
            seen.append(positions.index.tolist())
            return positions.index >= 0

        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        first = padded(PROMPTS[:2])
        with random_vector([1]).apply(model, tokens=note), torch.no_grad():
            out = model(**first, use_cache=True, return_dict=return_dict)
            cache = out[name] if return_dict else next(item for item in out if hasattr(item, "get_seq_length"))
            model(torch.tensor([[9], [9]]), **{name: cache})
            assert seen[-1] == [[5], [8]]
            sizes = {"max_cache_len": 16, "max_batch_size": 1, "batch_size": 1, "device": "cpu", "dtype": torch.float32}
            known = inspect.signature(transformers.StaticCache.__init__).parameters
            static = transformers.StaticCache(
                model.config, **{key: value for key, value in sizes.items() if key in known}
            )
            for start in (0, 5):
                piece = prompt[:, start : start + 5]
                model(piece, attention_mask=torch.ones_like(piece), **{name: static})
                assert seen[-1] == [list(range(start, start + piece.shape[1]))]


def by_pieces(model: Any, prompt: Tensor, cuts: list[int]) -> Tensor:
    """The logits of a prompt that is run piece by piece, on the cache that the model itself makes."""
    parameters = inspect.signature(model.forward).parameters
    name = next(name for name in ("cache", "cache_params", "state", "past_key_values") if name in parameters)
    logits, cache, start = [], None, 0
    for length in cuts:
        given = {} if cache is None else {name: cache}
        if name == "cache_params" and "cache_position" in parameters:  # transformers 4's Mamba asks for it
            given["cache_position"] = torch.arange(start, start + length)
        out = model(prompt[:, start : start + length], use_cache=True, **given)
        cache, start = out[name], start + length
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


class TestPaddingAndPartitionDoNotMatter:
    """Law 3."""

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_either_side_of_padding_steers_the_same_tokens(self, architecture: str) -> None:
        if architecture in tiny.IGNORE_PADDING:
            pytest.skip("the model itself takes padding for tokens")
        model, vector = tiny.shared(architecture), random_vector([1])
        for tokens in (
            *(from_index(2), at([0, 3]), [1, 4], slice(1, None, 2), after([12, 13]) | after(22, until=26)),
            *(generated([3, 5, 2], strength=fading_away), ~generated([3, 5, 2]) & select([0, 3]) | 0.5 * at(1)),
        ):
            rows: dict[str, list[Tensor]] = {}
            for side in ("left", "right"):
                inputs = padded(PROMPTS, side)
                with vector.apply(model, tokens=tokens), record_activations(model, layers=1) as plain, torch.no_grad():
                    model(**inputs, **tiny.position_ids(model, inputs["attention_mask"]))
                rows[side] = [plain[1][0][n][mask.bool()] for n, mask in enumerate(inputs["attention_mask"])]
            for left, right in zip(rows["left"], rows["right"], strict=True):
                torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("padding_side", ["left", "right"])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_a_row_of_a_batch_is_what_its_prompt_alone_gives(self, architecture: str, padding_side: str) -> None:
        model, tokenizer = tiny.shared(architecture), tiny.tokenizer(padding_side=padding_side, pad=False)
        texts = ["a", "some text", "longer than that, and beyond a window", "b c d", "efghi jkl", "mn"]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        expected = [tiny.hidden_states(model, tokenizer(text)["input_ids"]) for text in texts]
        for batch_size in (1, 2, 3):
            positive, negative = extract_activations(model, tokenizer, pairs, batch_size=batch_size)
            for layer in positive:
                got = torch.stack([torch.cat(positive[layer]), torch.cat(negative[layer])], dim=1).flatten(0, 1)
                torch.testing.assert_close(got, torch.stack([h[layer][-1] for h in expected]), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_a_mean_over_tokens_is_that_of_each_prompt_alone(self, architecture: str) -> None:
        model, tokenizer = tiny.shared(architecture), tiny.tokenizer()
        pairs = [("some text", "more text than that"), ("a b", "longer than a window of tokens")]
        rows = [
            [tiny.hidden_states(model, tokenizer(text)["input_ids"])[1][1:].mean(0) for text in pair] for pair in pairs
        ]
        direction = torch.stack([positive - negative for positive, negative in rows]).mean(0)
        vector = train_steering_vector(model, tokenizer, pairs, layers=1, tokens=from_index(1), batch_size=2)
        torch.testing.assert_close(vector.layer_activations[1], direction, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_sets_are_averaged_side_by_side_whatever_their_sizes(self, architecture: str) -> None:
        model, tokenizer = tiny.shared(architecture), tiny.tokenizer()
        sets: Any = {
            "positive": ["some text", "a b", "more text than that"],
            "negative": ["longer than a window of it"],
        }
        means = [
            torch.stack([tiny.hidden_states(model, tokenizer(text)["input_ids"])[1][-1] for text in texts]).mean(dim=0)
            for texts in sets.values()
        ]
        for batch_size in (1, 3):
            vector = train_steering_vector(model, tokenizer, sets, layers=1, batch_size=batch_size)
            torch.testing.assert_close(vector.layer_activations[1], means[0] - means[1], atol=1e-5, rtol=1e-5)


class TestNothingIsLeftBehind:
    """Law 4."""

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_steering_recording_and_training_leave_the_model_as_it_was(self, architecture: str) -> None:
        model, tokenizer, inputs = tiny.build(architecture), tiny.tokenizer(), padded(PROMPTS[:1])
        model.train()
        tiny.blocks(model)[1].eval()
        before = snapshot(model)
        with torch.no_grad():
            expected = model.eval()(**inputs).logits
        restore_modes(model, before)
        with random_vector([0, 1]).apply(model, tokens=from_index(1)), record_activations(model), torch.no_grad():
            model(**inputs)
        train_steering_vector(model, tokenizer, [("ab", "cde")])
        with pytest.raises(ZeroDivisionError), random_vector([1]).apply(model, operator=lambda a, d: 1 / 0):
            model(**inputs)
        assert snapshot(model) == before
        with torch.no_grad():
            assert torch.equal(model.eval()(**inputs).logits, expected)

    @pytest.mark.parametrize("fails_at", range(7))
    def test_an_error_while_attaching_leaves_nothing(self, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny.build("llama")
        before = snapshot(model)
        calls = iter(range(100))

        def failing(original: Callable[..., Any]) -> Callable[..., Any]:
            def register(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                if next(calls) == fails_at:
                    raise OSError("no more hooks")
                return original(self, *args, **kwargs)

            return register

        for name in ("register_forward_hook", "register_forward_pre_hook"):
            monkeypatch.setattr(nn.Module, name, failing(getattr(nn.Module, name)))
        with pytest.raises(OSError, match="no more hooks"), random_vector([0, 1, 2]).apply(model, tokens=[1]):
            pass
        assert snapshot(model) == before


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that steering could leave behind."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_always_called))
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "weights": {name: float(value.double().sum()) for name, value in model.state_dict().items()},
    }


def restore_modes(model: nn.Module, taken: dict[str, Any]) -> None:
    for name, module in model.named_modules():
        module.training = taken["modes"][name]


class TestRoundTrips:
    """Law 5."""

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_a_vector_out_of_a_file_is_the_vector(self, architecture: str, tmp_path: Path) -> None:
        model, tokenizer, inputs = tiny.shared(architecture), tiny.tokenizer(), padded(PROMPTS[:1])
        vector = train_steering_vector(model, tokenizer, [("I love it", "I hate it"), ("yes", "no")])
        vector.save(tmp_path / "vector.safetensors")
        loaded = SteeringVector.load(tmp_path / "vector.safetensors")
        assert loaded == vector
        with vector.apply(model, multiplier=2.0):
            _, expected = generate(model, inputs)
        with loaded.apply(model, multiplier=2.0):
            _, logits = generate(model, inputs)
        assert torch.equal(logits, expected)

    @pytest.mark.parametrize("operator", [None, *OPERATORS])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_multiplier_zero_is_unsteered_bit_for_bit(self, architecture: str, operator: str | None) -> None:
        model, inputs = tiny.shared(architecture), padded(PROMPTS[:1])
        _, expected = generate(model, inputs)
        for tokens in (None, generated(inputs)):
            chosen = None if operator is None else OPERATORS[operator]
            with random_vector([0, 1, 2]).apply(model, multiplier=0, operator=chosen, tokens=tokens):
                _, logits = generate(model, inputs)
            assert torch.equal(logits, expected)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_a_row_s_multiplier_zero_leaves_it_bit_for_bit(self, architecture: str) -> None:
        model, inputs = tiny.shared(architecture), {"input_ids": torch.tensor([PROMPTS[1]] * 3)}
        with record_activations(model, layers=1) as plain, torch.no_grad():
            model(**inputs)
        for operator in OPERATORS.values():
            with (
                random_vector([1]).apply(model, multiplier=[0, 2, 0], operator=operator),
                record_activations(model, layers=1) as steered,
                torch.no_grad(),
            ):
                model(**inputs)
            assert torch.equal(steered[1][0][::2], plain[1][0][::2])
            assert not torch.equal(steered[1][0][1], plain[1][0][1])

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_a_zero_direction_changes_nothing(self, architecture: str) -> None:
        model, inputs = tiny.shared(architecture), padded(PROMPTS[:1])
        _, expected = generate(model, inputs)
        for operator in OPERATORS.values():
            with random_vector([0, 1, 2], scale=0.0).apply(model, operator=operator):
                _, logits = generate(model, inputs)
            assert torch.equal(logits, expected)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_plus_then_minus_is_nothing_to_rounding(self, architecture: str) -> None:
        model, inputs, vector = tiny.shared(architecture), padded(PROMPTS[:1]), random_vector([0, 1, 2])
        _, expected = generate(model, inputs)
        with vector.apply(model, multiplier=3), vector.apply(model, multiplier=-3):
            _, logits = generate(model, inputs)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)


class TestTheRealModel:
    """Laws 1 to 3 on SmolLM2-135M-Instruct, whose activations are those of a trained model."""

    LAYER = 16

    @pytest.mark.parametrize(
        "selection",
        ["all", "generated(inputs)", "generated(inputs, strength=…)", "prompted(inputs)", "from_index(1)"],
    )
    def test_cached_padded_generation_is_a_loop_without_cache_steered_by_hand(
        self, smollm2: tuple[Any, Any], selection: str
    ) -> None:
        model, tokenizer = smollm2
        select, is_selected = of(SELECTIONS[selection])
        texts = ["The weather in the mountains was", "I think"]
        direction = 20 * torch.nn.functional.normalize(torch.linspace(-1, 1, model.config.hidden_size), dim=0)
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        with SteeringVector({self.LAYER: direction}).apply(model, tokens=select(inputs)):
            _, got = generate(model, inputs)
        for row, text in enumerate(texts):
            ids = tokenizer(text)["input_ids"]
            length = len(ids)
            for step in range(STEPS):
                weights = torch.tensor([float(is_selected(n, length, ids)) for n in range(len(ids))])[:, None]

                def add(_m: nn.Module, _a: Any, output: Any, weights: Tensor = weights) -> Any:
                    return (output if isinstance(output, Tensor) else output[0]) + weights * direction

                handle = model.model.layers[self.LAYER].register_forward_hook(add)
                with torch.no_grad():
                    expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                handle.remove()
                torch.testing.assert_close(got[row, step], expected, atol=2e-3, rtol=1e-3)
                ids = [*ids, int(expected.argmax())]

    def test_rows_of_a_batch_are_what_each_prompt_alone_gives(self, smollm2: tuple[Any, Any]) -> None:
        model, tokenizer = smollm2
        pairs = [("I love it.", "I hate every single bit of it!"), ("Good", "Bad."), ("It was fun to be there.", "no")]
        one, three = (
            train_steering_vector(model, tokenizer, pairs, layers=[3, -1], batch_size=size).layer_activations
            for size in (1, 3)
        )
        for layer, direction in one.items():
            torch.testing.assert_close(three[layer], direction, atol=1e-5 * float(direction.norm()), rtol=1e-5)


@pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="transformers 4.46 runs LLaVA with images only")
class TestAVisionLanguageModel:
    def test_layers_are_the_text_decoder_s_and_are_moved_by_the_direction(self) -> None:
        model = tiny.llava(depth=5)
        vector = random_vector([1])
        with record_activations(model) as plain, torch.no_grad():
            model(**padded([PROMPTS[1]]))
        with vector.apply(model), record_activations(model) as steered, torch.no_grad():
            model(**padded([PROMPTS[1]]))
        assert sorted(plain) == [0, 1, 2]
        assert torch.equal(steered[1][0], plain[1][0] + vector.layer_activations[1])


class TestParity:
    """Law 7, where no other test has the oracle."""

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_layer_l_is_hidden_state_l_plus_1(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        with record_activations(model) as activations, torch.no_grad():
            states = model(torch.tensor([PROMPTS[1]]), output_hidden_states=True).hidden_states
        last = len(activations) - 1
        # Hugging Face's last hidden state comes after the final norm; recurrent models leave out the embeddings.
        shift = 0 if architecture in ("mamba", "rwkv") else 1
        for layer in range(last):
            assert torch.equal(activations[layer][0], states[layer + shift])

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_contrastive_activation_addition_in_fifteen_lines(self, architecture: str) -> None:
        model, tokenizer = tiny.shared(architecture), tiny.tokenizer()
        pairs = [("I love it.", "I hate it!"), ("Good", "Bad."), ("yes", "no")]
        total = torch.zeros(tiny.HIDDEN)
        for positive, negative in pairs:
            for text, sign in ((positive, 1), (negative, -1)):
                with torch.no_grad():
                    model.eval()
                    outputs: list[Any] = []
                    handle = tiny.blocks(model)[1].register_forward_hook(
                        lambda m, a, o, outputs=outputs: outputs.append(o)
                    )
                    model(torch.tensor([tokenizer(text)["input_ids"]]))
                    handle.remove()
                    activation = outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
                    total += sign * activation[0, -1]
        vector = train_steering_vector(model, tokenizer, pairs, layers=[1], batch_size=2)
        torch.testing.assert_close(vector.layer_activations[1], total / len(pairs), atol=1e-5, rtol=1e-5)


def fading(activation: Tensor, direction: Tensor, *, layer: int, positions: TokenPositions) -> Tensor:
    """A user's operator that asks: the direction fades from token to token, faster in deeper layers."""
    age = positions.index.clamp(min=0)[..., None]
    return direction * 0.9 ** (age * (layer + 1))


def squeezing(activation: Tensor, *, layer: int, positions: TokenPositions) -> Tensor:
    """A user's operator that needs no direction, and asks."""
    return 0.5 * (layer + 1) * (positions.index[..., None] % 3) * activation.tanh()


def mixing(activation: Tensor) -> Tensor:
    """A user's operator that needs no direction."""
    return 0.7 * activation.roll(1, dims=-1)


@dataclass(frozen=True)
class Way:
    """A way to steer layers 0 and 2, and its change by hand of one token: ``(h, layer, index, multiplier) → change``."""

    enter: Callable[..., Any]
    change: Callable[[Tensor, int, int, float], Tensor]


def clamped_by_hand(h: Tensor, layer: int, multiplier: float) -> Tensor:
    """The projection is raised to the layer's bound; the multiplier counts by its sign alone."""
    direction = OF_LAYERS.layer_activations[layer].to(h.dtype)
    along = (multiplier > 0) - (multiplier < 0) + 0.0
    unit = along * direction / direction.norm()
    return (BOUNDS[layer] - h @ unit).clamp(min=0) * unit


LAYERS = [0, 2]
OF_LAYERS = random_vector(LAYERS)
BOUNDS = {0: 1.0, 2: 4.0}
# What the laws ask of directions, they ask of these.
WAYS = {
    "an operator that asks": Way(
        lambda model, **kwargs: OF_LAYERS.apply(model, operator=fading, **kwargs),
        lambda h, layer, index, m: m * OF_LAYERS.layer_activations[layer] * 0.9 ** (index * (layer + 1)),
    ),
    "steer with one that asks": Way(
        lambda model, **kwargs: steer(model, squeezing, layers=LAYERS, **kwargs),
        lambda h, layer, index, m: m * 0.5 * (layer + 1) * (index % 3) * h.tanh(),
    ),
    "steer": Way(
        lambda model, **kwargs: steer(model, mixing, layers=LAYERS, **kwargs),
        lambda h, layer, index, m: m * 0.7 * h.roll(1, dims=-1),
    ),
    "a clamp by layer": Way(
        lambda model, **kwargs: OF_LAYERS.apply(model, operator=clamp_operator(min=BOUNDS), **kwargs),
        lambda h, layer, index, m: clamped_by_hand(h, layer, m),
    ),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@contextmanager
def changed_by_hand(
    model: Any, way: Way, mask: Tensor, multipliers: Sequence[float], first: Callable[[int], int] = lambda length: 0
) -> Iterator[None]:
    """Hooks on whole rows, not cached, whose prompts have this mask; row i has the multiplier of prompt i // k.

    The tokens from ``first(length of the prompt)`` on are changed.
    """

    def steer_by_hand(layer: int, output: Any) -> Any:
        activation = output if isinstance(output, Tensor) else output[0]
        steered = activation.clone()
        for row in range(len(steered)):
            prompt = row // (len(steered) // len(mask))
            length, padding = int(mask[prompt].sum()), int((mask[prompt] == 0).sum())
            for column in range(padding + first(length), steered.shape[1]):
                change = way.change(activation[row, column], layer, column - padding, multipliers[prompt])
                steered[row, column] = activation[row, column] + change
        return steered if isinstance(output, Tensor) else type(output)([steered, *output[1:]])

    handles = [
        tiny.blocks(model)[n].register_forward_hook(lambda _m, _a, output, n=n: steer_by_hand(n, output))
        for n in LAYERS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TestOperatorsThatAskOrNeedNoDirection:
    """Laws 1 to 3, 5 and 8 for operators that ask for layer and positions, and for ``steer``."""

    @each_way
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_what_is_read_is_what_was_there_plus_the_change(self, architecture: str, way: Way) -> None:
        model, inputs = tiny.shared(architecture), padded([PROMPTS[1]])
        with record_activations(model, layers=0) as plain, torch.no_grad():
            model(**inputs)
        with way.enter(model, tokens=from_index(2)), record_activations(model, layers=0) as steered, torch.no_grad():
            model(**inputs)
        for n, (was, became) in enumerate(zip(plain[0][0][0], steered[0][0][0], strict=True)):
            if n < 2:
                assert torch.equal(became, was)
            else:
                torch.testing.assert_close(became, was + way.change(was, 0, n, 1.0), atol=1e-5, rtol=1e-5)

    @each_way
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_padded_rows_with_multipliers_are_steered_as_alone_with_a_cache_and_without(
        self, architecture: str, way: Way
    ) -> None:
        model, multipliers = tiny.shared(architecture), [1.5, 0.0, -2.0]
        together = architecture not in tiny.IGNORE_PADDING
        batches = [range(3)] if together else [range(n, n + 1) for n in range(3)]
        for rows in batches:
            inputs, factors = padded([PROMPTS[n] for n in rows]), [multipliers[n] for n in rows]
            for use_cache in (True, False) if architecture not in tiny.UNLIKE_UNCACHED else (False,):
                with way.enter(model, multiplier=factors, tokens=generated(inputs)):
                    answers, logits = generate(model, inputs, use_cache=use_cache)
                for row, (n, factor) in enumerate(zip(rows, factors, strict=True)):
                    alone = padded([PROMPTS[n]])
                    with changed_by_hand(model, way, alone["attention_mask"], [factor], lambda length: length - 1):
                        expected, expected_logits = generate(model, alone, use_cache=False)
                    assert torch.equal(answers[row], expected[0])
                    torch.testing.assert_close(logits[row], expected_logits[0], atol=2e-4, rtol=1e-3)

    @each_way
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_either_side_of_padding_is_the_same(self, architecture: str, way: Way) -> None:
        if architecture in tiny.IGNORE_PADDING:
            pytest.skip("the model itself takes padding for tokens")
        model, rows = tiny.shared(architecture), []
        for side in ("left", "right"):
            inputs = padded(PROMPTS, side)
            with way.enter(model), record_activations(model, layers=2) as plain, torch.no_grad():
                model(**inputs, **tiny.position_ids(model, inputs["attention_mask"]))
            rows.append(plain[2][0][inputs["attention_mask"].bool()])
        torch.testing.assert_close(*rows, atol=5e-5, rtol=1e-3)

    @each_way
    @pytest.mark.parametrize("architecture", tiny.WITH_BEAMS)
    def test_beams_have_their_prompts_multipliers_and_positions(self, architecture: str, way: Way) -> None:
        model, inputs, multipliers = tiny.shared(architecture), padded(PROMPTS[:2]), [2.0, -1.0]
        kwargs = {**inputs, "num_beams": 3, "max_new_tokens": STEPS, "do_sample": False}
        cached = architecture not in tiny.UNLIKE_UNCACHED
        if tiny.ON_TRANSFORMERS_4 and architecture == "mamba":
            cached = False  # its cached states are not reordered with the beams, whoever steers it
        with way.enter(model, multiplier=multipliers):
            steered = model.generate(**kwargs, use_cache=cached)
        with changed_by_hand(model, way, inputs["attention_mask"], multipliers):
            assert torch.equal(steered, model.generate(**kwargs, use_cache=False))
        assert not torch.equal(steered, model.generate(**kwargs))

    @each_way
    @pytest.mark.parametrize("architecture", tiny.WITH_STATIC_CACHE)
    def test_a_static_cache_is_a_cache(self, architecture: str, way: Way) -> None:
        model, inputs, factors = tiny.shared(architecture), padded(PROMPTS), [1.5, 0.0, -2.0]
        with way.enter(model, multiplier=factors):
            expected, expected_logits = generate(model, inputs)
        for _ in range(2):  # the second run finds the first one's cache
            with way.enter(model, multiplier=factors):
                answers, logits = generate(model, inputs, cache_implementation="static")
            assert torch.equal(answers, expected)
            torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)

    @pytest.mark.skipif(not WITH_CHUNKS, reason="generate has no prefill_chunk_size in transformers 4.46")
    @pytest.mark.skipif(tiny.CHUNKS_ARE_ONE_GRAPH, reason="generate compiles the chunks as one graph")
    @each_way
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "qwen3"])
    def test_prefill_in_chunks_is_prefill_at_once(self, architecture: str, way: Way) -> None:
        model, inputs, factors = tiny.shared(architecture), padded(PROMPTS), [1.5, 0.0, -2.0]
        with way.enter(model, multiplier=factors):
            expected, expected_logits = generate(model, inputs)
            answers, logits = generate(model, inputs, prefill_chunk_size=3)
        assert torch.equal(answers, expected)
        torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)

    @each_way
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_multiplier_zero_is_unsteered_bit_for_bit(self, architecture: str, way: Way) -> None:
        model, inputs = tiny.shared(architecture), {"input_ids": torch.tensor([PROMPTS[1]] * 3)}
        learned = torch.zeros((), requires_grad=True)
        with record_activations(model) as plain, torch.no_grad():
            model(**inputs)
        for multiplier, rows, layers in (
            (0, [0, 1, 2], [0, 1, 2]),
            (learned, [0, 1, 2], [0, 1, 2]),
            ([0, 1, 0], [0, 2], [0]),
        ):
            with way.enter(model, multiplier=multiplier), record_activations(model) as steered, torch.no_grad():
                model(**inputs)
            for layer in layers:
                assert torch.equal(steered[layer][0][rows], plain[layer][0][rows])
        assert not torch.equal(steered[0][0][1], plain[0][0][1])

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_gradients_flow_through_the_change_and_the_multiplier(self, architecture: str) -> None:
        model, inputs = tiny.build(architecture), padded(PROMPTS[:1])
        affine = nn.Linear(tiny.HIDDEN, tiny.HIDDEN)
        with torch.no_grad():
            for weight in affine.parameters():
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) / 10)
        multiplier = torch.tensor(0.5, requires_grad=True)

        def loss() -> Tensor:
            with steer(model, affine, layers=1, multiplier=multiplier, tokens=from_index(1)):
                return model(**inputs, use_cache=False).logits.square().mean()

        loss().backward()
        for place, n in ((multiplier, ()), (affine.bias, 3), (affine.weight, (3, 4))):
            with torch.no_grad():  # against differences
                place[n] += 1e-2
                above = loss()
                place[n] -= 2e-2
                below = loss()
                place[n] += 1e-2
            assert place.grad is not None
            torch.testing.assert_close(place.grad[n], (above - below) / 2e-2, atol=2e-3, rtol=5e-2)

    @each_way
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_the_stream_keeps_its_dtype_in_half_precision(
        self, architecture: str, dtype: torch.dtype, way: Way
    ) -> None:
        model, inputs = tiny.build(architecture).to(dtype), padded([PROMPTS[1]])
        with record_activations(model, layers=0) as plain, torch.inference_mode():
            model(**inputs)
        with way.enter(model), record_activations(model, layers=0) as steered, torch.inference_mode():
            model(**inputs)
        before, after = plain[0][0][0], steered[0][0][0]
        assert after.dtype is before.dtype
        expected = torch.stack([h + way.change(h, 0, n, 1.0) for n, h in enumerate(before.double())])
        eps = torch.finfo(dtype).eps * float(expected.abs().max() + 1)
        torch.testing.assert_close(after.double(), expected, atol=2 * eps, rtol=0)


# The projections whose inputs are heads and neurons, by hand; other architectures name them as Llama does.
LIKE_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
PROJECTIONS: dict[str, tuple[str | None, str | None]] = {
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neo": ("attn.attention.out_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "gptj": ("attn.out_proj", "mlp.fc_out"),
    "mamba": (None, None),
    "mixtral": ("self_attn.o_proj", None),
    "mpt": ("attn.out_proj", "ffn.down_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "phi": ("self_attn.dense", "mlp.fc2"),
    "rwkv": (None, "feed_forward.value"),
}
INPUTS_OF_PROJECTIONS = [
    (architecture, layer_type)
    for architecture in (*tiny.ARCHITECTURES, "phi3")
    for layer_type, path in zip(("heads", "neurons"), PROJECTIONS.get(architecture, LIKE_LLAMA), strict=True)
    if path is not None
]
each_input = pytest.mark.parametrize(("architecture", "layer_type"), INPUTS_OF_PROJECTIONS)


def projection_at(model: Any, layer_type: str, layer: int) -> nn.Module:
    path = PROJECTIONS.get(model.config.model_type, LIKE_LLAMA)[layer_type == "neurons"]
    return tiny.blocks(model)[layer].get_submodule(str(path))


def random_vector_of_inputs(model: Any, layer_type: Any, layers: list[int], scale: float = 1.0) -> SteeringVector:
    weight: Any = projection_at(model, layer_type, 0).weight
    width = weight.shape[0 if model.config.model_type == "gpt2" else 1]
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({n: scale * torch.randn(width, generator=generator) for n in layers}, layer_type)


@contextmanager
def inputs_by_hand(
    model: Any, layer_type: str, changes: dict[int, Callable[[Tensor], Tensor]], batch: int
) -> Iterator[None]:
    """Pre-hooks on the projections; a change gets the input ``(batch, seq, n)``, in which all tokens stand."""

    def before(layer: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        changed = changes[layer](args[0].reshape(batch, -1, args[0].shape[-1]).clone())
        return (changed.reshape(args[0].shape), *args[1:])

    handles = [
        projection_at(model, layer_type, layer).register_forward_pre_hook(
            lambda _m, args, layer=layer: before(layer, args)
        )
        for layer in changes
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class TestInputsOfProjections:
    """Heads and neurons: laws 1 to 5 and 8 where the activation is a module's input."""

    @pytest.mark.parametrize("operator", OPERATORS)
    @pytest.mark.parametrize(("architecture", "layer_type"), [("llama", "heads"), ("gpt2", "neurons")])
    def test_every_operator_changes_what_is_read(self, architecture: str, layer_type: Any, operator: str) -> None:
        self.check_reading(architecture, layer_type, "all tokens", operator)

    @pytest.mark.parametrize("selection", ["all tokens", "generated(inputs)"])
    @each_input
    def test_what_is_read_is_what_was_there_plus_the_change(
        self, architecture: str, layer_type: Any, selection: str
    ) -> None:
        self.check_reading(architecture, layer_type, selection, "addition_operator")

    def check_reading(self, architecture: str, layer_type: Any, selection: str, operator: str) -> None:
        model, prompt = tiny.shared(architecture), PROMPTS[1]
        vector, inputs = random_vector_of_inputs(model, layer_type, [1]), padded([prompt])
        tokens, first = (None, 0) if selection == "all tokens" else (generated(inputs), len(prompt) - 1)
        outside: list[Tensor] = []
        handle = projection_at(model, layer_type, 1).register_forward_pre_hook(lambda _m, args: outside.append(args[0]))
        with record_activations(model, layer_type, layers=[0, 1]) as plain, torch.no_grad():
            model(**inputs)
        handle.remove()
        assert torch.equal(plain[1][0], outside[0])
        # Recorded by what is attached before the steering, and by what is attached after.
        with record_activations(model, layer_type, layers=[0, 1]) as early:
            steering = vector.apply(model, operator=OPERATORS[operator], tokens=tokens)
            with steering, record_activations(model, layer_type, layers=[0, 1]) as late, torch.no_grad():
                model(**inputs)
        for steered in (early, late):
            assert torch.equal(steered[0][0], plain[0][0])
            before, after = (rows[1][0].reshape(len(prompt), -1) for rows in (plain, steered))
            assert torch.equal(after[:first], before[:first])
            change = operator_by_hand(operator, vector.layer_activations[1])
            expected = torch.stack([change(row) for row in before[first:]])
            torch.testing.assert_close(after[first:], expected, atol=1e-5, rtol=1e-5)

    @each_input
    def test_padded_rows_with_multipliers_are_steered_as_alone_with_a_cache_and_without(
        self, architecture: str, layer_type: Any
    ) -> None:
        if architecture in tiny.IGNORE_PADDING | tiny.UNLIKE_UNCACHED:
            pytest.skip("the model itself takes padding for tokens, or differs with a cache")
        model, inputs, multipliers = tiny.shared(architecture), padded(PROMPTS), [1.5, 0.0, -2.0]
        vector = random_vector_of_inputs(model, layer_type, [0, 2])
        expected = [
            self.loop(model, layer_type, prompt, vector * multiplier)
            for prompt, multiplier in zip(PROMPTS, multipliers, strict=True)
        ]
        for use_cache in (True, False):
            with vector.apply(model, multiplier=multipliers, tokens=generated(inputs)):
                answers, logits = generate(model, inputs, use_cache=use_cache)
            for row, (expected_answer, expected_logits) in enumerate(expected):
                assert answers[row].tolist() == expected_answer
                torch.testing.assert_close(logits[row], expected_logits, atol=2e-4, rtol=1e-3)

    @staticmethod
    def loop(model: Any, layer_type: str, prompt: list[int], vector: SteeringVector) -> tuple[list[int], Tensor]:
        """Whole rows, uncached, steered from the prompt's last token on."""

        def adding(direction: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda given: torch.cat([given[:, : len(prompt) - 1], given[:, len(prompt) - 1 :] + direction], 1)

        ids, logits = list(prompt), []
        changes = {layer: adding(direction) for layer, direction in vector.layer_activations.items()}
        with inputs_by_hand(model, layer_type, changes, 1), torch.no_grad():
            for _ in range(STEPS):
                logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
                ids.append(int(logits[-1].argmax()))
        return ids[len(prompt) :], torch.stack(logits)

    @each_input
    def test_beams_are_steered_as_their_prompts(self, architecture: str, layer_type: Any) -> None:
        if architecture not in tiny.WITH_BEAMS:
            pytest.skip("its states can't be reordered")
        model, inputs = tiny.shared(architecture), padded(PROMPTS[:2])
        vector = random_vector_of_inputs(model, layer_type, [1], scale=2.0)
        factors, start = torch.tensor([1.0, -1.0]).repeat_interleave(3), inputs["input_ids"].shape[1] - 1
        kwargs = {**inputs, "num_beams": 3, "max_new_tokens": STEPS, "do_sample": False}
        with vector.apply(model, multiplier=[1.0, -1.0], tokens=generated(inputs)):
            steered = model.generate(**kwargs, use_cache=True)

        def change(given: Tensor) -> Tensor:
            given[:, start:] += factors[:, None, None] * vector.layer_activations[1]
            return given

        with inputs_by_hand(model, layer_type, {1: change}, 6):
            assert torch.equal(steered, model.generate(**kwargs, use_cache=False))
        assert not torch.equal(steered, model.generate(**kwargs))

    @pytest.mark.parametrize("layer_type", ["heads", "neurons"])
    @pytest.mark.parametrize("architecture", tiny.WITH_STATIC_CACHE)
    def test_a_static_cache_is_a_cache(self, architecture: str, layer_type: Any) -> None:
        model, inputs = tiny.shared(architecture), padded(PROMPTS)
        vector = random_vector_of_inputs(model, layer_type, [1], scale=2.0)
        with vector.apply(model, tokens=generated(inputs)):
            expected, expected_logits = generate(model, inputs)
        with vector.apply(model, tokens=generated(inputs)):
            answers, logits = generate(model, inputs, cache_implementation="static")
        assert torch.equal(answers, expected)
        torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)
        assert not torch.equal(generate(model, inputs)[1], expected_logits)

    @each_input
    def test_either_side_of_padding_is_the_same(self, architecture: str, layer_type: Any) -> None:
        if architecture in tiny.IGNORE_PADDING:
            pytest.skip("the model itself takes padding for tokens")
        model, vector = tiny.shared(architecture), random_vector_of_inputs(tiny.shared(architecture), layer_type, [1])
        rows: dict[str, list[Tensor]] = {}
        for side in ("left", "right"):
            inputs = padded(PROMPTS, side)
            with (
                vector.apply(model, tokens=from_index(2)),
                record_activations(model, layers=1) as made,
                torch.no_grad(),
            ):
                model(**inputs, **tiny.position_ids(model, inputs["attention_mask"]))
            rows[side] = [made[1][0][n][mask.bool()] for n, mask in enumerate(inputs["attention_mask"])]
        for left, right in zip(rows["left"], rows["right"], strict=True):
            torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)

    @each_input
    def test_rows_are_read_as_of_each_prompt_alone_and_files_keep_the_vector(
        self, architecture: str, layer_type: Any, tmp_path: Path
    ) -> None:
        model, tokenizer = tiny.shared(architecture), tiny.tokenizer()
        texts = ["a b", "a b c", "some text", "some more text than that", "longer than a window of it", "b"]
        rows: list[Tensor] = []
        handle = projection_at(model, layer_type, 1).register_forward_pre_hook(
            lambda _m, args: rows.append(args[0].reshape(-1, args[0].shape[-1])[-1])
        )
        for text in texts:
            with torch.no_grad():
                model(torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
        handle.remove()
        read = read_activations(model, tokenizer, texts, layers=1, layer_type=layer_type, batch_size=2)[1]
        torch.testing.assert_close(read, torch.stack(rows), atol=1e-5, rtol=1e-5)
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        vector = train_steering_vector(model, tokenizer, pairs, layers=[0, 1], layer_type=layer_type)
        expected = (torch.stack(rows[::2]) - torch.stack(rows[1::2])).mean(dim=0)
        torch.testing.assert_close(vector.layer_activations[1], expected, atol=1e-5, rtol=1e-5)
        assert "layer_config" not in vector.metadata
        assert vector.shares() == {}
        vector.save(tmp_path / "vector")
        loaded = SteeringVector.load(tmp_path / "vector")
        assert loaded == vector
        assert loaded.layer_type == layer_type

    @each_input
    def test_multiplier_zero_is_unsteered_and_nothing_is_left_behind(self, architecture: str, layer_type: Any) -> None:
        model, inputs = tiny.shared(architecture), padded(PROMPTS[:1])
        vector = random_vector_of_inputs(model, layer_type, [0, 2])
        before, (_, expected) = snapshot(model), generate(model, inputs)
        with vector.apply(model, multiplier=0):
            assert torch.equal(generate(model, inputs)[1], expected)
        with vector.apply(model) as handle:
            assert active_patches(model) == [handle]
            assert not torch.allclose(generate(model, inputs)[1], expected, atol=1e-4)
            with vector.apply(model, multiplier=-1):
                torch.testing.assert_close(generate(model, inputs)[1], expected, atol=1e-4, rtol=1e-3)
        with pytest.raises(ZeroDivisionError), vector.apply(model, operator=lambda a, d: 1 / 0):
            model(**inputs)
        assert snapshot(model) == before
        assert active_patches(model) == []

    @each_input
    def test_gradients_flow_to_the_direction_and_the_rows_multipliers(self, architecture: str, layer_type: Any) -> None:
        model, ids = tiny.build(architecture), torch.tensor([PROMPTS[1]] * 2)
        direction = random_vector_of_inputs(model, layer_type, [1]).layer_activations[1].requires_grad_()
        multiplier = torch.tensor([1.0, 0.0], requires_grad=True)
        with SteeringVector({1: direction}, layer_type).apply(model, multiplier=multiplier):
            model(ids, use_cache=False).logits.square().mean().backward()
        by_hand = [given.detach().clone().requires_grad_() for given in (direction, multiplier)]
        changes = {1: lambda given: given + by_hand[1][:, None, None] * by_hand[0]}
        with inputs_by_hand(model, layer_type, changes, 2):
            model(ids, use_cache=False).logits.square().mean().backward()
        for got, expected in zip((direction, multiplier), by_hand, strict=True):
            torch.testing.assert_close(got.grad, expected.grad, atol=1e-5, rtol=1e-3)
            assert expected.grad is not None
            assert bool(expected.grad.any())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @each_input
    def test_the_stream_keeps_its_dtype_in_half_precision(
        self, architecture: str, layer_type: Any, dtype: torch.dtype
    ) -> None:
        model, inputs = tiny.build(architecture).to(dtype), padded(PROMPTS[:1])
        vector = random_vector_of_inputs(model, layer_type, [1])
        with record_activations(model, layer_type, layers=1) as plain, torch.inference_mode():
            model(**inputs)
        for operator in OPERATORS.values():
            with (
                torch.inference_mode(),
                vector.apply(model, operator=operator, tokens=from_index(1)),
                record_activations(model, layer_type, layers=1) as steered,
            ):
                model(**inputs)
            assert steered[1][0].dtype is plain[1][0].dtype
            assert bool(steered[1][0].isfinite().all())


class TestAblationEverywhere:
    """Laws 2, 3 and 5 for a span that is ablated at some tokens of some rows."""

    SPAN = torch.randn(8, tiny.HIDDEN, generator=torch.Generator().manual_seed(3))
    ROWS = (True, False, True)

    def by_hand(self, model: Any, architecture: str, inputs: dict[str, Tensor], beams: int) -> Any:
        """Hooks on whole rows that ablate the tokens from the last one of each prompt on."""
        projector = torch.linalg.pinv(self.SPAN) @ self.SPAN
        rows = torch.tensor(self.ROWS).repeat_interleave(beams)
        starts = inputs["input_ids"].shape[1] - 1

        def change(activation: Tensor) -> Tensor:
            ablated = activation.reshape(len(rows), -1, activation.shape[-1]).clone()
            ablated[rows, starts:] -= ablated[rows, starts:] @ projector
            return ablated.reshape(activation.shape)

        return ablated_by_hand(model, architecture, lambda layer: change)

    @pytest.mark.parametrize("architecture", WRITTEN)
    def test_of_padded_rows_is_as_by_hand_with_a_cache_and_without(self, architecture: str) -> None:
        if architecture not in tiny.ARCHITECTURES:
            pytest.skip("this transformers doesn't have it")
        model, inputs = tiny.shared(architecture), padded(PROMPTS)
        with self.by_hand(model, architecture, inputs, beams=1):
            expected, expected_logits = generate(model, inputs, use_cache=False)
        for use_cache in (True, False) if architecture not in tiny.UNLIKE_UNCACHED else (False,):
            with ablate_everywhere(model, self.SPAN, tokens=generated(inputs), rows=self.ROWS):
                answers, logits = generate(model, inputs, use_cache=use_cache)
            assert torch.equal(answers, expected)
            torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)
        assert (logits - generate(model, inputs)[1])[0].abs().max() > 1e-2

    @pytest.mark.parametrize("architecture", WRITTEN)
    def test_of_beams_is_that_of_their_prompts(self, architecture: str) -> None:
        if architecture not in tiny.WITH_BEAMS:
            pytest.skip("this transformers doesn't have it")
        model, inputs = tiny.shared(architecture), padded(PROMPTS)
        kwargs: dict[str, Any] = {**inputs, "num_beams": 2, "max_new_tokens": STEPS, "do_sample": False}
        cached = architecture not in tiny.UNLIKE_UNCACHED
        if tiny.ON_TRANSFORMERS_4 and architecture == "mamba":
            cached = False  # its cached states are not reordered with the beams, whoever steers it
        with self.by_hand(model, architecture, inputs, beams=2):
            expected = model.generate(**kwargs, use_cache=False)
        for use_cache in (True, False) if cached else (False,):
            with ablate_everywhere(model, self.SPAN, tokens=generated(inputs), rows=self.ROWS):
                assert torch.equal(model.generate(**kwargs, use_cache=use_cache), expected)
        assert not torch.equal(expected, model.generate(**kwargs))

    @pytest.mark.skipif(not WITH_CHUNKS, reason="generate has no prefill_chunk_size in transformers 4.46")
    @pytest.mark.skipif(tiny.CHUNKS_ARE_ONE_GRAPH, reason="generate compiles the chunks as one graph")
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "qwen3"])
    def test_prefill_in_chunks_and_static_caches_are_alike(self, architecture: str) -> None:
        model, inputs = tiny.shared(architecture), padded(PROMPTS)
        for tokens in (None, generated(inputs), from_index(2)):
            with ablate_everywhere(model, self.SPAN, tokens=tokens, rows=self.ROWS):
                expected, expected_logits = generate(model, inputs)
                ways = [generate(model, inputs, prefill_chunk_size=3)]
                if architecture in tiny.WITH_STATIC_CACHE:
                    ways.append(generate(model, inputs, cache_implementation="static"))
            for answers, logits in ways:
                assert torch.equal(answers, expected)
                torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-3)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_rows_that_are_off_are_unsteered_bit_for_bit(self, architecture: str) -> None:
        model, inputs = tiny.shared(architecture), {"input_ids": torch.tensor([PROMPTS[1]] * 3)}
        with record_activations(model) as plain, torch.no_grad():
            model(**inputs)
        with (
            ablate_everywhere(model, {0: self.SPAN, 2: self.SPAN[0]}, rows=[False, True, False]),
            record_activations(model) as ablated,
            torch.no_grad(),
        ):
            model(**inputs)
        for layer in (0, 1, 2):
            if not (architecture == "mixtral" and tiny.ON_TRANSFORMERS_4 and layer):  # its experts add in any order
                assert torch.equal(ablated[layer][0][::2], plain[layer][0][::2])
        assert not torch.equal(ablated[0][0][1], plain[0][0][1])


class TestGradients:
    """Law 8."""

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_gradients_flow_to_the_direction_and_the_weights(self, architecture: str) -> None:
        model, inputs = tiny.build(architecture), padded(PROMPTS[:1])
        direction = torch.randn(tiny.HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        vector = SteeringVector({1: direction})
        assert vector.layer_activations[1] is direction

        def loss() -> Tensor:
            with vector.apply(model, tokens=from_index(2)):
                return model(**inputs, use_cache=False).logits.square().mean()

        loss().backward()
        assert direction.grad is not None
        for n in (0, 7):  # against differences
            step = torch.zeros(tiny.HIDDEN)
            step[n] = 1e-2
            with torch.no_grad():
                direction += step
                above = loss()
                direction -= 2 * step
                below = loss()
                direction += step
            torch.testing.assert_close(direction.grad[n], (above - below) / 2e-2, atol=2e-3, rtol=5e-2)
        weights = [p for p in tiny.blocks(model)[0].parameters() if p.requires_grad and p.grad is not None]
        assert any(bool(p.grad.any()) for p in weights if p.grad is not None)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_gradients_flow_to_each_row_s_multiplier(self, architecture: str) -> None:
        model, ids = tiny.build(architecture), torch.tensor([PROMPTS[1]] * 2)
        multiplier = torch.tensor([1.0, 0.0], requires_grad=True)
        with random_vector([1]).apply(model, multiplier=multiplier):
            model(ids, use_cache=False).logits.square().sum().backward()
        for row, value in enumerate((1.0, 0.0)):
            alone = torch.tensor(value, requires_grad=True)
            with random_vector([1]).apply(model, multiplier=alone):
                model(ids[:1], use_cache=False).logits.square().sum().backward()
            assert multiplier.grad is not None
            assert alone.grad is not None
            torch.testing.assert_close(multiplier.grad[row], alone.grad, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_the_stream_keeps_its_dtype_and_inference_mode_works(self, architecture: str, dtype: torch.dtype) -> None:
        model, inputs = tiny.build(architecture).to(dtype), padded(PROMPTS[:1])
        vector = random_vector([1])
        with record_activations(model, layers=[1, 2]) as plain, torch.no_grad():
            model(**inputs)
        for operator in OPERATORS.values():
            with (
                torch.inference_mode(),
                vector.apply(model, operator=operator, tokens=from_index(1)),
                record_activations(model, layers=[1, 2]) as steered,
            ):
                model(**inputs)
            assert [steered[layer][0].dtype for layer in (1, 2)] == [plain[layer][0].dtype for layer in (1, 2)]
            assert all(bool(passes[0].isfinite().all()) for passes in steered.values())


def reflection(activation: Tensor, direction: Tensor) -> Tensor:
    """A user's own operator: ``h − 2 (h·u) u``."""
    unit = direction / direction.norm(dim=-1, keepdim=True)
    return -2 * (activation * unit).sum(dim=-1, keepdim=True) * unit


def every_third(positions: TokenPositions) -> Tensor:
    """A user's own selector."""
    return positions.index % 3 == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, when its compiler is imported
@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")  # of transformers to a cached function
class TestOperatorsAndSelectorsOfUsersInHalfPrecision:
    """Law 8: they are as exact as the library's own, whatever the direction's size."""

    @pytest.mark.parametrize(
        "compiled", [pytest.param(False, id="eager"), pytest.param(True, id="compiled", marks=pytest.mark.compiles)]
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_a_reflection_is_exact_to_rounding_at_the_tokens_of_a_selector(
        self, architecture: str, dtype: torch.dtype, compiled: bool
    ) -> None:
        model, inputs, vector = tiny.build(architecture).to(dtype), padded([PROMPTS[1]]), random_vector([1])
        graphs: list[Any] = []
        if compiled:
            torch.compiler.reset()  # blocks share code, which after eight compilations would run uncompiled
            tiny.blocks(model)[1].compile(backend=lambda graph, _inputs: graphs.append(graph) or graph.forward)
        unit = torch.nn.functional.normalize(vector.layer_activations[1].double(), dim=0)
        with record_activations(model, layers=1) as plain, torch.no_grad():
            model(**inputs)
        before = plain[1][0][0].double()
        is_steered = torch.arange(len(before)) % 3 == 1
        expected = before - 2 * torch.outer(is_steered * (before @ unit), unit)
        eps = torch.finfo(dtype).eps * float(before.abs().max())
        for size in (1e-7, 1.0, 1e5):
            with (
                vector.apply(model, multiplier=size, operator=reflection, tokens=every_third),
                record_activations(model, layers=1) as steered,
                torch.no_grad(),
            ):
                model(**inputs)
            after = steered[1][0][0]
            assert after.dtype is plain[1][0].dtype
            assert torch.equal(after[~is_steered], plain[1][0][0][~is_steered])
            # The activations were rounded before and are after, by half an eps each at most.
            torch.testing.assert_close(after.double(), expected, atol=eps, rtol=0)
        assert bool(graphs) == compiled
