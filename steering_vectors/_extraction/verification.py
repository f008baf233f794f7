"""Choose the tokens by which a pass over many prompts is compared with its prompts alone.

A pass may go wrong by several hazards: a token's depth in its prompt, its column in a pack, others between or before
its ancestors, padding, tokens behind it, other rows. The more a token is exposed to a hazard, the sooner it is hit:
where the most exposed token is right, the others are. A fault that strikes only less exposed tokens is not found.
Passes with masks and passes without are compared separately.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from steering_vectors._extraction.packs import Pack
from steering_vectors._precision import autocast_devices, wide

# How far two results for the same token may be apart, as a share of their norm, by the model's dtype.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Equal tokens can't show that a token wrongly sees or misses some. Two pieces of text differ in more of their tokens
# than this; a repeated token or phrase doesn't. An eighth of what is attended to is far above all rounding but
# bfloat16's.
_DIFFERENT = 0.125
# If half of the tokens that a token may wrongly see are others, more of them would not show it any better.
_ENOUGH_OTHERS = 0.5

# With or without masks, and the name of the hazard.
Hazard: TypeAlias = tuple[bool, str]


@dataclass(frozen=True)
class Probe:
    """A token of a pass: its prefix is run alone, and the tokens ``nodes`` of that prefix are compared."""

    pack: int
    node: int


class Verification:
    """The exposures to each hazard that were compared and found right, for one way to run a model.

    ``lengths`` are those at which the model attends otherwise.
    """

    def __init__(self, lengths: Sequence[int] = ()) -> None:
        self._lengths = lengths
        self._compared: dict[Hazard, float] = {}
        self.shows_causality = False

    @property
    def has_begun(self) -> bool:
        """True if some token was compared."""
        return bool(self._compared)

    def forget(self) -> None:
        """Believe nothing that was seen before, since the passes are others now."""
        self._compared.clear()

    def due(self, packs: Sequence[Pack]) -> list[Probe]:
        """Return the tokens of a pass that are to be compared.

        For each hazard it is the most exposed token, unless one that was more exposed was right. A token that can't
        show a hazard is no evidence for others: it is compared for itself, and then the next one.
        """
        survey = _Survey(packs, self._lengths)
        exposures = {probe: survey.exposures(probe) for probe in survey.candidates()}
        chosen: list[Probe] = []
        for hazard in dict.fromkeys(hazard for found in exposures.values() for hazard in found):
            compared = self._compared.get(hazard, 0)
            exposed = {probe: e for probe, found in exposures.items() if (e := found.get(hazard, 0)) > compared}
            for probe in sorted(exposed, key=lambda probe: (exposed[probe], probe in chosen, probe.node), reverse=True):
                if any(exposed.get(c, 0) >= exposed[probe] and survey.shows(c, hazard) for c in chosen):
                    break
                if probe not in chosen and not any(survey.holds(c, probe, hazard) for c in chosen):
                    chosen.append(probe)
        return chosen

    def note(self, packs: Sequence[Pack], probe: Probe) -> None:
        """Note that the probe was compared and is right."""
        survey = _Survey(packs, self._lengths)
        for hazard, exposure in survey.exposures(probe).items():
            self._compared.setdefault(hazard, 0)
            if survey.shows(probe, hazard):
                self._compared[hazard] = max(exposure, self._compared[hazard])
        # Under masks a token of the prefix doesn't see what follows it, and alone it may.
        self.shows_causality |= survey.masked and survey.has_unlike_halves(probe)


def compared_nodes(pack: Pack, node: int) -> list[int]:
    """Return the nodes to compare of the prefix that ends with ``node``: the ends, the middle, and the most exposed.

    Of all tokens of a pack none sees a larger share of others than some token of the last prompt: where this one
    leaves another's path, all of the other's tokens stand before it.
    """
    path, (between, before) = pack.nodes_to(node), _shares_of_others(pack)
    shares = [(between[place], before[place]) for place in path]
    most = (max(range(len(path)), key=lambda n: shares[n][kind]) for kind in (0, 1))
    return sorted({path[n] for n in (0, len(path) // 2, len(path) - 1, *most)})


def alike(some: Tensor, other: Tensor, *, all_of_them: bool = True) -> bool:
    """Return True if two results ``(…, hidden)`` for the same tokens are equal up to rounding.

    Without ``all_of_them``, a single token is enough. Under autocast, float32 is rounded as autocast's dtype is.
    """
    dtypes = [some.dtype, *map(torch.get_autocast_dtype, autocast_devices())]
    rounding = max(_ROUNDING.get(dtype, 5e-2) for dtype in dtypes)
    apart = (wide(some) - wide(other)).norm(dim=-1)  # norms of float16 overflow
    are_alike = apart <= rounding * wide(other).norm(dim=-1)
    return bool(are_alike.all() if all_of_them else are_alike.any())


def check_finite(model: nn.Module, activations: Mapping[int, Tensor]) -> None:
    """Raise ValueError if the model has NaN or infinite activations; they are by layer."""
    for layer, rows in activations.items():
        if not bool(rows.isfinite().all()):
            raise ValueError(
                f"{type(model).__name__} has NaN or infinite activations at layer {layer}: check its weights, and "
                f"whether its dtype, {rows.dtype}, is wide enough"
            )


def differ(some: Sequence[int], other: Sequence[int]) -> bool:
    """Return True if two prefixes hold different tokens, or the same ones in other proportions."""
    one, two = Counter(some), Counter(other)
    shared = sum(min(count / len(some), two[token] / len(other)) for token, count in one.items())
    return 1 - shared >= _DIFFERENT


class _Survey:
    """The tokens of a pass, and their exposures."""

    def __init__(self, packs: Sequence[Pack], lengths: Sequence[int]) -> None:
        self._packs = packs
        self._lengths = lengths
        self._width = max(map(len, packs))
        self.masked = any(pack.branches for pack in packs)
        self._others = [_largest_on_paths(pack) for pack in packs] if self.masked else []

    def candidates(self) -> Iterator[Probe]:
        """Yield the tokens among which the most exposed ones are: those where a path ends or is read."""
        for number, pack in enumerate(self._packs):
            if self.masked:
                nodes = [node for node, end in enumerate(pack.ends) if end == node]
            else:
                nodes = sorted({len(pack) - 1, *(node for nodes in pack.nodes.values() for node in nodes)})
            yield from (Probe(number, node) for node in nodes)

    def exposures(self, probe: Probe) -> dict[Hazard, float]:
        pack = self._packs[probe.pack]
        found: dict[str, float] = {
            "depth": pack.depths[probe.node] + 1,
            "padding": self._width - len(pack),
            "row": probe.pack,
            "rows": len(self._packs) - 1,
        }
        if self.masked:
            found["column"] = probe.node + 1
            between, before = self._others[probe.pack][probe.node]
            found["others between"], found["others before"] = min(between, _ENOUGH_OTHERS), min(before, _ENOUGH_OTHERS)
        else:
            found["behind"] = len(pack) - 1 - probe.node
        return {(self.masked, name): exposure for name, exposure in found.items() if exposure}

    def shows(self, probe: Probe, hazard: Hazard) -> bool:
        """Return True if the hazard would change the probe's activation."""
        pack, (_, name) = self._packs[probe.pack], hazard
        if name in ("depth", "column"):
            return self.is_varied(probe) or len(pack.path(probe.node)) == 1
        if name == "behind":
            return differ(pack.path(probe.node), pack.input_ids[probe.node + 1 :])
        if name == "padding":
            return differ(pack.path(probe.node), padding_of(pack, self._packs, self._width))
        return True  # a branch, or another row, begins with another token

    def is_varied(self, probe: Probe) -> bool:
        """Return True if the prefix is no repeated token, and differs within each critical length from beyond it."""
        path = self._packs[probe.pack].path(probe.node)
        (commonest, _count), *_ = Counter(path).most_common(1)
        splits = (len(path) - length for length in self._lengths if 0 < length < len(path))
        return differ(path, [commonest]) and all(differ(path[:split], path[split:]) for split in splits)

    def has_unlike_halves(self, probe: Probe) -> bool:
        """Return True if the first tokens of the prefix would change if they saw the last ones."""
        path = self._packs[probe.pack].path(probe.node)
        return len(path) > 1 and differ(path[: len(path) // 2], path[len(path) // 2 :])

    def holds(self, chosen: Probe, probe: Probe, hazard: Hazard) -> bool:
        """Return True if the probe is a token of the chosen one's prefix, which is run alone with it."""
        pack = self._packs[probe.pack]
        within = chosen.pack == probe.pack and probe.node <= chosen.node <= pack.ends[probe.node]
        return within and hazard[1] != "behind"


def padding_of(pack: Pack, packs: Sequence[Pack], width: int) -> list[int]:
    """Return the tokens that fill a pack's row up to ``width``: those of the longest pack, then its first."""
    filling = max(packs, key=len).input_ids
    return [*filling, *[filling[0]] * (width - len(filling))][len(pack) : width]


def _shares_of_others(pack: Pack) -> tuple[list[float], list[float]]:
    """Return which shares of the tokens up to each one are others, between its ancestors and before them."""
    tokens = list(enumerate(zip(pack.depths, pack.skipped, strict=True)))
    between = [skipped / (skipped + depth + 1) for _, (depth, skipped) in tokens]
    return between, [(node - depth - skipped) / (node + 1) for node, (depth, skipped) in tokens]


def _largest_on_paths(pack: Pack) -> list[tuple[float, float]]:
    """Return the largest shares of others, between and before, of each token and its ancestors."""
    largest: list[tuple[float, float]] = []
    path: list[tuple[float, float]] = []
    for depth, between, before in zip(pack.depths, *_shares_of_others(pack), strict=True):
        above = path[depth - 1] if depth else (0.0, 0.0)
        path[depth:] = [(max(between, above[0]), max(before, above[1]))]
        largest.append(path[depth])
    return largest
