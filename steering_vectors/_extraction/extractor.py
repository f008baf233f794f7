"""Run a model over prompts and yield, layer by layer, the rows that were asked for.

Each row is what its prompt alone gives. The model may compute it together with other prompts: in packs, in which each
distinct prefix stands once, or else in padded rows. Whether it gives the same then is checked, not assumed; where it
doesn't, each prompt is run alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steering_vectors._extraction.masks import (
    MaskKinds,
    attention_masks,
    critical_lengths,
    depends_on_length,
    mask_kinds,
    sparse_beyond,
)
from steering_vectors._extraction.packs import PACK_SIZE, Pack, chains, cheapest_packs, cost, pack_prompts, visible
from steering_vectors._extraction.verification import Probe, Verification, alike
from steering_vectors._models import (
    anatomy_of,
    by_tokens,
    has_hooks_of_users,
    input_device,
    is_sharded,
    kept_states,
    read_pass,
    stateful_modules,
    virtual_tokens,
    without_data_parallelism,
)
from steering_vectors._steering import is_steered_by_token

# Packs must save so much of the cost to be worth their masks.
_WORTH_PACKING = 0.9
# How many times as long as the longest prompt a pack may be: some kinds of attention take memory by its square.
_LONGEST_PACK = 4


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt's token ids, and the tokens to read: one position, or several whose weighted mean is taken.

    ``weights``, one per position, sum to 1; None for a single position, whose row keeps the model's dtype.
    """

    input_ids: list[int]
    positions: Sequence[int]
    weights: Sequence[float] | None = None


@dataclass(frozen=True, eq=False)
class LayerRows:
    """Some prompts' rows at one layer: ``rows (n, hidden)``, row i that of the prompt number ``prompts[i]``."""

    layer: int
    rows: Tensor
    prompts: Sequence[int]


@dataclass(frozen=True, eq=False)
class _Way:
    """A way to run prompts: the module that is called, on packs with masks of these kinds, on rows, or on one alone."""

    module: nn.Module
    stop_early: bool = False
    kinds: MaskKinds | None = None
    one_at_a_time: bool = False


class Extractor:
    """Runs a model over prompts, and keeps what it has learnt of the model.

    A pass takes at most the tokens of ``batch_size`` pairs of the longest prompts, or one pack.
    """

    def __init__(self, model: nn.Module, modules: Mapping[int, nn.Module], *, batch_size: int) -> None:
        self._model = without_data_parallelism(model)
        self.layers = sorted(modules)
        self._modules = modules
        self._batch_size = batch_size
        self._anatomy = anatomy_of(self._model)
        self._config = self._anatomy.text_config
        self._depends_on_length = depends_on_length(self._config)
        self._stateful = stateful_modules(model)
        self._ways = self._find_ways()
        self._is_causal = False  # until it was seen
        self._verification = Verification(critical_lengths(self._config))
        self._most_packs: int | None = None  # in a pass, since the memory was full once
        self._longest_pack: int | None = None  # since it was full with one pack

    def __call__(self, prompts: Sequence[ReadPrompt]) -> Iterator[LayerRows]:
        """Each prompt's row at each layer, in no promised order, layer after layer for each pass.

        The model is in evaluation mode while it runs, and afterwards, module by module, as it was.

        Raises ValueError for a model in which what follows a token changes its activation, as in encoders.
        """
        longest = max((prompt.input_ids for prompt in self._as_run(prompts)), key=len, default=[])
        sparse = sparse_beyond(self._config)
        if sparse is not None and len(longest) > sparse:
            self._ways = self._ways[-1:]
        if longest and not self._is_causal:
            self._check_causal(longest[:sparse])
        left = set(range(len(prompts)))
        while left:
            as_run = self._as_run(prompts)
            try:
                for packs in self._passes(as_run, sorted(left)):
                    for numbers, rows in self._run(packs, as_run):
                        left.difference_update(numbers)
                        yield from (LayerRows(layer, rows.pop(layer), numbers) for layer in self._modules)
            except _UnlikeError:
                self._ways.pop(0)
                self._verification = Verification(critical_lengths(self._config))

    def _as_run(self, prompts: Sequence[ReadPrompt]) -> Sequence[ReadPrompt]:
        """The prompts without what follows the last token to read, where that needn't run."""
        if self._depends_on_length or self._ways[0].one_at_a_time:
            return prompts
        return [replace(prompt, input_ids=prompt.input_ids[: max(prompt.positions) + 1]) for prompt in prompts]

    def _check_causal(self, input_ids: Sequence[int]) -> None:
        """``input_ids`` are some prompt's; its first tokens are run alone, and with those that follow."""
        ids = [*input_ids, input_ids[-1]][:16]  # a prompt of one token is followed by itself
        half = len(ids) // 2
        layer = max(self._modules)
        alone, followed = (
            self._alone(row, half - 1, [layer], stop_early=self._ways[0].stop_early)[layer] for row in (ids[:half], ids)
        )
        kind = type(self._model).__name__
        if not bool(alone.isfinite().all()):
            raise ValueError(
                f"{kind} gives NaN or infinite activations at layer {layer}: look at its weights, and at whether its "
                f"dtype, {alone.dtype}, is wide enough for it"
            )
        if not alike(followed, alone):
            raise ValueError(
                f"{kind} is no decoder-only language model: an activation changes with the tokens that follow it. For "
                f"a BERT-like model, set is_decoder=True in its config."
            )
        self._is_causal = True

    def _find_ways(self) -> list[_Way]:
        """The ways to try, the cheapest first; the last one is the model itself, run as its user would run it."""
        whole = [_Way(self._model), _Way(self._model, one_at_a_time=True)]
        decoder = self._anatomy.decoder
        if (
            self._anatomy.learns_prompts
            or is_sharded(self._model)
            or is_steered_by_token(self._model)
            or not set(self._modules.values()) <= set(decoder.modules())
        ):
            return whole
        is_here = all(parameter.device.type != "meta" for parameter in decoder.parameters())
        stop_early = is_here and len(set(self._modules.values())) == len(self._modules)
        # What somebody else's hook does may depend on the column, which in a pack isn't the token's index.
        packable = not self._depends_on_length and not has_hooks_of_users(decoder)
        kinds = mask_kinds(self._config) if packable else []
        return [*(_Way(decoder, stop_early, kind) for kind in kinds), _Way(decoder, stop_early), *whole]

    def _passes(self, prompts: Sequence[ReadPrompt], numbers: Sequence[int]) -> Iterator[list[Pack]]:
        """The packs of each pass, longest first: the first ones tell most."""
        ids, positions = [prompt.input_ids for prompt in prompts], [prompt.positions for prompt in prompts]
        way, most = self._ways[0], 2 * self._batch_size
        if way.one_at_a_time:
            yield from ([pack] for pack in chains(ids, positions, numbers, share=False))
            return
        rows = list(chains(ids, positions, numbers, share=not self._depends_on_length))
        if way.kinds is not None:
            tokens = most * len(rows[0])
            size = min(tokens, _LONGEST_PACK * len(rows[0]))
            packs = sorted(cheapest_packs(ids, positions, numbers, most=size), key=len, reverse=True)
            cost_of_rows = sum(len(group) * cost(len(group[0])) for group in self._in_passes(rows, most))
            if sum(cost(len(pack)) for pack in packs) < _WORTH_PACKING * cost_of_rows:
                rows, most = packs, max(1, tokens // max(PACK_SIZE, len(packs[0])))
        yield from self._in_passes(rows, most)

    def _in_passes(self, packs: Sequence[Pack], most: int) -> Iterator[list[Pack]]:
        group: list[Pack] = []
        for pack in packs:
            apart = self._depends_on_length and bool(group) and len(group[0]) != len(pack)
            if len(group) == min(most, self._most_packs or most) or apart:
                yield group
                group = []
            group.append(pack)
        if group:
            yield group

    def _run(self, packs: list[Pack], prompts: Sequence[ReadPrompt]) -> Iterator[tuple[list[int], dict[int, Tensor]]]:
        """The prompts' numbers and their rows by layer, of one pass; of more and smaller ones if the memory is full."""
        was_too_long = self._longest_pack is not None and len(packs) == 1 and len(packs[0]) > self._longest_pack
        if len(smaller := _halves(packs, prompts) if was_too_long else []) < 2:
            try:
                result = self._run_at_once(packs, prompts)
            except RuntimeError as error:
                smaller = _halves(packs, prompts)
                if not _is_out_of_memory(error) or len(smaller) < 2:
                    raise
                self._most_packs = max(1, len(packs) // 2)
                if len(packs) == 1:
                    self._longest_pack = len(packs[0]) // 2
            else:
                yield result
                return
        for half in smaller:
            yield from self._run(half, prompts)

    def _run_at_once(self, packs: list[Pack], prompts: Sequence[ReadPrompt]) -> tuple[list[int], dict[int, Tensor]]:
        """The prompts' numbers, and their rows by layer, of one pass.

        Raises _UnlikeError where the model gives something else for a prompt alone.
        """
        numbers = [number for pack in packs for number in pack.nodes]
        reads = _Reads()
        for row, pack in enumerate(packs):
            for number, nodes in pack.nodes.items():
                reads.add(row, nodes, prompts[number].weights)
        probes = [] if self._ways[0].one_at_a_time else self._verification.due(packs)
        for probe in probes:
            reads.add(probe.pack, [probe.node], None)
        rows = self._read(packs, reads)
        for n, probe in enumerate(probes):
            self._compare(packs[probe.pack], probe, {layer: part[len(numbers) + n] for layer, part in rows.items()})
            self._verification.note(packs, probe)
        return numbers, {layer: part[: len(numbers)] for layer, part in rows.items()}

    def _compare(self, pack: Pack, probe: Probe, found: Mapping[int, Tensor]) -> None:
        """Raise _UnlikeError unless the probe's prefix, run alone, gives what was found."""
        prefix = pack.path(probe.node)
        # What a pass's length changes is right only with all of the prompt.
        row = pack.input_ids if self._depends_on_length else prefix
        # That nothing changes after an early stop is seen once; the others can stop there.
        stop_early = self._ways[0].stop_early and self._verification.has_begun
        alone = self._alone(row, len(prefix) - 1, list(found), stop_early=stop_early)
        if not all(alike(activation, alone[layer]) for layer, activation in found.items()):
            raise _UnlikeError

    def _read(self, packs: list[Pack], reads: "_Reads") -> dict[int, Tensor]:
        """One pass over the packs: the rows, by layer. Raises _UnlikeError where the model can't be run so."""
        way = self._ways[0]
        before = virtual_tokens(way.module)
        inputs: dict[str, Any] = _right_padded([pack.input_ids for pack in packs], input_device(way.module))
        batch, seq = inputs["input_ids"].shape

        def read(activation: Tensor) -> Tensor:
            return reads(by_tokens(activation, batch, before + seq)[:, before:])

        try:
            if way.kinds is not None and any(pack.branches for pack in packs):
                inputs |= self._packed(packs, way.kinds, inputs["input_ids"].device)
            with kept_states(self._stateful):
                return read_pass(way.module, self._modules, inputs, read, stop_early=way.stop_early)
        except Exception as error:  # a model that can't be run so raises what it likes
            if len(self._ways) == 1 or _is_out_of_memory(error):
                raise
            raise _UnlikeError from error

    def _packed(self, packs: list[Pack], kinds: MaskKinds, device: torch.device) -> dict[str, Any]:
        seq = max(map(len, packs))
        # A column of padding sees itself alone, and no other sees it.
        ends = [[*pack.ends, *range(len(pack), seq)] for pack in packs]
        depths = torch.tensor([[*pack.depths, *[0] * (seq - len(pack))] for pack in packs], device=device)
        dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
        masks = attention_masks(kinds, self._config, visible(torch.tensor(ends, device=device)), depths, dtype)
        return {"attention_mask": masks, "position_ids": depths}

    def _alone(
        self, input_ids: Sequence[int], position: int, layers: Sequence[int], *, stop_early: bool
    ) -> dict[int, Tensor]:
        """The activation ``(hidden,)`` at one position of a prompt that is run alone, by layer."""
        inputs = _right_padded([input_ids], input_device(self._model))
        before = virtual_tokens(self._model)

        def read(activation: Tensor) -> Tensor:
            return by_tokens(activation, 1, before + len(input_ids))[0, before + position]

        modules = {layer: self._modules[layer] for layer in layers}
        with kept_states(self._stateful):
            return read_pass(self._model, modules, inputs, read, stop_early=stop_early)


class _UnlikeError(Exception):
    """The model gives something else for a prompt alone."""


class _Reads:
    """Which tokens of an activation ``(batch, seq, hidden)`` make which rows: weighted sums of some tokens each."""

    def __init__(self) -> None:
        self._rows = 0
        self._tokens: list[tuple[int, int, int]] = []  # row of the result, row of the batch, column
        self._weights: list[float] = []
        self._any_weights = False

    def add(self, batch_row: int, columns: Sequence[int], weights: Sequence[float] | None) -> None:
        self._tokens.extend((self._rows, batch_row, column) for column in columns)
        self._weights.extend(weights or [1.0] * len(columns))
        self._any_weights |= weights is not None
        self._rows += 1

    def __call__(self, activation: Tensor) -> Tensor:
        """``(rows, hidden)``, in float32 or wider if there are weights."""
        device = activation.device
        owners, batch_rows, columns = torch.tensor(self._tokens, device=device).unbind(dim=1)
        tokens = activation[batch_rows, columns]  # (tokens, hidden)
        if not self._any_weights:
            return tokens
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        weighted = wide * torch.tensor(self._weights, device=device, dtype=wide.dtype)[:, None]
        return wide.new_zeros(self._rows, wide.shape[-1]).index_add_(0, owners, weighted)


def _halves(packs: list[Pack], prompts: Sequence[ReadPrompt]) -> list[list[Pack]]:
    """The same prompts in two passes, or in smaller packs of their own passes."""
    if len(packs) > 1:
        return [packs[: len(packs) // 2], packs[len(packs) // 2 :]]
    ids, positions = [prompt.input_ids for prompt in prompts], [prompt.positions for prompt in prompts]
    return [[pack] for pack in pack_prompts(ids, positions, list(packs[0].nodes), len(packs[0]) // 2)]


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids and mask. On the right no padding is seen, so any id will do: a row's own last.

    Nor does it move the tokens, so that each model's own position ids are right, wherever they begin.
    """
    longest = max(map(len, rows))
    ids = [[*row, *[row[-1]] * (longest - len(row))] for row in rows]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": (torch.arange(longest, device=device) < lengths[:, None]).long(),
    }


def _is_out_of_memory(error: Exception) -> bool:
    return "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower()
