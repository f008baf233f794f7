"""A vector's strength as a share of the activations' norm: what training records, and the warning that rests on it."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from steering_vectors import SteeringVector, ablation_operator, extract_activations, train_steering_vector
from tests import tiny

PAIRS = [("I love it", "I hate it"), ("a good day", "a bad day"), ("yes", "no")]


def known(directions: dict[int, Any], norms: str, **more: str) -> SteeringVector:
    return SteeringVector(directions, metadata={"activation_norms": norms, **more})


def test_training_records_the_median_norm_of_the_rows_that_it_reads() -> None:
    model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
    vector = train_steering_vector(model, tokenizer, PAIRS, batch_size=2)
    sides = extract_activations(model, tokenizer, PAIRS)
    for layer, share in vector.shares().items():
        norms = torch.cat([torch.cat(side[layer]) for side in sides]).norm(dim=-1)
        assert share == pytest.approx(vector.norms()[layer] / float(norms.median()), rel=1e-4)
    assert sorted(vector.shares()) == vector.layers


def test_they_go_through_files_and_arithmetic_where_they_still_hold(tmp_path: Path) -> None:
    some, other = known({1: [3.0, 4.0]}, '{"1": 10}'), known({1: [0.0, 5.0]}, '{"1": 20}')
    some.save(tmp_path / "vector.safetensors")
    assert SteeringVector.load(tmp_path / "vector.safetensors").shares() == {1: 0.5}
    assert (2 * some).shares() == {1: 1.0}
    assert some[1].shares() == {1: 0.5}
    assert (some + other).shares() == {1: pytest.approx(math.hypot(3, 9) / 15, rel=1e-5)}  # of the mean of both norms
    assert (some + SteeringVector({1: [1.0, 1.0]})).shares() == {}
    assert (some + known({1: [0.0, 5.0]}, '{"1": 20}', base_model="another")).shares() == {}


@pytest.mark.parametrize(
    "norms", ["", "[]", "{", '{"1": "x"}', '{"1": NaN}', '{"1": 0}', '{"x": 1}', '{"2": 1}', "null"]
)
def test_what_a_file_tells_wrong_is_unknown(norms: str) -> None:
    assert known({1: [3.0, 4.0]}, norms).shares() == {}


def test_parts_of_blocks_have_none() -> None:
    vector = train_steering_vector(tiny.shared("llama"), tiny.tokenizer(), PAIRS, layer_type="mlp")
    assert vector.shares() == {}


def strong(*layers: int) -> SteeringVector:
    direction = torch.ones(tiny.HIDDEN)
    return known(
        dict.fromkeys(layers, direction), str({str(n): float(direction.norm()) for n in layers}).replace("'", '"')
    )


@pytest.mark.parametrize("way", ["apply", "patch"])
def test_a_sum_above_1_is_warned_of_with_the_way_out(way: str) -> None:
    def attach(vector: SteeringVector, **options: Any) -> None:
        if way == "apply":
            with vector.apply(tiny.shared("llama"), **options):
                pass
        else:
            vector.patch(tiny.shared("llama"), **options).remove()

    message = (
        r"this steering adds 3 times the norm of the activations, in sum over layers \[0-2\] with multiplier 1.0, .*: "
        r"steer one layer, as in vector\[1\].apply\(model\), or use a smaller multiplier"
    )
    with pytest.warns(UserWarning, match=message):
        attach(strong(0, 1, 2))
    with pytest.warns(UserWarning, match=r"adds 2 times .*, and text usually breaks: use a smaller multiplier"):
        attach(strong(1), multiplier=[0.5, -2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(strong(1))
        attach(strong(0, 1, 2), multiplier=0.3)
        attach(strong(0, 1, 2), operator=ablation_operator())
        attach(strong(0, 1, 2), multiplier=torch.tensor(2.0, requires_grad=True))
        attach(SteeringVector({1: 100 * torch.ones(tiny.HIDDEN)}))
