"""The law over random histories of a cache: every token has the index that it has in its row alone.

``STEERING_VECTORS_HISTORIES`` sets how many histories are tried for each model.
"""

import copy
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors import SteeringVector, TokenPositions
from steering_vectors._passes.arguments import pass_arguments
from steering_vectors._passes.positions import Past, locate
from tests import tiny

EXAMPLES = int(os.environ.get("STEERING_VECTORS_HISTORIES", "8"))
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
VECTOR = SteeringVector({1: torch.zeros(tiny.HIDDEN) + 0.1})
needs_cache_objects = pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="there the model makes tuples of tensors")


@dataclass
class Row:
    """A row of a cache as a person would keep it: its columns, and how many of the tokens are the prompt's."""

    is_token: list[bool]
    prompt: int | None
    ids: list[int] = field(default_factory=list)

    def feed(self, columns: list[bool], ids: list[int]) -> list[int]:
        """The indices of new columns, -1 on padding, which the row then holds."""
        indices = []
        for is_token, token in zip(columns, ids, strict=True):
            indices.append(sum(self.is_token) if is_token else -1)
            self.is_token.append(is_token)
            self.ids.append(token if is_token else -1)
        return indices


@dataclass
class History:
    """One cache with its rows, and the passes over it so far."""

    rows: list[Row]
    cache: Any = None
    prompt_columns: int = 0
    originals: list[Any] = field(default_factory=list)  # a cache is copied to use it again
    since: set[str] = field(default_factory=set)  # what was done to the cache since its last pass
    is_unknown: bool = False

    def did(self, kind: str) -> None:
        """Note a change. A copy is recognized by the contents of its original, unless either has changed since."""
        self.since.add(kind)
        self.is_unknown |= len(self.since) > 1 and "copy" in self.since


@dataclass
class Watched:
    """A steered model whose selector keeps what it sees, the rows' ids too if it needs them."""

    model: Any
    needs_row_ids: bool
    seen: list[TokenPositions] = field(default_factory=list)

    def __call__(self, positions: TokenPositions) -> Tensor:
        self.seen.append(positions)
        return positions.index >= 0

    @property
    def cache_name(self) -> str:
        parameters = inspect.signature(self.model.forward).parameters
        return next(name for name in ("cache", "cache_params", "past_key_values") if name in parameters)

    def run(self, history: History, new: list[list[bool]], mask: str, ids: str, draw: Any) -> None:
        """Run the model on new columns, and compare what the selector saw with the rows' own count.

        Of an unknown copy the prompt may be unknown, and a mask shows its padding.
        """
        mask, was_unknown = "whole" if history.is_unknown else mask, history.is_unknown
        is_first, seq = history.cache is None, len(new[0])
        given = st.lists(st.integers(5, 300), min_size=seq, max_size=seq)
        tokens = torch.tensor(draw(st.lists(given, min_size=len(new), max_size=len(new))))
        fed = zip(history.rows, new, tokens.tolist(), strict=True)
        expected = [row.feed(columns, row_ids) for row, columns, row_ids in fed]
        for row in history.rows:
            if is_first:
                row.prompt = sum(row.is_token)
            elif seq > 1:
                row.prompt = None
        arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
        whole = torch.tensor([row.is_token for row in history.rows]).long()
        if mask != "none":
            arguments["attention_mask"] = whole if mask == "whole" else whole[:, -seq:]
        if ids == "own":
            arguments["position_ids"] = torch.tensor(expected).clamp(min=0)
        if ids == "columns":
            arguments["position_ids"] = torch.arange(whole.shape[1])[None, -seq:].expand(len(new), -1)
        if not is_first:
            arguments[self.cache_name] = history.cache
        count = len(self.seen)
        with torch.no_grad():
            output = self.model(**arguments)
        history.cache = output[self.cache_name]
        if is_first:
            history.prompt_columns = seq
        positions = self.seen[count]
        assert positions.index.tolist() == expected
        if self.needs_row_ids:
            assert positions.row_ids is not None
            assert positions.row_ids.tolist() == [row.ids for row in history.rows]
        else:
            assert positions.row_ids is None
        lengths = None if positions.prompt_length is None else positions.prompt_length.tolist()
        prompts = [row.prompt for row in history.rows]
        assert lengths == (None if None in prompts else prompts) or (was_unknown and lengths is None)
        history.since = set()
        if was_unknown and lengths is None:
            for row in history.rows:
                row.prompt = None
        history.is_unknown = False


def begun(watched: Watched, draw: Any, *, ids: bool, padding: bool) -> History:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    side = draw(st.sampled_from(["left", "right"])) if padding else "none"
    width = max(lengths)
    if side == "none":
        lengths = [width] * len(lengths)
    blank = [[False] * (width - n) for n in lengths]
    new = [[*b, *[True] * n] if side == "left" else [*[True] * n, *b] for b, n in zip(blank, lengths, strict=True)]
    history = History([Row([], None) for _ in lengths])
    is_padded = len(set(lengths)) > 1
    mask = "whole" if is_padded else draw(st.sampled_from(["whole", "none"]))
    watched.run(history, new, mask, draw(st.sampled_from(["none", "own", "columns"])) if ids else "none", draw)
    return history


def changed(history: History, kind: str, draw: Any) -> None:
    """Change the cache by Hugging Face's own method, and the rows by hand."""
    rows, n = history.rows, len(history.rows)
    history.did(kind)
    if kind == "copy":
        history.originals.append(history.cache)
        history.cache = copy.deepcopy(history.cache)
    elif kind == "crop" and (columns := len(rows[0].is_token)) > 1:
        removed = draw(st.integers(1, columns - 1))
        history.cache.crop(-removed)
        for row in rows:
            del row.is_token[-removed:], row.ids[-removed:]
            row.prompt = row.prompt if columns - removed >= history.prompt_columns else None
    elif kind == "reorder":
        order = draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n))
        history.cache.reorder_cache(torch.tensor(order))
        history.rows = [copy.deepcopy(rows[number]) for number in order]
    elif kind == "repeat" and n < 4:
        history.cache.batch_repeat_interleave(2)
        history.rows = [copy.deepcopy(row) for row in rows for _ in range(2)]
    elif kind == "select":
        kept = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n))
        history.cache.batch_select_indices(torch.tensor(kept))
        history.rows = [copy.deepcopy(rows[number]) for number in kept]


def lived_through(
    model: Any, draw: Any, changes: list[str], *, longest: int, masks: list[str], ids: bool = True, padding: bool = True
) -> None:
    """Follow a few caches through passes and changes."""
    watched = Watched(model, draw(st.booleans()))
    with VECTOR.apply(model, tokens=watched):
        histories = [begun(watched, draw, ids=ids, padding=padding)]
        for _ in range(draw(st.integers(1, 6))):
            kind = draw(st.sampled_from(["continue", "continue", "another", *changes]))
            history = draw(st.sampled_from(histories))
            if kind == "another":
                histories.append(begun(watched, draw, ids=ids, padding=padding))
            elif kind == "continue":
                seq = draw(st.integers(1, longest))
                mask = draw(st.sampled_from(masks))
                if history.is_unknown and ("whole" not in masks or watched.needs_row_ids):  # a changed copy
                    assume(False)
                watched.run(history, [[True] * seq for _ in history.rows], mask, "none", draw)
            else:
                changed(history, kind, draw)


@needs_cache_objects
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@given(data=st.data())
@many
def test_of_attention_are_followed(architecture: str, data: st.DataObject) -> None:
    # The window of a sliding layer can't be cropped back beyond its length.
    changes = ["copy", "reorder", "repeat", "select", *(() if architecture == "gemma3" else ("crop",))]
    lived_through(tiny.shared(architecture), data.draw, changes, longest=3, masks=["whole", "none", "pass"])


@needs_cache_objects
@given(data=st.data())
@many
def test_of_a_recurrent_model_are_followed(data: st.DataObject) -> None:
    lived_through(tiny.shared("mamba"), data.draw, ["copy", "reorder"], longest=1, masks=["none"], ids=False)


@needs_cache_objects
@given(data=st.data())
@many
def test_of_a_hybrid_are_followed(data: st.DataObject) -> None:
    model = hybrid()
    lived_through(model, data.draw, ["copy", "reorder"], longest=1, masks=["whole", "none"], padding=False)


def hybrid(built: list[Any] = []) -> Any:  # noqa: B006
    """A model of convolutions and attention, built once."""
    if not built:
        config = transformers.Lfm2Config(
            vocab_size=tiny.VOCABULARY,
            hidden_size=tiny.HIDDEN,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv"],
        )
        built.append(transformers.Lfm2ForCausalLM(config).eval())
    return built[0]


@st.composite
def packs(draw: st.DrawFn) -> list[list[int]]:
    """Rows of one width, each cut into texts of these lengths."""
    width = draw(st.integers(2, 12))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        lengths: list[int] = []
        while sum(lengths) < width:
            lengths.append(draw(st.integers(1, width - sum(lengths))))
        rows.append(lengths)
    return rows


def additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


@given(packs(), st.integers(0, 3), st.sampled_from([None, lambda seen: seen, additive]), st.booleans())
@settings(max_examples=10 * EXAMPLES, deadline=None)
def test_texts_in_one_row_are_counted_each_alone(
    rows: list[list[int]], first: int, mask: Callable[[Tensor], Tensor] | None, with_ids: bool
) -> None:
    index = torch.tensor([[n for length in lengths for n in range(length)] for lengths in rows])
    text = torch.tensor([[t for t, length in enumerate(lengths) for _ in range(length)] for lengths in rows])
    seen = (text[:, :, None] == text[:, None, :]) & torch.ones(index.shape[1], index.shape[1]).tril().bool()
    arguments: dict[str, Any] = {"input_ids": torch.ones_like(index)}
    if mask is None or with_ids:
        arguments["position_ids"] = index + first
    if mask is not None:
        arguments["attention_mask"] = mask(seen[:, None])
    located = locate(pass_arguments(arguments), Past())
    assert located.index.tolist() == index.tolist()
    real = max(sum(length > 1 for length in lengths) for lengths in rows)
    assert located.several_texts or real <= 1
