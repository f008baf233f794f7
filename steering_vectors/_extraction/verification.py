"""Whether passes over many prompts give what each prompt alone gives: which tokens tell, and when to look again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steering_vectors._extraction.packs import Pack

# How far two results for the same token may be apart, as a share of their norm, by the model's dtype.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# A token whose trait is so much stronger than any that was compared is compared too.
_STRONGER = 1.5
# A token stands for another that has a trait as strongly, but for so much.
_NEARLY = 0.9


@dataclass(frozen=True)
class Probe:
    """A token of a pass, to be compared with the same token when its prompt is run alone."""

    pack: int
    node: int


class Verification:
    """What was compared of one way to run a model.

    A pass may go wrong by a token's traits: others of the pack before it or between its ancestors, padding, its own
    prompt's tokens behind it, and a depth or a column beyond one of the ``lengths`` at which the model attends
    otherwise. A token is to be compared wherever one has a trait that none had so strongly.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._compared: dict[str, int] = {}  # trait → its strength in the token that had most of it

    def due(self, packs: Sequence[Pack]) -> list[Probe]:
        """The tokens of a pass that are to be compared."""
        strongest: dict[str, tuple[int, Probe]] = {}
        for probe, traits in self._tokens(packs):
            for trait, strength in traits.items():
                if strength > strongest.get(trait, (0, probe))[0]:
                    strongest[trait] = strength, probe
        chosen: dict[Probe, dict[str, int]] = {}
        for trait, (strength, probe) in strongest.items():
            known = [self._compared.get(trait, 0) * _STRONGER]
            known += [traits.get(trait, 0) / _NEARLY for traits in chosen.values()]
            if strength > max(known):
                chosen[probe] = self._traits(packs, probe)
        return list(chosen)

    @property
    def has_begun(self) -> bool:
        """Whether some token was compared."""
        return bool(self._compared)

    def note(self, packs: Sequence[Pack], probe: Probe) -> None:
        """The probe was compared, and is alike."""
        for trait, strength in self._traits(packs, probe).items():
            self._compared[trait] = max(strength, self._compared.get(trait, 0))

    def _tokens(self, packs: Sequence[Pack]) -> Iterator[tuple[Probe, dict[str, int]]]:
        """The tokens that may have most of some trait, those with many traits first."""
        width = max(map(len, packs))
        for number, pack in enumerate(packs):
            skipped = pack.skipped if pack.branches else [0] * len(pack)
            read = {node for nodes in pack.nodes.values() for node in nodes}
            nodes = range(len(pack)) if pack.branches else sorted(read | {len(pack) - 1})
            for node in reversed(nodes):
                yield Probe(number, node), self._traits_of(pack, node, skipped[node], width)

    def _traits(self, packs: Sequence[Pack], probe: Probe) -> dict[str, int]:
        pack = packs[probe.pack]
        return self._traits_of(pack, probe.node, pack.skipped[probe.node], max(map(len, packs)))

    def _traits_of(self, pack: Pack, node: int, skipped: int, width: int) -> dict[str, int]:
        depth = pack.depths[node]
        traits = {
            "others between": skipped,
            "others before": node - depth,
            "padding": width - len(pack),
            "behind": 0 if pack.branches else len(pack) - 1 - node,
            "any": 1,
        }
        for length in self._lengths:
            traits[f"depth {length}"] = depth + 1 if depth >= length else 0
            traits[f"column {length}"] = skipped if depth < length <= node else 0
        return traits


def alike(some: Tensor, other: Tensor) -> bool:
    """Whether two results for the same tokens are equal up to rounding."""
    rounding = _ROUNDING.get(some.dtype, 5e-2)
    wide = torch.promote_types(some.dtype, torch.float32)  # norms of float16 overflow
    return bool((some.to(wide) - other.to(wide)).norm() <= rounding * other.to(wide).norm())
