"""Sweeps: each cell is an evaluation of one layer, halves don't mix, and a stopped sweep goes on."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steering_vectors import SteeringVector, generated, prompted
from steering_vectors.evaluation import PointRow, Sweep, SweepRow, evaluate, measuring, sweep
from steering_vectors.evaluation import sweeping as module
from steering_vectors.evaluation.cells import hash_of, hash_of_model
from tests import tiny

ITEMS = [(f"I {verb} it", " yes", " no!") for verb in ("see", "know", "take", "want", "like")]
TEXTS = ["It rains in the morning.", "The house is old."]
MULTIPLIERS = (-1.0, 0.0, 2.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.shared("llama")


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    generator = torch.Generator().manual_seed(3)
    return SteeringVector({layer: torch.randn(tiny.HIDDEN, generator=generator) for layer in range(3)})


def swept(model: Any, vector: SteeringVector, **arguments: Any) -> Sweep:
    given = {"multipliers": MULTIPLIERS, "texts": TEXTS, "batch_size": 2, **arguments}
    return sweep(model, tiny.tokenizer(), vector, ITEMS, **given)


def test_each_row_is_an_evaluation_of_one_layer(model: Any, vector: SteeringVector) -> None:
    result = swept(model, vector, controls=None)
    assert [(row.layer, row.multiplier) for row in result.rows] == [(n, m) for n in range(3) for m in (-1, 2)]
    for row in result.rows:
        alone = evaluate(
            model, tiny.tokenizer(), vector[row.layer], ITEMS, multipliers=MULTIPLIERS, texts=TEXTS, controls=None
        )
        place = MULTIPLIERS.index(row.multiplier)
        gains = np.array([item.propensities[place] - item.propensities[1] for item in alone.items])
        both = result.choosing * row.gain + result.held_out * row.held_out_gain
        assert both == pytest.approx(gains.sum(), abs=1e-5)
        assert row.reversed == pytest.approx((gains * row.multiplier < 0).mean())
        assert row.kl_mean == pytest.approx(alone.rows[0].kl_mean[place], rel=1e-3)
        assert row.kl_p95 == pytest.approx(alone.rows[0].kl_p95[place], rel=1e-3)


def test_multipliers_count_once_and_one_is_enough(model: Any, vector: SteeringVector) -> None:
    once = swept(model, vector, multipliers=[2], controls=None)
    assert [row.multiplier for row in once.rows] == [2, 2, 2]
    assert swept(model, vector, multipliers=[2, 2, 0], controls=None).rows == once.rows


def test_the_two_halves_are_disjoint_and_seeded(model: Any, vector: SteeringVector) -> None:
    first, second = module._halves(5, seed=0)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(5))
    assert len(first) == 2
    assert any(module._halves(5, seed)[0].tolist() != first.tolist() for seed in range(1, 5))
    assert swept(model, vector, seed=1) == swept(model, vector, seed=1)


def test_controls_are_measured_on_what_was_held_out(model: Any, vector: SteeringVector) -> None:
    result = swept(model, vector, variants={"shouted": [(p.upper(), a, b) for p, a, b in ITEMS]})
    assert result.chosen is not None
    assert [point.condition for point in result.points] == ["random 1", "random 2", "random 3", "variant: shouted"]
    held_out = module._halves(len(ITEMS), 0)[1].tolist()
    alone = evaluate(
        model,
        tiny.tokenizer(),
        vector[result.chosen.layer],
        [(ITEMS[n][0].upper(), *ITEMS[n][1:]) for n in held_out],
        multipliers=[0, result.chosen.multiplier],
        texts=[],
        controls=None,
    )
    gains = [item.propensities[1] - item.propensities[0] for item in alone.items]
    assert result.points[-1].gain == pytest.approx(np.mean(gains), abs=1e-5)
    assert "Worst variant: shouted" in " ".join(str(result).split())


def test_the_budget_bounds_the_choice(model: Any, vector: SteeringVector) -> None:
    free = swept(model, vector)
    assert free.chosen is not None
    assert free.chosen.gain == max(row.gain for row in free.rows)
    assert free.chosen.kl_p95 is not None
    bound = 0.5 * free.chosen.kl_p95
    within = free.best(max_kl=bound)
    assert within is None or (within.kl_p95 is not None and within.kl_p95 <= bound)
    assert swept(model, vector, max_kl=bound).chosen == within
    assert free.best(max_kl=1e-9) is None
    assert swept(model, vector, max_kl=1e-9).verdict == (
        "does not steer: no layer and multiplier raises the propensity within the budget"
    )


class TestVerdict:
    CHOSEN = SweepRow(1, 2.0, 0.9, 0.8, 0.7, 0.9, 0.0)

    @pytest.mark.parametrize(
        ("points", "begins"),
        [
            ((PointRow("random 1", 0.1, 0.0, 0.2),), "steers: on items held out, its gain is +0.80"),
            ((PointRow("random 1", -0.75, -0.8, -0.7),), "does not steer: on items held out"),
            ((PointRow("variant: x", 0.9, 0.8, 1.0),), "steers: "),
            ((), "steers: on items held out, its gain is +0.80 [+0.70, +0.90]; no control was measured"),
        ],
    )
    def test_follows_from_the_numbers(self, points: tuple[PointRow, ...], begins: str) -> None:
        assert Sweep((self.CHOSEN,), self.CHOSEN, points, None, 4, 4, 0).verdict.startswith(begins)

    def test_is_no_for_the_other_way_and_for_a_single_item(self) -> None:
        backwards = replace(self.CHOSEN, multiplier=-2.0)
        assert Sweep((backwards,), backwards, (), None, 4, 4, 0).verdict == (
            "does not steer: it steers the other way, its gain is +0.80 [+0.70, +0.90] at -2"
        )
        assert Sweep((self.CHOSEN,), self.CHOSEN, (), None, 1, 1, 0).verdict == (
            "does not steer: one item held out is too few to tell, its gain is +0.80 [+0.70, +0.90] at +2"
        )


def test_a_stopped_sweep_goes_on(
    model: Any, vector: SteeringVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.json"
    measured: list[int] = []
    scores = measuring.ItemBatch.scores

    def counted(self: Any, *args: Any) -> Any:
        measured.append(1)
        if len(measured) == 5:
            raise KeyboardInterrupt
        return scores(self, *args)

    monkeypatch.setattr(measuring.ItemBatch, "scores", counted)
    with pytest.raises(KeyboardInterrupt):
        swept(model, vector, path=path, controls=None)
    assert len(json.loads(path.read_text())["cells"]) == 4
    found = swept(model, vector, path=path, controls=None)
    assert len(measured) == 5 + 9 - 4  # three batches at three layers, of which four were finished
    assert found == swept(model, vector, controls=None)
    before = len(measured)
    assert swept(model, vector, path=path, controls=None) == found
    assert len(measured) == before
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


@pytest.mark.parametrize("name", ["tokens", "propensity"])
def test_the_file_of_another_function_is_refused(model: Any, vector: SteeringVector, tmp_path: Path, name: str) -> None:
    def made(number: int) -> Any:
        if name == "tokens":
            return lambda inputs: slice(0, number)
        return lambda matching, other: number * (matching.mean() - other.mean())

    path = tmp_path / "sweep.json"
    found = swept(model, vector, path=path, controls=None, **{name: made(1)})
    assert swept(model, vector, path=path, controls=None, **{name: made(1)}) == found
    with pytest.raises(ValueError, match="holds a sweep with another setting"):
        swept(model, vector, path=path, controls=None, **{name: made(3)})


def test_an_object_that_does_not_show_its_settings_has_no_file(
    model: Any, vector: SteeringVector, tmp_path: Path
) -> None:
    class Everything:
        def __call__(self, positions: Any) -> torch.Tensor:
            return torch.ones_like(positions.index, dtype=torch.bool)

    with pytest.raises(ValueError, match="can't be compared with that of a later call"):
        swept(model, vector, path=tmp_path / "sweep.json", controls=None, tokens=Everything())
    assert list(tmp_path.iterdir()) == []


def test_large_tensors_and_single_numbers_are_told_from_others() -> None:
    mask = torch.zeros(2000, dtype=torch.bool)
    other = mask.clone()
    other[1000] = True
    assert hash_of(mask) != hash_of(other)
    assert hash_of(torch.tensor([1.00001])) != hash_of(torch.tensor([1.00002]))
    model = tiny.build("llama")
    before = hash_of_model(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 0.5
    assert hash_of_model(model) != before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"multipliers": [0, 1]}, "another setting of multipliers"),
        ({"tokens": prompted}, "another setting of multipliers, tokens"),
        ({"texts": ["Another text."]}, "another set of texts"),
        ({"layers": [1]}, "another vector"),
    ],
)
def test_the_file_of_another_sweep_is_refused(
    model: Any, vector: SteeringVector, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    path = tmp_path / "sweep.json"
    swept(model, vector, path=path, controls=None)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"holds a sweep with {named}"):
        swept(model, vector, path=path, controls=None, **change)
    with pytest.raises(ValueError, match="holds a sweep with another model"):
        swept(tiny.shared("qwen2"), vector, path=path, controls=None)
    assert path.read_bytes() == before


def test_the_result_round_trips_through_json(model: Any, vector: SteeringVector, tmp_path: Path) -> None:
    result = swept(model, vector)
    assert Sweep.from_json(result.to_json(tmp_path / "result.json")) == result
    assert Sweep.from_json(tmp_path / "result.json") == result
    with pytest.raises(ValueError, match="not the JSON of a sweep"):
        Sweep.from_json("{}")


def test_the_table_has_80_columns(model: Any, vector: SteeringVector) -> None:
    text = str(swept(model, vector, max_kl=100))
    assert max(map(len, text.splitlines())) <= 80
    assert sum(" * " in line for line in text.splitlines()) == 1
    assert "At most 100 at the 95th percentile is allowed" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": [7]}, LookupError, "7"),
        ({"max_kl": -1}, ValueError, "max_kl must be more than 0"),
        ({"multipliers": [0]}, ValueError, "two different multipliers"),
        ({"multipliers": 2}, TypeError, "multipliers must be a list"),
        ({"max_kl": 1, "texts": []}, ValueError, "a budget max_kl needs texts"),
        ({"layer": 1}, TypeError, "the argument is layers="),
        ({"variants": ["Be."]}, TypeError, "variants must be a mapping from names"),
        ({"tokens": lambda inputs: generated}, TypeError, "did you forget to call it"),
    ],
)
def test_bad_input_is_refused_in_words(
    model: Any, vector: SteeringVector, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        swept(model, vector, **arguments)


def test_a_model_that_is_steered_already_has_no_file(model: Any, vector: SteeringVector, tmp_path: Path) -> None:
    with vector[0].apply(model):
        with pytest.raises(ValueError, match="the model is steered already, by .*leave path out"):
            swept(model, vector, path=tmp_path / "sweep.json")
        swept(model, vector, controls=None)
    assert list(tmp_path.iterdir()) == []


def test_a_vector_without_layers_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="this steering vector has no directions"):
        swept(model, SteeringVector({}))


def test_functions_with_sets_are_the_same_in_every_process() -> None:
    code = (
        "from steering_vectors.evaluation.cells import hash_of\n"
        "print(hash_of(lambda word: word in {'alpha', 'beta', 'gamma', 'delta'}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_one_item_is_too_few_and_a_folder_is_no_file(model: Any, vector: SteeringVector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two items"):
        sweep(model, tiny.tokenizer(), vector, ITEMS[:1])
    with pytest.raises(IsADirectoryError, match="is a folder"):
        swept(model, vector, path=tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        swept(model, vector, path=tmp_path / "none" / "sweep.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON of a sweep"):
        swept(model, vector, path=tmp_path / "other.json")
