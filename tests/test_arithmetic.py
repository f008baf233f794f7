"""Vectors as things to compute with; what they are made of stays as it was."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steering_vectors import SteeringVector, read_activations, record_activations, train_steering_vector
from tests import tiny
from tests.test_steering import logits

WIDTH = 4


@st.composite
def vectors(draw: Any) -> SteeringVector:
    layers = draw(st.sets(st.integers(-2, 4), max_size=4))
    number = st.floats(-100, 100, width=32)
    return SteeringVector({layer: draw(st.lists(number, min_size=WIDTH, max_size=WIDTH)) for layer in layers})


def direction(vector: SteeringVector, layer: int) -> Tensor:
    return vector.layer_activations.get(layer, torch.zeros(WIDTH)).double()


def everywhere(*all_of: SteeringVector) -> list[int]:
    return sorted({layer for vector in all_of for layer in vector.layers})


@settings(max_examples=60, deadline=None)
@given(vectors(), vectors(), st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3))
def test_operations_are_those_of_the_directions(a: SteeringVector, b: SteeringVector, factor: float) -> None:
    expected: list[tuple[SteeringVector, Callable[[Tensor, Tensor], Tensor], list[int]]] = [
        (a + b, lambda x, y: x + y, everywhere(a, b)),
        (a - b, lambda x, y: x - y, everywhere(a, b)),
        (factor * a, lambda x, y: factor * x, a.layers),
        (a * factor, lambda x, y: factor * x, a.layers),
        (a / factor, lambda x, y: x / factor, a.layers),
        (-a, lambda x, y: -x, a.layers),
    ]
    for made, by_hand, layers in expected:
        assert made.layers == layers
        for layer in layers:
            wanted = by_hand(direction(a, layer), direction(b, layer))
            torch.testing.assert_close(direction(made, layer), wanted, atol=1e-4, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(vectors(), vectors())
def test_no_operation_changes_its_vectors(a: SteeringVector, b: SteeringVector) -> None:
    before = [{layer: d.clone() for layer, d in vector.layer_activations.items()} for vector in (a, b)]
    made = [a + b, a - b, 2 * a, a / 2, -a, a.orthogonal_to(b)]
    for vector in made:
        for d in vector.layer_activations.values():
            if all(d is not own for own in (*a.layer_activations.values(), *b.layer_activations.values())):
                d.zero_()
    for vector, was in zip((a, b), before, strict=True):
        assert vector.layer_activations.keys() == was.keys()
        assert all(torch.equal(vector.layer_activations[layer], d) for layer, d in was.items())


def test_sums_of_many() -> None:
    parts = [SteeringVector({1: [float(n)], n: [1.0]}) for n in (2, 3)]
    assert sum(parts) == SteeringVector({1: [5.0], 2: [1.0], 3: [1.0]})


def test_a_sum_steers_as_its_parts_together() -> None:
    model = tiny.shared("llama")
    a, b = (SteeringVector({layer: torch.randn(tiny.HIDDEN) for layer in layers}) for layers in ([0, 1], [1, 2]))
    with a.apply(model), b.apply(model, multiplier=-2):
        expected = logits(model)
    with (a - 2 * b).apply(model):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_arithmetic() -> None:
    some, other = torch.ones(WIDTH, requires_grad=True), torch.ones(WIDTH, requires_grad=True)
    made = (3 * SteeringVector({0: some}) - SteeringVector({0: other})) / 2
    made.layer_activations[0].sum().backward()
    assert torch.equal(some.grad, torch.full((WIDTH,), 1.5))  # type: ignore[arg-type]
    assert torch.equal(other.grad, torch.full((WIDTH,), -0.5))  # type: ignore[arg-type]


def test_layer_types_are_kept_and_rows_of_two_axes_are_taken() -> None:
    a, b = SteeringVector({0: torch.ones(1, WIDTH)}, "mlp"), SteeringVector({0: torch.ones(WIDTH)}, "mlp")
    assert (a + b).layer_type == (-a).layer_type == (a / 2).layer_type == a.orthogonal_to(b).layer_type == "mlp"
    assert torch.equal((a + b).layer_activations[0], torch.full((WIDTH,), 2.0))
    assert a.cosine_similarity(b) == {0: 1.0}


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (SteeringVector({0: [1.0]}), ValueError, "the directions have different widths: 4 and 1"),
        (SteeringVector({0: [1.0] * WIDTH}, "mlp"), ValueError, "different layer types: 'decoder_block' and 'mlp'"),
    ],
    ids=["width", "type"],
)
@pytest.mark.parametrize(
    "operation",
    [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a.cosine_similarity(b), lambda a, b: a.orthogonal_to(b)],
    ids=["+", "-", "cosine", "orthogonal"],
)
def test_vectors_that_do_not_fit_are_refused(operation: Any, other: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        operation(SteeringVector({0: [1.0] * WIDTH}), other)


@pytest.mark.parametrize(
    ("operation", "error", "message"),
    [
        (lambda v: v + 1, TypeError, "unsupported operand"),
        (lambda v: 1 + v, TypeError, "unsupported operand"),
        (lambda v: v - torch.ones(4), TypeError, "unsupported operand|must be Tensor|SteeringVector"),
        (lambda v: v * v, TypeError, "unsupported operand|multiply"),
        (lambda v: "2" * v, TypeError, "a factor must be a number, got '2'"),
        (lambda v: v / 0, ZeroDivisionError, "a steering vector can't be divided by 0"),
        (lambda v: v * float("nan"), ValueError, "a factor must be finite"),
        (lambda v: v / None, TypeError, "a divisor must be a number, got NoneType"),
        (lambda v: v.cosine_similarity(3), TypeError, "expected a SteeringVector, got int"),
        (lambda v: v.orthogonal_to(None), TypeError, "expected a SteeringVector, got NoneType"),
    ],
)
def test_what_is_no_operation_is_refused(operation: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        operation(SteeringVector({0: [1.0] * WIDTH}))


class TestCosineSimilarity:
    def test_is_by_layer_that_both_have(self) -> None:
        a = SteeringVector({0: [1.0, 0.0], 1: [1.0, 1.0], 2: [1.0, 0.0]})
        b = SteeringVector({1: [0.0, 2.0], 2: [-3.0, 0.0], 3: [1.0, 0.0]})
        found = a.cosine_similarity(b)
        assert found == pytest.approx({1: math.sqrt(0.5), 2: -1.0})

    def test_of_zeros_is_no_number(self) -> None:
        assert math.isnan(SteeringVector({0: [0.0]}).cosine_similarity(SteeringVector({0: [1.0]}))[0])

    def test_without_a_shared_layer_there_is_none(self) -> None:
        with pytest.raises(ValueError, match=r"the vectors have no layer in common: one has \[0\], the other \[1\]"):
            SteeringVector({0: [1.0]}).cosine_similarity(SteeringVector({1: [1.0]}))


class TestOrthogonalTo:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_nothing_is_left_along_the_other_and_the_rest_stays(self, dtype: torch.dtype) -> None:
        a, b = (torch.randn(64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(2))
        made = SteeringVector({0: a}).orthogonal_to(SteeringVector({0: 1e-3 * b})).layer_activations[0]
        assert made.dtype is dtype
        unit = b.double() / b.double().norm()
        eps = torch.finfo(dtype).eps
        assert abs(float(made.double() @ unit)) < 20 * eps
        torch.testing.assert_close(made.double(), a.double() - (a.double() @ unit) * unit, atol=10 * eps, rtol=2 * eps)

    def test_layers_that_the_other_lacks_or_has_as_zeros_stay(self) -> None:
        a = SteeringVector({0: [1.0, 2.0], 1: [3.0, 4.0]})
        assert a.orthogonal_to(SteeringVector({0: [0.0, 0.0], 5: [1.0, 1.0]})) == a


class TestProject:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_of_recorded_and_read_activations_is_per_token(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        vector = SteeringVector({1: torch.randn(tiny.HIDDEN), 7: torch.ones(tiny.HIDDEN)})
        unit = vector.layer_activations[1] / vector.layer_activations[1].norm()
        with record_activations(model) as records:
            logits(model)
        found = vector.project(records)
        assert list(found) == [1]
        assert [part.shape for part in found[1]] == [part.shape[:-1] for part in records[1]]
        torch.testing.assert_close(found[1][0], records[1][0] @ unit)
        rows = read_activations(model, tiny.tokenizer(), ["a b", "c"])
        torch.testing.assert_close(vector.project(rows)[1], rows[1] @ unit)

    def test_is_wide_whatever_the_activation_s_dtype(self) -> None:
        found = SteeringVector({0: [3.0, 4.0]}).project({0: torch.tensor([[300.0, 400.0]], dtype=torch.bfloat16)})
        assert found[0].dtype is torch.float32
        torch.testing.assert_close(found[0], torch.tensor([500.0]), atol=2.0, rtol=0)

    def test_what_does_not_fit_is_refused(self) -> None:
        vector = SteeringVector({0: [3.0, 4.0]})
        with pytest.raises(ValueError, match=r"activations must have one of the layers \[0\], got only \[1\]"):
            vector.project({1: torch.ones(2)})
        with pytest.raises(ValueError, match="the activations of layer 0 have width 3, but its direction has 2"):
            vector.project({0: torch.ones(2, 3)})
        with pytest.raises(TypeError, match="activations must map layers to tensors"):
            vector.project(torch.ones(2))  # type: ignore[arg-type]


class TestDerivation:
    def vector(self, pairs: Any) -> SteeringVector:
        return train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), pairs, layers=1)

    def test_says_what_a_result_came_from(self) -> None:
        joy, calm = self.vector([("a", "b")]), self.vector([("c", "d"), ("e", "f")])
        one, two = (
            f"[mean_aggregator() of {n} samples {v.metadata['samples_hash'][:8]}]" for n, v in ((1, joy), (2, calm))
        )
        made = 2 * (joy - calm / 4)
        assert made.metadata["derivation"] == f"2 * ({one} - ({two} / 4))"
        assert made.metadata["model_type"] == "llama"
        assert "samples" not in made.metadata
        assert joy.orthogonal_to(calm).metadata["derivation"] == f"{one} without what is along {two}"
        assert joy.normalized().metadata["derivation"] == f"{one} at norm 1"
        assert (-joy).metadata["derivation"] == f"-{one}"
        assert joy.scaled({1: 2.0}).metadata["derivation"] == f"{one} scaled by layer"
        assert "derivation" not in joy[1].metadata

    def test_of_vectors_by_hand_is_short(self) -> None:
        assert (SteeringVector({0: [1.0]}) + SteeringVector({0: [1.0]})).metadata == {
            "derivation": "a vector + a vector"
        }


def test_the_unit_direction_of_a_projection_is_not_rounded_to_the_vector_s_dtype() -> None:
    direction = torch.randn(512, generator=torch.Generator().manual_seed(0)).bfloat16()
    activations = torch.randn(20, 512, generator=torch.Generator().manual_seed(1)).double()
    wide = direction.double()
    found = SteeringVector({0: direction}).project({0: activations})[0]
    torch.testing.assert_close(found, activations @ (wide / wide.norm()), atol=1e-12, rtol=1e-12)


def test_a_zero_direction_matters_only_where_it_is_asked() -> None:
    vector = SteeringVector({0: [0.0, 0.0], 1: [3.0, 4.0]})
    assert list(vector.project({1: torch.ones(2)})) == [1]
    with pytest.raises(ValueError, match="the direction of layer 0 is all zeros"):
        vector.project({0: torch.ones(2)})


def test_normalized_has_the_gradient_of_the_unit_direction_and_does_not_overflow() -> None:
    direction = torch.tensor([3.0, 4.0], requires_grad=True)
    made = SteeringVector({0: direction}).normalized().layer_activations[0]
    (made @ torch.tensor([3.0, 4.0])).backward()
    torch.testing.assert_close(direction.grad, torch.zeros(2))
    large = SteeringVector({0: torch.tensor([3e38, 3e38])}).normalized()
    torch.testing.assert_close(large.layer_activations[0], torch.full((2,), math.sqrt(0.5)))


def test_copies_of_computed_vectors_with_gradients() -> None:
    vector = 2 * SteeringVector({0: torch.ones(2, requires_grad=True)})
    twin = copy.deepcopy(vector)
    assert twin == vector
    assert twin.layer_activations[0].is_leaf
    assert twin.layer_activations[0].requires_grad


def test_assigned_lists_are_computed_with_too() -> None:
    vector = SteeringVector({0: [1.0, 2.0]})
    vector.layer_activations[0] = [1.0, 2.0]  # type: ignore[assignment]
    assert -vector == SteeringVector({0: [-1.0, -2.0]})
    assert vector / 2 == SteeringVector({0: [0.5, 1.0]})


class WithoutFloat64(Tensor):
    """Stands for a tensor on a device that has no float64, as Apple's."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu or (func is Tensor.to and "cpu" in args):
            return super().__torch_function__(func, types, args, kwargs).as_subclass(Tensor)
        made = super().__torch_function__(func, types, args, kwargs)
        if isinstance(made, cls) and made.dtype is torch.float64:
            raise TypeError("the device has no float64")
        return made


def test_devices_without_float64_are_computed_with_too(tmp_path: Path) -> None:
    directions = {0: torch.tensor([3.0, 4.0]), 1: torch.tensor([1.0, -2.0])}
    plain, other = SteeringVector(directions), SteeringVector({0: torch.tensor([1.0, 1.0])})
    vector = SteeringVector({n: d.as_subclass(WithoutFloat64) for n, d in directions.items()})
    with pytest.raises(TypeError, match="no float64"):
        vector.layer_activations[0].double()
    assert vector.norms() == plain.norms()
    assert vector.cosine_similarity(other) == plain.cosine_similarity(other)
    for made, expected in (
        (vector.normalized(), plain.normalized()),
        (vector.orthogonal_to(other), plain.orthogonal_to(other)),
    ):
        assert all(isinstance(direction, WithoutFloat64) for direction in made.layer_activations.values())
        assert made == expected
    rows = torch.tensor([[1.0, 0.0]])
    found = vector.project({0: rows.as_subclass(WithoutFloat64)})[0]
    assert torch.equal(found, plain.project({0: rows})[0])
    vector.save(tmp_path / "vector.safetensors")
    assert SteeringVector.load(tmp_path / "vector.safetensors") == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one number"])
@pytest.mark.parametrize(
    ("scale", "by_hand"),
    [
        (lambda v, f: v * f, lambda d, f: f * d),
        (lambda v, f: f * v, lambda d, f: f * d),
        (lambda v, f: v / f, lambda d, f: d / f),
        (lambda v, f: v.scaled(f), lambda d, f: f * d),
        (lambda v, f: v.scaled({0: f}), lambda d, f: f * d),
        (lambda v, f: -(2 * (f * v)) + v, lambda d, f: d - 2 * f * d),
    ],
)
def test_a_factor_that_is_learned_keeps_its_gradient(scale: Any, by_hand: Any, shape: Any, dtype: torch.dtype) -> None:
    direction, found = torch.tensor([3.0, -4.0], dtype=dtype), []
    for make in (
        lambda f: scale(SteeringVector({0: direction}), f).layer_activations[0],
        lambda f: by_hand(direction, f),
    ):
        factor = torch.full(shape, 1.5, requires_grad=True)
        made = make(factor)
        made.float().square().sum().backward()
        assert factor.grad is not None
        found.append((made.detach(), factor.grad))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert ours.dtype is dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-2, atol=1e-6)


def test_a_learned_factor_is_recorded_by_its_number_and_must_be_finite() -> None:
    vector = SteeringVector({0: [3.0, 4.0]})
    assert (vector * torch.tensor(1.5, requires_grad=True)).metadata["derivation"] == "1.5 * a vector"
    with pytest.raises(ValueError, match="a factor must be finite"):
        vector.scaled(torch.tensor(torch.inf, requires_grad=True))
    with pytest.raises(TypeError, match="a factor must be a number"):
        vector.scaled(torch.ones(2, requires_grad=True))
