"""Which tokens of a pass are compared with their prompts alone."""

from collections.abc import Sequence

import pytest
import torch

from steering_vectors._extraction.packs import Pack, pack_prompts
from steering_vectors._extraction.verification import Probe, Verification, alike


def packs_of(prompts: list[list[int]], size: int = 512) -> list[Pack]:
    return list(pack_prompts(prompts, [[len(p) - 1] for p in prompts], range(len(prompts)), size))


def rows_of(prompts: list[list[int]]) -> list[Pack]:
    return [pack for prompt in prompts for pack in packs_of([prompt])]


def compare(verification: Verification, packs: Sequence[Pack]) -> list[Probe]:
    probes = verification.due(packs)
    for probe in probes:
        verification.note(packs, probe)
    return probes


BROOM = [[*range(20), 100 + n, 200 + n] for n in range(10)]


def test_a_lone_prompt_is_compared_unless_a_deeper_one_was() -> None:
    verification = Verification([])
    assert not verification.has_begun
    assert len(compare(verification, rows_of([[1, 2, 3]]))) == 1
    assert verification.has_begun
    assert compare(verification, rows_of([[4, 5, 6]])) == []
    assert len(compare(verification, rows_of([[4, 5, 6, 7]]))) == 1


def test_in_a_pack_it_is_a_token_with_others_before_it_and_between_its_ancestors() -> None:
    (pack,) = packs_of(BROOM)
    probes = compare(Verification([]), [pack])
    assert max(pack.skipped[probe.node] for probe in probes) == max(pack.skipped)
    assert max(probe.node - pack.depths[probe.node] for probe in probes) == 18
    assert len(probes) == 1  # one token has both


def test_a_hazard_that_grows_is_looked_at_again() -> None:
    verification = Verification([])
    compare(verification, packs_of(BROOM[:4]))
    assert compare(verification, packs_of(BROOM[:4])) == []
    assert compare(verification, packs_of(BROOM[:5])) != []
    assert compare(verification, packs_of(BROOM)) != []
    assert compare(verification, packs_of(BROOM)) == []


def test_padding_and_tokens_behind_are_compared() -> None:
    verification = Verification([])
    compare(verification, rows_of([[1, 2, 3]]))
    packs = rows_of([[1, 2, 3], [4, 5, 6, 7]])
    assert Probe(0, 2) in compare(verification, packs)
    (chain,) = packs_of([[1, 2, 3], [1, 2, 3, 4, 5]])
    assert Probe(0, 2) in compare(verification, [chain])


def test_a_repeated_token_is_compared_for_itself_and_is_no_evidence() -> None:
    verification = Verification([4])
    uniform, varied = [5] * 9, [1, 2, 3, 4, 5, 6, 7]
    (first,) = packs_of([uniform, varied])
    assert sorted(first.path(probe.node) for probe in compare(verification, [first])) == [varied, uniform]
    (second,) = packs_of([[8, 9, 10, 11, 12, 13, 14, 15], varied])
    assert any(second.depths[probe.node] == 7 for probe in compare(verification, [second]))


@pytest.mark.parametrize("length", [5, 30])
def test_a_critical_length_is_looked_at_when_it_is_passed_by_depth_or_by_column(length: int) -> None:
    verification = Verification([length])
    (pack,) = packs_of(BROOM)
    probes = verification.due([pack])
    depths = [pack.depths[probe.node] for probe in probes]
    if length == 5:
        assert max(depths) >= 5
    else:
        beyond = [probe for probe in probes if probe.node >= length > pack.depths[probe.node]]
        assert any(pack.skipped[probe.node] for probe in beyond)


def test_a_pass_without_masks_tells_nothing_of_passes_with_masks() -> None:
    verification = Verification([12])
    compare(verification, rows_of([[*range(50)], [*range(100, 150)]]))
    wide = [[k % 17 + 7, k % 13 + 30, k % 11 + 50] for k in range(200)]
    (pack,) = packs_of([[*range(20), 100], [*range(20), 101], *wide])
    assert max(pack.depths[probe.node] for probe in verification.due([pack])) == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_likeness_is_up_to_rounding_and_survives_large_numbers(dtype: torch.dtype) -> None:
    some = torch.full((1000,), 3000.0, dtype=dtype)
    other = torch.cat([some[:500], -some[500:]])
    assert alike(some, some * (1 + torch.finfo(dtype).eps))
    assert not alike(some, other)
    assert not alike(some, some * float("nan"))
