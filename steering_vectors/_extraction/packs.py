"""Arrange prompts in packs, in which each distinct prefix occurs once.

In a causal model an activation depends only on the tokens up to its own, so prompts that begin alike can share their
beginnings. Prompts sorted by their tokens are a depth-first walk of the tree of their prefixes. A pack is a piece of
that walk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steering_vectors._locks import computed_once

# Attention's cost grows with the square of a pack. On CPUs packs of 256 to 512 tokens were the fastest, and each token
# of a pack of 2,048 cost one and a half times as much.
PACK_SIZE = 512
_COSTS_TWICE = 3072  # tokens beyond PACK_SIZE, for each of all
# Larger packs are tried if those of PACK_SIZE repeat more than this share of their tokens.
_REPEATED = 0.1


@dataclass(frozen=True, eq=False)
class Pack:
    """Tokens ``(n,)`` in the walk's order.

    ``depths``: the number of tokens before each in its prompt. ``ends``: the last token that has each as an ancestor,
    or the token itself. ``nodes``: by prompt number, the places of the tokens to read.
    """

    input_ids: list[int]
    depths: list[int]
    ends: list[int]
    nodes: dict[int, list[int]]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def branches(self) -> bool:
        """True if some token must not see all tokens before it."""
        return self.depths[-1] < len(self) - 1

    @computed_once
    def skipped(self) -> list[int]:
        """The number of other tokens between each token's ancestors."""
        roots: list[int] = []
        for place, depth in enumerate(self.depths):
            roots.append(place if depth == 0 else roots[-1])
        return [place - root - depth for place, (root, depth) in enumerate(zip(roots, self.depths, strict=True))]

    def nodes_to(self, node: int) -> list[int]:
        """Return the places of the tokens in the prefix that ends with ``node``."""
        return [place for place in range(node + 1) if self.ends[place] >= node]

    def path(self, node: int) -> list[int]:
        """Return the token ids of the prefix that ends with ``node``."""
        return [self.input_ids[place] for place in self.nodes_to(node)]


def pack_prompts(
    prompts: Sequence[list[int]], positions: Sequence[Sequence[int]], numbers: Sequence[int], size: int = PACK_SIZE
) -> Iterator[Pack]:
    """Yield packs of at most ``size`` tokens, or of one prompt that is longer.

    ``numbers`` selects among the ``prompts``, and ``positions`` are the tokens to read of each. A prompt is never cut:
    a beginning that it shares with prompts of an earlier pack is repeated. The longest prompt comes last, so that the
    last token is both the deepest one and the one with most tokens before it.
    """
    longest = max((prompts[number] for number in numbers), key=lambda prompt: (len(prompt), prompt), default=[])
    ids: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    nodes: dict[int, list[int]] = {}
    path: list[int] = []  # the places of the tokens of the walk's last prompt
    before: list[int] = []

    def close(depth: int) -> None:
        for node in path[depth:]:
            ends[node] = len(ids) - 1
        del path[depth:]

    def place(number: int) -> tuple[int, list[int]]:
        return shared_prefix(longest, prompts[number]), prompts[number]

    for number in sorted(numbers, key=place):
        prompt = prompts[number]
        shared = shared_prefix(before, prompt)
        new = len(prompt) - shared
        is_one_path = shared == len(ids)  # longer, and no wider
        if ids and new and len(ids) + new > size and not is_one_path:
            close(0)
            yield Pack(ids, depths, ends, nodes)
            ids, depths, ends, nodes, shared = [], [], [], {}, 0
        close(shared)
        path.extend(range(len(ids), len(ids) + len(prompt) - shared))
        ids.extend(prompt[shared:])
        depths.extend(range(shared, len(prompt)))
        ends.extend([0] * (len(prompt) - shared))
        nodes[number] = [path[position] for position in positions[number]]
        before = prompt
    if ids:
        close(0)
        yield Pack(ids, depths, ends, nodes)


def cheapest_packs(
    prompts: Sequence[list[int]], positions: Sequence[Sequence[int]], numbers: Sequence[int], *, most: int
) -> list[Pack]:
    """Return packs of the cheapest size, up to ``most`` tokens.

    Small packs would repeat the shared beginning of long prompts many times.
    """
    packs, size = list(pack_prompts(prompts, positions, numbers)), PACK_SIZE
    distinct = distinct_prefixes([prompts[number] for number in numbers])
    longest = max(len(prompts[number]) for number in numbers)
    while (1 - _REPEATED) * sum(map(len, packs)) > distinct and size < most:
        size = min(max(2 * size, longest + PACK_SIZE), most)
        larger = list(pack_prompts(prompts, positions, numbers, size))
        if sum(cost(len(pack)) for pack in larger) >= sum(cost(len(pack)) for pack in packs):
            break
        packs = larger
    return packs


def cost(length: int) -> float:
    """Return the cost of a pack or a row of ``length`` tokens, in tokens of a short one."""
    return length * (1 + max(0, length - PACK_SIZE) / _COSTS_TWICE)


def distinct_prefixes(prompts: Sequence[list[int]]) -> int:
    """Return the number of tokens in the prompts, shared beginnings counted once."""
    count, before = 0, list[int]()
    for prompt in sorted(prompts):
        count += len(prompt) - shared_prefix(before, prompt)
        before = prompt
    return count


def visible(ends: Tensor) -> Tensor:
    """Return a mask of each token's ancestors and itself: ``ends (packs, n)`` → ``(packs, n, n)``."""
    places = torch.arange(ends.shape[-1], device=ends.device)
    return (places <= places[:, None]) & (places[:, None] <= ends[:, None, :])


def shared_prefix(some: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of two sequences of one type."""
    length = min(len(some), len(other))
    if some[:length] == other[:length]:
        return length
    low, high = 0, length  # some[:low] is shared, some[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if some[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def chains(
    prompts: Sequence[list[int]], positions: Sequence[Sequence[int]], numbers: Sequence[int], *, share: bool = True
) -> Iterator[Pack]:
    """Yield the prompts that are not the beginning of another, each as a pack, longest first.

    Beginnings of others, and equal prompts, are read inside them. Without ``share``, only equal prompts are.
    """
    whole: dict[int, dict[int, list[int]]] = {}  # a prompt's number → what is read of it, by prompt number
    longest: list[int] = []
    for number in sorted(numbers, key=prompts.__getitem__, reverse=True):
        prompt = prompts[number]
        if not whole or longest[: len(prompt)] != prompt or not (share or len(longest) == len(prompt)):
            longest, reads = prompt, whole.setdefault(number, {})
        reads[number] = list(positions[number])
    for number in sorted(whole, key=lambda number: -len(prompts[number])):
        length = len(prompts[number])
        yield Pack(prompts[number], list(range(length)), [length - 1] * length, whole[number])
