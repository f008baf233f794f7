"""The ways to run prompts through a model, from the cheapest to the surest.

Each computes rows of activations in its own passes and compares some tokens with their prompts alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._extraction.conditions import Steered
from steering_vectors._extraction.masks import attention_masks
from steering_vectors._extraction.memory import Memory, is_out_of_memory
from steering_vectors._extraction.packs import PACK_SIZE, Pack, chains, cheapest_packs, cost, pack_prompts, visible
from steering_vectors._extraction.read_model import ReadModel, ReadPrompt, Reads, as_inputs
from steering_vectors._extraction.verification import Probe, Verification, alike, compared_nodes, padding_of
from steering_vectors._models import (
    MaskKinds,
    has_hooks_of_users,
    is_sharded,
)

# Building the packs and their masks costs about a tenth of what small passes do: with less to save, rows are faster.
_WORTH_PACKING = 0.9
# How many times as long as the longest prompt a pack may be: some kinds of attention take memory by its square.
_LONGEST_PACK = 4


class UnlikeError(Exception):
    """Raised where a way computes something else than the model does for a prompt alone."""


class Way(ABC):
    """A way to run prompts, in passes of one module."""

    def __init__(self, source: ReadModel, module: nn.Module, *, stop_early: bool = False) -> None:
        self.module = module
        self.verification = Verification(source.attention.critical_lengths)
        self.stop_early = stop_early
        self._source = source

    def as_run(self, prompts: Sequence[ReadPrompt]) -> Sequence[ReadPrompt]:
        """Return the prompts without what follows the last token to read, where that needn't run."""
        if self._source.attention.depends_on_length:
            return prompts
        return [replace(prompt, input_ids=prompt.input_ids[: max(prompt.positions) + 1]) for prompt in prompts]

    @abstractmethod
    def passes(
        self, prompts: Sequence[ReadPrompt], numbers: Sequence[int], batch_size: int, memory: Memory
    ) -> Iterator[list[Pack]]:
        """Yield the packs of each pass over the prompts with these numbers, longest first: the first ones tell most.

        A pass takes at most the tokens of ``batch_size`` pairs of the longest prompts, or those of one pack.
        """

    def run(self, packs: Sequence[Pack], prompts: Sequence[ReadPrompt]) -> tuple[list[int], dict[int, Tensor]]:
        """Return the prompts' numbers, and their rows by layer, of one pass.

        Raises UnlikeError where the model computes something else for a prompt alone, or can't be run so.
        """
        numbers = [number for pack in packs for number in pack.nodes]
        reads = Reads()
        for row, pack in enumerate(packs):
            for number, nodes in pack.nodes.items():
                reads.add(row, nodes, prompts[number].weights)
        probes = {probe: compared_nodes(packs[probe.pack], probe.node) for probe in self._due(packs)}
        for probe, nodes in probes.items():
            for node in nodes:
                reads.add(probe.pack, [node], None)
        try:
            rows = self._read(packs, reads)
            start = len(numbers)
            for probe, nodes in probes.items():
                found = {layer: part[start : start + len(nodes)] for layer, part in rows.items()}
                self._compare(packs[probe.pack], probe, nodes, found)
                self.verification.note(packs, probe)
                start += len(nodes)
        except RuntimeError as error:
            if is_out_of_memory(error):
                self.verification.forget()  # smaller passes are other ones, and so may be the kernels that they run
            raise
        return numbers, {layer: part[: len(numbers)] for layer, part in rows.items()}

    def split(self, pack: Pack, prompts: Sequence[ReadPrompt]) -> list[Pack]:
        """Return packs of half the size with the same prompts."""
        ids, positions = _columns(prompts)
        return list(pack_prompts(ids, positions, list(pack.nodes), len(pack) // 2))

    def _due(self, packs: Sequence[Pack]) -> list[Probe]:
        return self.verification.due(packs)

    def _read(self, packs: Sequence[Pack], reads: Reads) -> dict[int, Tensor]:
        try:
            return self._source.read(self.module, self._inputs(packs), reads, stop_early=self.stop_early)
        except Exception as error:  # a model that can't be run so raises what it likes
            if is_out_of_memory(error):
                raise
            raise UnlikeError from error

    def _inputs(self, packs: Sequence[Pack]) -> dict[str, Any]:
        width = max(map(len, packs))
        rows = [pack.input_ids + padding_of(pack, packs, width) for pack in packs]
        return as_inputs(rows, list(map(len, packs)), self._source.anatomy.input_device)

    def _compare(self, pack: Pack, probe: Probe, nodes: Sequence[int], found: Mapping[int, Tensor]) -> None:
        """Raise UnlikeError unless the probe's prefix, run alone, has the same activations."""
        # What a pass's length changes is right only with all of the prompt.
        row = pack.input_ids if self._source.attention.depends_on_length else pack.path(probe.node)
        # That nothing changes after an early stop is seen once; the others can stop there.
        stop_early = self.stop_early and self.verification.has_begun
        alone = self._source.alone(row, [pack.depths[node] for node in nodes], stop_early=stop_early)
        if not all(alike(activation, alone[layer]) for layer, activation in found.items()):
            raise UnlikeError

    def _rows(self, prompts: Sequence[ReadPrompt], numbers: Sequence[int]) -> list[Pack]:
        """Return the prompts that no other begins with, each as a pack."""
        return list(chains(*_columns(prompts), numbers, share=not self._source.attention.depends_on_length))

    def _most_rows(self, rows: Sequence[Pack], batch_size: int) -> int:
        """Return the number of rows to a pass: those of ``batch_size`` pairs, or as many as fill a pack.

        A model around the decoder computes logits too, whose size isn't known: there it is the former.
        """
        fill = PACK_SIZE // len(rows[0]) if self.module is self._source.anatomy.decoder else 0
        return max(2 * batch_size, fill)

    def _in_passes(self, packs: Sequence[Pack], most: int, memory: Memory) -> Iterator[list[Pack]]:
        group: list[Pack] = []
        for pack in packs:
            apart = self._source.attention.depends_on_length and bool(group) and len(group[0]) != len(pack)
            if len(group) == min(most, memory.most_packs or most) or apart:
                yield group
                group = []
            group.append(pack)
        if group:
            yield group


class OneAtATime(Way):
    """The model itself, run on one prompt at a time as its user would run it."""

    def as_run(self, prompts: Sequence[ReadPrompt]) -> Sequence[ReadPrompt]:
        """Return the prompts as they are."""
        return prompts

    def passes(
        self, prompts: Sequence[ReadPrompt], numbers: Sequence[int], batch_size: int, memory: Memory
    ) -> Iterator[list[Pack]]:
        """Yield each distinct prompt."""
        yield from ([pack] for pack in chains(*_columns(prompts), numbers, share=False))

    def _due(self, packs: Sequence[Pack]) -> list[Probe]:
        return []

    def _read(self, packs: Sequence[Pack], reads: Reads) -> dict[int, Tensor]:
        return self._source.read(self.module, self._inputs(packs), reads, stop_early=self.stop_early)


class Rows(Way):
    """Padded rows, those that others begin with inside them."""

    def passes(
        self, prompts: Sequence[ReadPrompt], numbers: Sequence[int], batch_size: int, memory: Memory
    ) -> Iterator[list[Pack]]:
        """Yield rows, and several to a pass."""
        rows = self._rows(prompts, numbers)
        yield from self._in_passes(rows, self._most_rows(rows, batch_size), memory)


class Packed(Way):
    """Packs in which each distinct prefix stands once, under masks of these kinds; rows where they cost no more."""

    def __init__(self, source: ReadModel, module: nn.Module, kinds: MaskKinds, *, stop_early: bool) -> None:
        super().__init__(source, module, stop_early=stop_early)
        self._kinds = kinds

    def passes(
        self, prompts: Sequence[ReadPrompt], numbers: Sequence[int], batch_size: int, memory: Memory
    ) -> Iterator[list[Pack]]:
        """Yield packs or rows, whichever are cheaper, and several to a pass."""
        rows = self._rows(prompts, numbers)
        most, tokens = self._most_rows(rows, batch_size), 2 * batch_size * len(rows[0])
        size = min(tokens, _LONGEST_PACK * len(rows[0]))
        packs = sorted(cheapest_packs(*_columns(prompts), numbers, most=size), key=len, reverse=True)
        cost_of_rows = sum(len(group) * cost(len(group[0])) for group in self._in_passes(rows, most, memory))
        if sum(cost(len(pack)) for pack in packs) < _WORTH_PACKING * cost_of_rows:
            rows, most = packs, max(1, tokens // max(PACK_SIZE, len(packs[0])))
        yield from self._in_passes(rows, most, memory)

    def _inputs(self, packs: Sequence[Pack]) -> dict[str, Any]:
        if not any(pack.branches for pack in packs):
            return super()._inputs(packs)
        # The last column is padding: what a model does to the last one only must not be taken for the last token's.
        width = max(map(len, packs)) + 1
        device = self._source.anatomy.input_device
        rows = torch.tensor([pack.input_ids + padding_of(pack, packs, width) for pack in packs], device=device)
        # A column of padding sees itself alone, and no other sees it.
        ends = [[*pack.ends, *range(len(pack), width)] for pack in packs]
        depths = torch.tensor([[*pack.depths, *[0] * (width - len(pack))] for pack in packs], device=device)
        dtype = next(p.dtype for p in self._source.anatomy.model.parameters() if p.is_floating_point())
        seen = visible(torch.tensor(ends, device=device))  # (packs, width, width)
        masks = attention_masks(self._kinds, self._source.attention, seen, depths, dtype)
        return {"input_ids": rows, "attention_mask": masks, "position_ids": depths}


def find_ways(source: ReadModel, steered: Steered) -> list[Way]:
    """Return the ways to try, the cheapest first; the last one is the model itself, run as its user would run it."""
    model = source.anatomy.model
    if steered.perhaps_by_row or source.rounding_decides:
        return [OneAtATime(source, model)]
    whole = [Rows(source, model), OneAtATime(source, model)]
    *wrappers, decoder = source.anatomy.pass_modules
    inside = set(decoder.modules())
    if (
        source.anatomy.learns_prompts
        or is_sharded(model)
        or steered.by_token
        or has_hooks_of_users(wrappers)
        or not all(site.module in inside for site in source.layers.values())
    ):
        return whole
    is_offloaded = any(parameter.device.type == "meta" for parameter in decoder.parameters())
    stop_early = not is_offloaded and len(set(source.layers.values())) == len(source.layers)
    # What somebody else's hook does may depend on the column, which in a pack isn't the token's index.
    packable = not source.attention.depends_on_length and not has_hooks_of_users(inside)
    kinds = source.attention.mask_kinds if packable else []
    packed = [Packed(source, decoder, kind, stop_early=stop_early) for kind in kinds]
    return [*packed, Rows(source, decoder, stop_early=stop_early), *whole]


def _columns(prompts: Sequence[ReadPrompt]) -> tuple[list[list[int]], list[Sequence[int]]]:
    """Return all prompts' token ids, and their positions."""
    return [prompt.input_ids for prompt in prompts], [prompt.positions for prompt in prompts]
