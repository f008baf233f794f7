"""Faults are planted in a model or in what it is given; no set of prompts gets a row that isn't its prompt's alone."""

import inspect
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors import SteeringVector, at
from steering_vectors._extraction import ways
from steering_vectors._extraction.extractor import Extractor, ReadPrompt
from steering_vectors._extraction.reading import extractor_for
from steering_vectors._extraction.ways import OneAtATime, Packed
from steering_vectors._models import Attention, anatomy_of
from tests import tiny

TRIES = int(os.environ.get("FAULT_TRIES", "6"))
LAYER = 2
Fault = Callable[[PreTrainedModel, pytest.MonkeyPatch], None]


def in_masks(change: Callable[[Tensor, Tensor], Tensor]) -> Fault:
    """A fault in the masks ``(packs, 1, n, n)``, by the tokens' depths ``(packs, n)``."""

    def plant(_model: PreTrainedModel, patched: pytest.MonkeyPatch) -> None:
        right = ways.attention_masks

        def wrong(kinds: Any, attention: Any, visible: Tensor, depths: Tensor, dtype: torch.dtype) -> Any:
            masks = right(kinds, attention, visible, depths, dtype)
            if isinstance(masks, dict):
                return {kind: change(mask, depths) for kind, mask in masks.items()}
            return change(masks, depths)

        patched.setattr(ways, "attention_masks", wrong)

    return plant


def in_blocks(change: Callable[[Tensor, dict[str, Any]], Tensor]) -> Fault:
    """A fault in what a block returns ``(batch, seq, hidden)``, by its arguments; no hook that could be seen."""

    def plant(model: PreTrainedModel, _patched: pytest.MonkeyPatch) -> None:
        block = tiny.blocks(model)[1]
        forward = block.forward

        def wrong(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if isinstance(output, Tensor):
                return change(output, kwargs)
            return (change(output[0], kwargs), *output[1:])

        block.forward = wrong

    return plant


def no_window(_model: PreTrainedModel, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Attention, "window", None)


def one_more(_model: PreTrainedModel, patched: pytest.MonkeyPatch) -> None:
    patched.setattr(Attention, "window", property(lambda self: self.config.sliding_window + 1))


def hidden_where(mask: Tensor, where: Tensor) -> Tensor:
    return mask.masked_fill(where, torch.finfo(mask.dtype).min)


def causal(mask: Tensor, _depths: Tensor) -> Tensor:
    return torch.full_like(mask, torch.finfo(mask.dtype).min).triu(1)


def beyond_a_depth(mask: Tensor, depths: Tensor) -> Tensor:
    return hidden_where(mask, (depths[:, None, :, None] - depths[:, None, None, :]) > 9)


def beyond_a_column(mask: Tensor, _depths: Tensor) -> Tensor:
    return hidden_where(mask, torch.ones_like(mask, dtype=torch.bool).tril(-23))


def other_trees(mask: Tensor, depths: Tensor) -> Tensor:
    first = (depths[:, :1] == 0) & (torch.arange(mask.shape[-1]) == 0)  # all see the pack's first token
    return mask.masked_fill(first[:, None, None, :], 0)


def no_position_ids(model: PreTrainedModel, _patched: pytest.MonkeyPatch) -> None:
    decoder: Any = model.base_model
    forward = decoder.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("position_ids", None)
        return forward(*args, **kwargs)

    wrong.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    decoder.forward = wrong


def by_rows(state: Tensor, _kwargs: dict[str, Any]) -> Tensor:
    return state * (1 + 0.1 * (torch.arange(len(state)) > 0)[:, None, None])


def by_the_number_of_rows(state: Tensor, _kwargs: dict[str, Any]) -> Tensor:
    return state * (1.1 if len(state) > 2 else 1)


def by_the_width(state: Tensor, _kwargs: dict[str, Any]) -> Tensor:
    return state * (1.1 if state.shape[1] > 80 else 1)  # wider than any prompt


def by_padding(state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Tokens of rows that have more than three of padding behind them."""
    mask = kwargs.get("attention_mask")
    if mask is None or mask.ndim != 4 or len(state) == 1:
        return state
    ended = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] == 0
    return state * (1 + 0.1 * ((~ended).sum(-1) > 3)[:, None, None])


FAULTS: dict[str, tuple[str, Fault]] = {
    "masks left out": ("llama", in_masks(causal)),
    "masks of the first pack for all": ("llama", in_masks(lambda mask, _: mask[:1].expand_as(mask))),
    "masks of the last pack for all": ("llama", in_masks(lambda mask, _: mask[-1:].expand_as(mask))),
    "no window": ("mistral", no_window),
    "a window of one more": ("mistral", one_more),
    "a window that no config tells, by depth": ("llama", in_masks(beyond_a_depth)),
    "a window that no config tells, by column": ("llama", in_masks(beyond_a_column)),
    "the first token seen by all": ("llama", in_masks(other_trees)),
    "no position ids": ("gpt2", no_position_ids),
    "rows but the first": ("llama", in_blocks(by_rows)),
    "many rows": ("llama", in_blocks(by_the_number_of_rows)),
    "wide passes": ("llama", in_blocks(by_the_width)),
    "padding": ("llama", in_blocks(by_padding)),
}


def draw_prompts(draw: random.Random) -> list[ReadPrompt]:
    """Prompts that share beginnings, nest, repeat a token or a phrase, and are read at the end or inside."""
    letters = draw.choice([2, 4, 40, 200])
    stems = [[draw.randrange(letters) + 10 for _ in range(draw.choice([0, 1, 5, 20]))] for _ in range(2)]
    prompts = []
    for _ in range(draw.randrange(1, 12)):
        phrase = [draw.randrange(letters) + 10 for _ in range(draw.choice([1, 1, 2, 8, 16]))]
        ids = [*draw.choice(stems), *phrase * draw.choice([1, 1, 1, 2, 25 // len(phrase) + 1])]
        prompts.append(ReadPrompt(ids, [draw.choice([len(ids) - 1, draw.randrange(len(ids))])]))
    return prompts


def check(extractor: Extractor, model: PreTrainedModel, prompts: list[ReadPrompt]) -> None:
    rows = {n: row for part in extractor(prompts) for n, row in zip(part.prompts, part.rows, strict=True)}
    assert len(rows) == len(prompts)
    for number, prompt in enumerate(prompts):
        alone = tiny.hidden_states(model, prompt.input_ids)[LAYER][list(prompt.positions)][0]
        assert float((rows[number] - alone).norm() / alone.norm()) < 5e-4, prompt


def extractor_of(model: PreTrainedModel, batch_size: int) -> Extractor:
    return extractor_for(anatomy_of(model), [LAYER], "decoder_block", None, batch_size)


@pytest.mark.parametrize("name", FAULTS)
def test_none_slips_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, plant = FAULTS[name]
    window = {"sliding_window": 12} if architecture == "mistral" else {}
    model = tiny.build(architecture, **window)
    plant(model, monkeypatch)
    for seed in range(TRIES):
        draw = random.Random(seed)
        extractor = extractor_of(model, draw.choice([1, 2, 8]))
        for _window in range(3):
            check(extractor, model, draw_prompts(draw))


def column_hook(_module: nn.Module, _args: Any, output: Any) -> Any:
    state = (output if isinstance(output, Tensor) else output[0]).clone()
    state[:, 3:4] += 1
    return state if isinstance(output, Tensor) else (state, *output[1:])


def attach_a_hook(model: PreTrainedModel) -> None:
    tiny.blocks(model)[1].register_forward_hook(column_hook)


def steer_a_token(model: PreTrainedModel) -> None:
    SteeringVector({1: torch.ones(tiny.HIDDEN)}).patch_activations(model, tokens=at([3]))


def change_the_dtype(model: PreTrainedModel) -> None:
    model.double()


def change_the_attention(model: PreTrainedModel) -> None:
    model.config._attn_implementation = "eager"


def change_the_weights(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for block in tiny.blocks(model):
            nn.init.normal_(block.self_attn.o_proj.weight, std=0.15)  # type: ignore[union-attr, arg-type]


def fill_the_memory(model: PreTrainedModel) -> None:
    """From the next pass of several prompts on."""
    model.full = False  # type: ignore[assignment]
    block = tiny.blocks(model)[0]
    forward = block.forward

    def full_once(*args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        mask = kwargs["attention_mask"]
        if mask is not None and mask.is_floating_point() and not model.full and state.shape[:2].numel() > 12:
            model.full = True  # type: ignore[assignment]
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    block.forward = full_once


def wrong_masks_if(fault: Callable[[PreTrainedModel, Tensor], bool]) -> Fault:
    def plant(model: PreTrainedModel, patched: pytest.MonkeyPatch) -> None:
        in_masks(lambda mask, depths: causal(mask, depths) if fault(model, mask) else mask)(model, patched)

    return plant


def nothing(_model: PreTrainedModel, _patched: pytest.MonkeyPatch) -> None:
    pass


def attend_to_nothing(model: PreTrainedModel, patched: pytest.MonkeyPatch) -> None:
    """So that wrong masks can't show, until the weights change."""
    with torch.no_grad():
        for block in tiny.blocks(model):
            block.self_attn.o_proj.weight.zero_()  # type: ignore[union-attr, operator]
    in_masks(causal)(model, patched)


# What the user's code does between two windows or passes, and what is wrong only from then on.
CHANGES: dict[str, tuple[Fault, Callable[[PreTrainedModel], None]]] = {
    "a hook": (nothing, attach_a_hook),
    "a steering of some tokens": (nothing, steer_a_token),
    "another dtype": (wrong_masks_if(lambda _, mask: mask.dtype == torch.float64), change_the_dtype),
    "another attention": (
        wrong_masks_if(lambda model, _: model.config._attn_implementation == "eager"),
        change_the_attention,
    ),
    "other weights": (attend_to_nothing, change_the_weights),
    "full memory": (wrong_masks_if(lambda model, _: getattr(model, "full", False)), fill_the_memory),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("within", [False, True])
def test_what_was_learnt_before_a_change_is_not_believed_after_it(
    name: str, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, change = CHANGES[name]
    for seed in range(TRIES):
        draw = random.Random(seed)
        with monkeypatch.context() as patched:
            model = tiny.build("llama")
            plant(model, patched)
            if not within:
                extractor = extractor_of(model, draw.choice([1, 8]))
                check(extractor, model, draw_prompts(draw))
                change(model)
                check(extractor, model, draw_prompts(draw))
                continue
            stems = [[draw.randrange(10, 300) for _ in range(8)] for _ in range(2)]  # more than two packs
            ids = [[*draw.choice(stems), *(draw.randrange(10, 300) for _ in range(25))] for _ in range(50)]
            prompts = [ReadPrompt(row, [len(row) - 1]) for row in ids]
            parts = extractor_of(model, 1)(prompts)
            before = next(parts).prompts
            change(model)
            rows = {n: row for part in parts for n, row in zip(part.prompts, part.rows, strict=True)}
            assert rows.keys() | set(before) == set(range(len(prompts)))
            assert len(rows) > 15
            for number in list(rows)[:: len(rows) // 8]:
                alone = tiny.hidden_states(model, ids[number])[LAYER][-1]
                assert float((rows[number] - alone).norm() / alone.norm()) < 5e-4


def test_a_second_steering_on_a_steered_layer_is_seen() -> None:
    """It adds no hook to the first one's."""
    model = tiny.build("llama")
    SteeringVector({1: torch.ones(tiny.HIDDEN)}).patch_activations(model)
    extractor = extractor_of(model, 8)
    prompts = [ReadPrompt([*range(11, 20), n], [9]) for n in range(30, 40)]
    check(extractor, model, prompts)
    assert isinstance(extractor._ways[0], Packed)

    def add_by_column(activation: Tensor, direction: Tensor) -> Tensor:
        return direction * (torch.arange(activation.shape[1]) == 8)[:, None]

    SteeringVector({1: torch.ones(tiny.HIDDEN)}).patch_activations(model, operator=add_by_column)
    check(extractor, model, [*prompts, ReadPrompt([*range(50, 60), 7], [10])])
    assert not isinstance(extractor._ways[0], Packed)


def test_a_steering_by_row_that_comes_on_later_is_refused() -> None:
    model = tiny.build("llama")
    extractor = extractor_of(model, 8)
    prompts = [ReadPrompt([*range(11, 20), n], [9]) for n in range(30, 40)]
    check(extractor, model, prompts)
    with (
        SteeringVector({1: torch.ones(tiny.HIDDEN)}).apply(model, multiplier=[1.0, 2.0]),
        pytest.raises(ValueError, match="steered row by row"),
    ):
        check(extractor, model, prompts)


def test_nothing_is_looked_at_again_where_nothing_changes() -> None:
    model = tiny.build("llama")
    extractor = extractor_of(model, 8)
    prompts = [ReadPrompt([*range(11, 20), n], [9]) for n in range(30, 40)]
    check(extractor, model, prompts)
    before = extractor._ways
    check(extractor, model, prompts)
    assert extractor._ways is before
    assert not any(isinstance(way, OneAtATime) for way in before[:1])


@pytest.mark.parametrize("batch_size", [1, 8])
def test_one_token_repeated_beyond_the_window_hides_no_wrong_mask(batch_size: int) -> None:
    """Gemma 2 of transformers 4.46 to 4.52 counts its window in a pack's columns, which equal tokens can't show."""
    model = tiny.build("gemma2", sliding_window=8)
    for seed in range(TRIES):
        draw = random.Random(seed)
        repeated = [draw.randrange(10, 300)] * draw.randrange(20, 60)
        stem = [draw.randrange(10, 300) for _ in range(draw.randrange(1, 12))]
        others = [[*stem, *(draw.randrange(10, 300) for _ in range(draw.randrange(1, 8)))] for _ in range(12)]
        check(extractor_of(model, batch_size), model, [ReadPrompt(ids, [len(ids) - 1]) for ids in [repeated, *others]])
