"""Operators against their formulas, written out."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import steering_vectors
from steering_vectors import (
    PatchDeltaOperator,
    ablation_operator,
    ablation_then_addition_operator,
    addition_operator,
    clamp_operator,
    norm_preserving_operator,
    rotation_operator,
)
from tests import families

CASES = {**families.OPERATORS, **families.OTHER_OPERATORS}
OPERATORS = {name: case.make for name, case in CASES.items()}
every_operator = pytest.mark.parametrize("operator", [make() for make in OPERATORS.values()], ids=repr)
every_ablation = pytest.mark.parametrize("operator", [ablation_operator(), ablation_then_addition_operator()], ids=repr)


def steered_by_hand(name: str, h: Tensor, d: Tensor) -> Tensor:
    """Row by row, in double precision."""
    return CASES[name].by_hand(h.double(), d.double())


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    name=st.sampled_from(list(OPERATORS)),
    batch=st.integers(1, 3),
    seq=st.integers(1, 4),
    hidden=st.integers(1, 9),
    exponent=st.integers(-30, 15),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_operators_give_their_formulas(name: str, batch: int, seq: int, hidden: int, exponent: int, seed: int) -> None:
    h, d = random(batch, seq, hidden, seed=seed), random(hidden, seed=seed + 1) * 10.0**exponent
    delta = OPERATORS[name]()(h, d.reshape(1, 1, -1))
    scale = max(1.0, 10.0**exponent)
    expected = steered_by_hand(name, h, d)
    torch.testing.assert_close(h.double() + delta.double(), expected, rtol=1e-5, atol=1e-5 * scale)


@every_operator
def test_the_change_broadcasts_to_the_activation_for_every_shape_of_direction(operator: PatchDeltaOperator) -> None:
    h, d = random(2, 3, 8), random(8, seed=1)
    expected = operator(h, d).expand_as(h)
    for shape in [(8,), (1, 8), (1, 1, 8)]:
        assert torch.equal(operator(h, d.reshape(shape)).expand_as(h), expected)


@every_operator
def test_a_direction_of_its_own_for_each_row(operator: PatchDeltaOperator) -> None:
    h, d = random(2, 3, 8), random(2, 1, 8, seed=1)
    both = operator(h, d).expand_as(h)
    for row in range(2):
        alone = operator(h[row : row + 1], d[row : row + 1]).expand(1, 3, 8)
        torch.testing.assert_close(both[row : row + 1], alone)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_change_has_the_activation_s_dtype(operator: PatchDeltaOperator, dtype: torch.dtype) -> None:
    assert operator(random(1, 2, 8, dtype=dtype), random(8, seed=1, dtype=dtype)).dtype == dtype


@every_operator
def test_activation_and_direction_are_not_changed(operator: PatchDeltaOperator) -> None:
    h, d = random(1, 2, 8), random(8, seed=1)
    h_before, d_before = h.clone(), d.clone()
    operator(h, d)
    assert torch.equal(h, h_before)
    assert torch.equal(d, d_before)


def test_ablation_leaves_nothing_along_the_direction_and_the_rest_as_it_was() -> None:
    h, d = random(2, 3, 8), random(8, seed=1)
    ablated = h + ablation_operator()(h, d)
    torch.testing.assert_close(ablated @ d, torch.zeros(2, 3), atol=1e-5, rtol=0)
    across = random(8, seed=2)
    across -= (across @ d) / (d @ d) * d
    torch.testing.assert_close(ablated @ across, h @ across)


@pytest.mark.parametrize("factor", [-1.0, 1e-12, 1e12, -7.0])
def test_ablation_ignores_length_and_sign_of_the_direction(factor: float) -> None:
    h, d = random(2, 3, 8), random(8, seed=1)
    torch.testing.assert_close(ablation_operator()(h, factor * d), ablation_operator()(h, d))


@pytest.mark.parametrize("multiplier", [-2.0, 0.5, 3.0])
def test_ablation_then_addition_sets_the_projection_to_the_direction_s_length(multiplier: float) -> None:
    h, d = random(2, 3, 8), random(8, seed=1)
    steered = h + ablation_then_addition_operator()(h, multiplier * d)
    torch.testing.assert_close(steered @ (d / d.norm()), (multiplier * d.norm()).expand(2, 3))


@pytest.mark.parametrize("value", [1e-7, 6e4])
def test_small_and_large_directions_of_half_precision_are_ablated(value: float) -> None:
    h = random(1, 4, 8, dtype=torch.float16)
    d = torch.full((8,), value, dtype=torch.float16)
    expected = steered_by_hand("ablation_operator", h, torch.ones(8))
    torch.testing.assert_close((h + ablation_operator()(h, d)).double(), expected, atol=1e-2, rtol=1e-2)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_direction_changes_nothing(operator: PatchDeltaOperator, dtype: torch.dtype) -> None:
    h = random(2, 3, 8, dtype=dtype)
    assert torch.equal(h + operator(h, torch.zeros(1, 1, 8, dtype=dtype)), h)


@every_operator
def test_gradients_at_a_zero_direction_are_finite(operator: PatchDeltaOperator) -> None:
    h, d = random(2, 3, 8).requires_grad_(), torch.zeros(8, requires_grad=True)
    (h + operator(h, d)).square().sum().backward()
    assert h.grad is not None
    assert d.grad is not None
    assert h.grad.isfinite().all()
    assert d.grad.isfinite().all()
    torch.testing.assert_close(h.grad, 2 * h.detach())


@pytest.mark.parametrize("operator", [addition_operator(), ablation_then_addition_operator()], ids=repr)
def test_addition_passes_gradients_to_a_zero_direction(operator: PatchDeltaOperator) -> None:
    h, d = random(2, 3, 8), torch.zeros(8, requires_grad=True)
    (h + operator(h, d)).sum().backward()
    assert d.grad is not None
    torch.testing.assert_close(d.grad, torch.full((8,), 6.0))


@every_operator
def test_gradients_are_those_of_finite_differences(operator: PatchDeltaOperator) -> None:
    h = random(1, 2, 4, dtype=torch.float64).requires_grad_()
    d = random(4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, d: operator(h, d).expand_as(h), (h, d))


@every_ablation
def test_gradients_do_not_overflow_for_tiny_directions(operator: PatchDeltaOperator) -> None:
    h, d = random(1, 2, 4), (random(4, seed=1) * 1e-25).requires_grad_()
    operator(h, d).sum().backward()
    assert d.grad is not None
    assert d.grad.isfinite().all()


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_values_that_show_how_they_were_made(name: str) -> None:
    operator = OPERATORS[name]()
    assert repr(operator) == CASES[name].shown
    assert eval(repr(operator), vars(steering_vectors)) == operator
    assert operator == OPERATORS[name]() == copy.deepcopy(operator) == pickle.loads(pickle.dumps(operator))
    assert len({make() for make in OPERATORS.values()}) == len(OPERATORS)


@pytest.mark.parametrize("multiplier", [2.0, 0.01, -3.0])
@pytest.mark.parametrize("name", [name for name in OPERATORS if name.startswith(("clamp", "rotation"))])
def test_clamp_and_rotation_ignore_the_direction_s_length_but_not_its_sign(name: str, multiplier: float) -> None:
    h, d = random(2, 3, 8), random(8, seed=1)
    expected = OPERATORS[name]()(h, math.copysign(1, multiplier) * d)
    torch.testing.assert_close(OPERATORS[name]()(h, multiplier * d), expected)
    assert not torch.allclose(OPERATORS[name]()(h, -d), OPERATORS[name]()(h, d))


def test_clamp_brings_projections_between_the_bounds_and_leaves_the_others() -> None:
    h, d = random(5, 40, 8), random(8, seed=1)
    unit = d / d.norm()
    clamped = h + clamp_operator(-0.3, 0.4)(h, d)
    inside = ((h @ unit) >= -0.3) & ((h @ unit) <= 0.4)
    assert bool(inside.any())
    assert torch.equal(clamped[inside], h[inside])
    assert float((clamped @ unit).min()) == pytest.approx(-0.3, abs=1e-5)
    assert float((clamped @ unit).max()) == pytest.approx(0.4, abs=1e-5)


@pytest.mark.parametrize("angle", [0.0, 0.3, -1.2, math.pi, 6.0])
def test_rotation_keeps_the_norm_and_turns_by_the_angle(angle: float) -> None:
    h, d = random(2, 3, 8, dtype=torch.float64), random(8, seed=1, dtype=torch.float64)
    turned = h + rotation_operator(angle)(h, d)
    torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(turned, h, dim=-1)
    torch.testing.assert_close(cosine, torch.full((2, 3), math.cos(angle), dtype=torch.float64))
    if angle in (0.3, -1.2):
        towards = torch.nn.functional.cosine_similarity(turned, d, dim=-1)
        before = torch.nn.functional.cosine_similarity(h, d, dim=-1)
        assert torch.equal(towards > before, torch.full((2, 3), angle > 0))


@pytest.mark.parametrize(("degrees", "radians"), [(45, "0.7854"), (-90.0, "-1.571")])
def test_an_angle_in_degrees_is_refused_with_its_radians(degrees: float, radians: str) -> None:
    with pytest.raises(ValueError, match=rf"in radians, .* got {degrees:g}: for {degrees:g} degrees pass {radians}$"):
        rotation_operator(degrees)


@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotation_leaves_an_activation_along_the_direction(factor: float, dtype: torch.dtype) -> None:
    d = random(64, seed=1, dtype=dtype)
    h = (factor * d).expand(1, 2, 64)
    assert torch.equal(rotation_operator(1.0)(h, d), torch.zeros_like(h))


@pytest.mark.parametrize(
    "inner",
    [addition_operator(), ablation_operator(), lambda h, d: 5 * d + h],
    ids=["addition", "ablation", "callable"],
)
def test_norm_preserving_keeps_the_norm_and_the_inner_operator_s_direction(inner: PatchDeltaOperator) -> None:
    h, d = random(2, 3, 8), random(8, seed=1)
    steered, free = h + norm_preserving_operator(inner)(h, d), h + inner(h, d)
    torch.testing.assert_close(steered.norm(dim=-1), h.norm(dim=-1))
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(steered, free, dim=-1), torch.ones(2, 3))


def test_norm_preserving_leaves_what_the_inner_operator_makes_zero() -> None:
    h = random(1, 2, 8)
    assert torch.equal(norm_preserving_operator(lambda h, d: -h)(h, h), torch.zeros_like(h))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (clamp_operator, ValueError, "clamp_operator needs a bound: pass min, max or both"),
        (lambda: clamp_operator(2, 1), ValueError, "min to be at most max, got min=2 and max=1"),
        (lambda: clamp_operator(min=math.nan), ValueError, "min of clamp_operator must be finite, got nan"),
        (
            lambda: clamp_operator(max=10**400),
            ValueError,
            "max of clamp_operator must be finite, got a number too large",
        ),
        (lambda: clamp_operator(max="1"), TypeError, "max of clamp_operator must be a number, got '1'"),
        (lambda: clamp_operator(max=torch.ones(2)), TypeError, "max of clamp_operator must be a number"),
        (lambda: rotation_operator(math.inf), ValueError, "angle of rotation_operator must be finite, got inf"),
        (lambda: rotation_operator(None), TypeError, "angle of rotation_operator must be a number, got NoneType"),
        (lambda: norm_preserving_operator(0.5), TypeError, "operator must be callable"),
        (
            lambda: norm_preserving_operator(addition_operator),
            TypeError,
            "did you forget to call it: addition_operator",
        ),
    ],
)
def test_what_makes_no_operator_is_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
