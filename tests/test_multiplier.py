"""The factor on a direction, and what follows from it."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors._steering.multiplier import as_multiplier

DIRECTION = torch.tensor([3.0, 4.0])
LEARNED = torch.tensor([0.0, 2.0], requires_grad=True)

# given → (by_row, is_learned, changes_nothing, leaves_rows), and how it shows
KINDS: list[tuple[Any, tuple[bool, bool, bool, bool], str]] = [
    (2, (False, False, False, False), "2.0"),
    (0.0, (False, False, True, False), "0.0"),
    ([2.0], (False, False, False, False), "2.0"),
    ([1, 0], (True, False, False, True), "[1.0, 0.0]"),
    ([0, 0], (True, False, True, True), "[0.0, 0.0]"),
    (torch.ones(5), (True, False, False, False), "5 numbers"),
    (LEARNED, (True, True, False, False), "[0.0, 2.0]"),
    (torch.zeros((), requires_grad=True), (False, True, False, False), "0.0"),
]


@pytest.mark.parametrize(("given", "follows", "shown"), KINDS)
def test_says_what_follows_from_the_numbers(given: Any, follows: tuple[bool, ...], shown: str) -> None:
    made = as_multiplier(given)
    assert (made.by_row, made.is_learned, made.changes_nothing, made.leaves_rows) == follows
    assert repr(made) == shown
    with pytest.raises(FrozenInstanceError):
        made.value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "product", "is_zero"),
    [
        (2, DIRECTION * 2, torch.tensor(False)),
        ([2, -1], torch.stack([2 * DIRECTION, -DIRECTION]), torch.tensor([False, False])),
        # A row that stays as it is has the direction itself: an operator might make NaN of zeros.
        ([0, -1], torch.stack([DIRECTION, -DIRECTION]), torch.tensor([True, False])),
        (LEARNED, torch.stack([0 * DIRECTION, 2 * DIRECTION]), torch.tensor([True, False])),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multiplies_in_the_direction_s_dtype(given: Any, product: Tensor, is_zero: Tensor, dtype: torch.dtype) -> None:
    made = as_multiplier(given)
    assert torch.equal(made.times(DIRECTION.to(dtype)).detach(), product.to(dtype))
    assert torch.equal(made.is_zero(torch.device("cpu")), is_zero)


def test_a_learned_one_follows_its_tensor() -> None:
    learned = torch.tensor(1.0, requires_grad=True)
    made = as_multiplier(learned)
    with torch.no_grad():
        learned.fill_(0.0)
    assert bool(made.is_zero(torch.device("cpu")))
    made.times(DIRECTION).sum().backward()
    assert learned.grad == DIRECTION.sum()
