"""Packs: each distinct prefix once, each prompt whole in one pack, and each token sees its own prefix alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering_vectors._extraction.packs import (
    Pack,
    chains,
    cheapest_packs,
    distinct_prefixes,
    pack_prompts,
    shared_prefix,
    visible,
)

# Few tokens, so that prompts share much.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


def everywhere(prompts: list[list[int]]) -> list[list[int]]:
    return [list(range(len(prompt))) for prompt in prompts]


def check(packs: list[Pack], prompts: list[list[int]]) -> None:
    """Each prompt stands in one pack, where its tokens see what stands before them in the prompt and nothing else."""
    assert sorted(number for pack in packs for number in pack.nodes) == list(range(len(prompts)))
    for pack in packs:
        sees = visible(torch.tensor([pack.ends]))[0]
        for number, nodes in pack.nodes.items():
            for position, node in enumerate(nodes):
                prefix = prompts[number][: position + 1]
                assert [pack.input_ids[n] for n in sees[node].nonzero().flatten()] == prefix == pack.path(node)
                assert pack.depths[node] == position
                assert pack.skipped[node] == node - sees[node].nonzero()[0] - position


@given(PROMPTS, st.integers(1, 30))
def test_each_token_sees_its_own_prefix_alone(prompts: list[list[int]], size: int) -> None:
    packs = list(pack_prompts(prompts, everywhere(prompts), range(len(prompts)), size))
    check(packs, prompts)
    assert all(len(pack) <= max(size, max(pack.depths) + 1) for pack in packs)
    assert [pack.branches for pack in packs] == [sorted(pack.depths) != list(range(len(pack))) for pack in packs]


@given(PROMPTS)
def test_one_pack_holds_each_distinct_prefix_once(prompts: list[list[int]]) -> None:
    (pack,) = pack_prompts(prompts, everywhere(prompts), range(len(prompts)), 1000)
    assert len(pack) == len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


@given(PROMPTS, st.booleans())
def test_chains_are_prompts_that_hold_those_that_they_begin_with(prompts: list[list[int]], share: bool) -> None:
    packs = list(chains(prompts, everywhere(prompts), range(len(prompts)), share=share))
    check(packs, prompts)
    assert not any(pack.branches for pack in packs)
    lengths = [len(pack) for pack in packs]
    assert lengths == sorted(lengths, reverse=True)
    distinct = {tuple(prompt) for prompt in prompts}
    if share:
        begun = {
            prompt
            for prompt in distinct
            if any(other != prompt and other[: len(prompt)] == prompt for other in distinct)
        }
        distinct -= begun
    assert sorted(tuple(pack.input_ids) for pack in packs) == sorted(distinct)


@given(st.lists(st.integers(0, 1), max_size=8), st.lists(st.integers(0, 1), max_size=8))
def test_a_shared_prefix_is_the_longest(some: list[int], other: list[int]) -> None:
    length = shared_prefix(some, other)
    assert some[:length] == other[:length]
    assert length == min(len(some), len(other)) or some[length] != other[length]


def test_only_the_prompts_that_are_named_are_packed_and_only_their_positions_are_told() -> None:
    prompts = [[1, 2, 3], [1, 2, 4], [9]]
    (pack,) = pack_prompts(prompts, [[2], [0, 2], [0]], [0, 1])
    assert pack.input_ids == [1, 2, 3, 4]
    assert pack.nodes == {0: [2], 1: [0, 3]}


@given(PROMPTS)
def test_distinct_prefixes_are_counted_once(prompts: list[list[int]]) -> None:
    assert distinct_prefixes(prompts) == len({tuple(p[:end]) for p in prompts for end in range(1, len(p) + 1)})


@given(PROMPTS, st.integers(1, 1000))
def test_the_cheapest_packs_hold_all_prompts(prompts: list[list[int]], most: int) -> None:
    check(cheapest_packs(prompts, everywhere(prompts), range(len(prompts)), most=most), prompts)


@pytest.mark.parametrize(("stem", "most", "tokens"), [(100, 512, 1.4), (500, 4000, 1.6), (1000, 4000, 1.6)])
def test_the_cheapest_packs_repeat_a_long_beginning_seldom(stem: int, most: int, tokens: float) -> None:
    prompts = [[*range(stem), *(stem + 10 * n + k for k in range(10))] for n in range(100)]
    packs = cheapest_packs(prompts, [[len(p) - 1] for p in prompts], range(len(prompts)), most=most)
    assert sum(map(len, packs)) <= tokens * distinct_prefixes(prompts)
    assert max(map(len, packs)) <= max(most, stem + 10)


def test_prompts_longer_than_a_pack_share_it_where_they_are_equal_or_nested() -> None:
    long = list(range(700))
    prompts = [long, long, long[:690], long[:20], [*long[:20], 5]]
    packs = list(pack_prompts(prompts, [[len(p) - 1] for p in prompts], range(len(prompts))))
    assert sorted(map(len, packs)) == [21, 700]
