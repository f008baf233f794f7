"""Plots draw the numbers of their results, each in its place, and say in words what is wrong."""

import builtins
import dataclasses
from collections.abc import Iterator
from math import isnan
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_hex, to_rgb

from steering_vectors import SteeringVector, monitor, plots
from steering_vectors.evaluation import (
    ConditionRow,
    Controls,
    Diagnosis,
    Evaluation,
    LayerDiagnosis,
    Sweep,
    SweepRow,
    choice_propensity,
    evaluate,
    sweep,
)
from tests import tiny

ITEMS = [("I say", " yes", " no!"), ("Then we", " are glad", " weep"), ("It", " works", " fails now")]
TEXTS = ["It rains in the morning."]
MULTIPLIERS = (1.0, -1.0, 0.0)  # in no order


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    pyplot.close("all")  # those of other tests in this process
    with mpl.rc_context({"backend": "agg"}):
        yield
        pyplot.close("all")


@pytest.fixture(scope="module")
def vector() -> SteeringVector:
    generator = torch.Generator().manual_seed(3)
    return SteeringVector({layer: torch.randn(tiny.HIDDEN, generator=generator) for layer in (0, 1, 2)})


@pytest.fixture(scope="module")
def evaluation(vector: SteeringVector) -> Evaluation:
    return evaluate(
        tiny.shared("llama"),
        tiny.tokenizer(),
        vector[1],
        ITEMS,
        multipliers=MULTIPLIERS,
        texts=[],
        controls=Controls(random=2),
        training_samples=[("I love it", "I hate it"), ("good", "bad")],
        system_prompt="Be kind.",
        variants={"as a judge": "You judge."},
    )


@pytest.fixture(scope="module")
def swept(vector: SteeringVector) -> Sweep:
    return sweep(tiny.shared("llama"), tiny.tokenizer(), vector, ITEMS, multipliers=MULTIPLIERS, texts=TEXTS)


DIAGNOSIS = Diagnosis(
    tuple(
        LayerDiagnosis(n, pair_cosine=n / 7, separation=n / 2, auc=1 - n / 9, split_half=n / 11, norm_share=share)
        for n, share in ((2, 0.25), (4, None), (5, 0.5))
    ),
    pairs=8,
)


class TestPropensityCurves:
    def test_draw_each_condition_in_the_order_of_the_multipliers(self, evaluation: Evaluation) -> None:
        axes = plots.propensity_curves(evaluation)
        drawn = [tuple(map(tuple, line.get_xydata())) for line in axes.lines]  # type: ignore[arg-type, union-attr]
        for row in evaluation.rows:
            if row.slope is None:
                assert any(y == (row.propensities[0],) * 2 for y in (tuple(y for _, y in line) for line in drawn))
            else:
                assert tuple(sorted(zip(row.multipliers, row.propensities))) in drawn
        assert len(drawn) == len(evaluation.rows)

    def test_draw_the_vectors_intervals(self, evaluation: Evaluation) -> None:
        axes = plots.propensity_curves(evaluation)
        (band,) = axes.collections
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}  # type: ignore[union-attr]
        row = evaluation.rows[0]
        for ends in (row.propensities_low, row.propensities_high):
            assert set(zip(row.multipliers, ends)) <= corners

    def test_name_conditions_in_their_order_and_random_ones_once(self, evaluation: Evaluation) -> None:
        axes = plots.propensity_curves(evaluation)
        legend = axes.get_legend()
        assert legend is not None
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["vector", "random", "permuted 1", "variant: as a judge", "system prompt", "unsteered"]

    def test_can_be_told_apart_in_grey(self) -> None:
        looks = {(line.marker, str(line.linestyle)) for line in plots._LINES.values()}
        assert len(looks) == len(plots._LINES)

    def test_variants_differ_in_their_markers(self, evaluation: Evaluation) -> None:
        row = next(row for row in evaluation.rows if row.condition.startswith("variant: "))
        others = tuple(dataclasses.replace(row, condition=f"variant: {n}") for n in range(3))
        axes = plots.propensity_curves(dataclasses.replace(evaluation, rows=(*evaluation.rows, *others)))
        markers = [line.get_marker() for line in axes.lines if str(line.get_label()).startswith("variant: ")]
        assert len(set(markers)) == len(markers) == 4

    def test_name_the_unit_of_the_propensity(self, evaluation: Evaluation) -> None:
        of_choices = dataclasses.replace(evaluation, propensity=repr(choice_propensity()))
        of_another = dataclasses.replace(evaluation, propensity="total")
        labels = [plots.propensity_curves(result).get_ylabel() for result in (evaluation, of_choices, of_another)]
        assert labels == ["propensity (nats per token)", "propensity (nats)", "propensity"]

    def test_draw_on_the_axes_that_are_given(self, evaluation: Evaluation) -> None:
        _, ax = pyplot.subplots()
        assert plots.propensity_curves(evaluation, ax=ax) is ax
        assert len(pyplot.get_fignums()) == 1


class TestHeatmap:
    def test_has_the_gain_and_the_cost_of_each_point_as_colour_and_number(self, swept: Sweep) -> None:
        gains, costs = plots.heatmap(swept)
        for axes, name, written in ((gains, "held_out_gain", "{:+.2f}"), (costs, "kl_p95", "{:.2f}")):
            (image,) = axes.images
            columns = [label.get_text() for label in axes.get_xticklabels()]
            lines = [label.get_text() for label in gains.get_yticklabels()]
            texts = {text.get_position(): text.get_text() for text in axes.texts}
            for row in swept.rows:
                x, y = columns.index(f"{row.multiplier:+g}"), lines.index(str(row.layer))
                value = getattr(row, name)
                assert image.get_array()[y, x] == pytest.approx(value)  # type: ignore[index]
                assert texts[x, y] == written.format(value)
            assert len(texts) == len(swept.rows) == 6
            assert axes.get_ylim() == (-0.5, 2.5)  # the first layer is the lowest
        assert columns == ["-1", "+1"]
        assert lines == ["0", "1", "2"]

    def test_frames_the_chosen_point_and_brackets_those_beyond_the_budget(self, swept: Sweep) -> None:
        dearest = max(row.kl_p95 or 0 for row in swept.rows)
        chosen = next(row for row in swept.rows if (row.layer, row.multiplier) == (1, 1))
        budgeted = dataclasses.replace(swept, chosen=chosen, max_kl=dearest * 0.999)
        for axes in plots.heatmap(budgeted):
            (frame,) = axes.patches
            assert frame.get_xy() == (0.5, 0.5)  # type: ignore[attr-defined]  # of layer 1 at +1
            assert sum(text.get_text().startswith("(") for text in axes.texts) == 1
            assert [text.get_position() for text in axes.texts if text.get_weight() == "bold"] == [(1, 1)]
        assert f"KL above {budgeted.max_kl:g}" in axes.get_xlabel()

    def test_zero_is_in_the_middle_of_the_gains_colours(self, swept: Sweep) -> None:
        (image,) = plots.heatmap(swept)[0].images
        low, high = image.get_clim()
        assert low == pytest.approx(-(high or 0))
        assert high == pytest.approx(max(abs(row.held_out_gain) for row in swept.rows))

    def test_numbers_stand_out_from_their_cells(self, swept: Sweep) -> None:
        for axes in plots.heatmap(swept):
            (image,) = axes.images
            for text in axes.texts:
                x, y = map(int, text.get_position())
                cell = image.to_rgba(image.get_array()[y : y + 1, x])[0]  # type: ignore[index]
                light, dark = sorted((luminance(cell[:3]), luminance(to_rgb(text.get_color()))), reverse=True)
                assert (light + 0.05) / (dark + 0.05) > 3.5

    def test_without_texts_has_the_gain_alone(self, swept: Sweep) -> None:
        assert len(plots.heatmap(dataclasses.replace(swept, texts=0))) == 1

    def test_draws_on_one_or_two_axes_that_are_given(self, swept: Sweep) -> None:
        _, pair = pyplot.subplots(1, 2)
        assert plots.heatmap(swept, ax=pair) == tuple(pair)
        assert plots.heatmap(swept, ax=pair[0]) == (pair[0],)
        assert len(pyplot.get_fignums()) == 1

    def test_of_an_incomplete_sweep_leaves_cells_empty(self) -> None:
        rows = [SweepRow(layer, m, 0.1, 0.2, 0.1, 0.3, 0.0) for layer, m in ((1, 1.0), (2, -1.0))]
        (axes,) = plots.heatmap(Sweep(tuple(rows), None, (), None, 1, 1, 0))
        assert len(axes.texts) == 2


def luminance(colour: Any) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_lines_stand_out_from_white_and_from_black() -> None:
    for colour in {line.color for line in plots._LINES.values()}:
        assert 1.05 / (luminance(to_rgb(colour)) + 0.05) > 2.9
        assert (luminance(to_rgb(colour)) + 0.05) / (luminance(to_rgb("#131416")) + 0.05) > 3


class TestLayerDiagnostics:
    def test_draw_each_number_at_its_layer(self) -> None:
        above, below = plots.layer_diagnostics(DIAGNOSIS)
        names = {
            "AUC on pairs left out": "auc",
            "cosine of pairs to direction": "pair_cosine",
            "cosine of split halves": "split_half",
            "norm, share of the stream's": "norm_share",
        }
        assert [line.get_label() for line in above.lines] == list(names)
        for line in above.lines:
            assert list(line.get_xdata()) == [2, 4, 5]  # type: ignore[arg-type]
            for y, row in zip(line.get_ydata(), DIAGNOSIS.rows, strict=True):  # type: ignore[arg-type]
                value = getattr(row, names[str(line.get_label())])
                assert isnan(y) if value is None else y == value
        heights = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in below.patches}  # type: ignore[attr-defined]
        assert heights == pytest.approx({row.layer: row.separation for row in DIAGNOSIS.rows})

    def test_draw_on_axes_that_are_given(self) -> None:
        _, pair = pyplot.subplots(2)
        assert plots.layer_diagnostics(DIAGNOSIS, ax=pair) == tuple(pair)
        assert plots.layer_diagnostics(DIAGNOSIS, ax=pair[1]) == (pair[1],)


class TestProjections:
    @pytest.fixture
    def watched(self, vector: SteeringVector) -> Any:
        model = tiny.shared("llama")
        with monitor(model, vector) as found, torch.no_grad():
            model(torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]]))
        return found

    @pytest.mark.parametrize("layer", [None, 0])
    def test_are_the_heights_of_bars(self, watched: Any, layer: int | None) -> None:
        axes = plots.projections(watched, sequence=1, layer=layer)
        values = watched.by_sequence()[2 if layer is None else layer][1].tolist()
        assert [bar.get_height() for bar in axes.patches] == pytest.approx(values)  # type: ignore[attr-defined]
        for bar, value in zip(axes.patches, values, strict=True):
            assert (bar.get_hatch() == "////") == (value < 0)
            assert to_hex(bar.get_facecolor()) == ("#1e88cf" if value > 0 else "#d55e00")

    def test_have_the_tokens_below_if_there_is_a_tokenizer(self, vector: SteeringVector) -> None:
        model, tokenizer = tiny.shared("llama"), tiny.tokenizer()
        with monitor(model, vector) as found, torch.no_grad():
            model(torch.tensor([tokenizer("a$b\nc")["input_ids"]]))
        axes = plots.projections(found, tokenizer)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", r"\$", "b", r"\n", "c"]
        axes.figure.canvas.draw()  # a dollar sign begins no formula

    @pytest.mark.parametrize("sign", [1, -1])
    def test_are_scaled_to_all_but_the_first_which_is_marked(
        self, watched: Any, sign: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = torch.tensor([sign * 900.0, 3.0, -4.0, 2.0])
        monkeypatch.setattr(watched, "by_sequence", lambda: {2: [values]})
        axes = plots.projections(watched)
        low, high = axes.get_ylim()
        assert -6 < low < -4
        assert 3 < high < 5
        assert [text.get_text().strip() for text in axes.texts] == ["↑ 900" if sign > 0 else "↓ -900"]

    def test_name_a_layer_or_sequence_that_is_not_there(self, watched: Any) -> None:
        with pytest.raises(LookupError, match=r"layer 7 is not monitored; those that are: \[0, 1, 2\]"):
            plots.projections(watched, layer=7)
        with pytest.raises(LookupError, match="no sequence 2: the monitor has 2"):
            plots.projections(watched, sequence=2)

    def test_of_embeddings_have_no_text(self, vector: SteeringVector) -> None:
        model = tiny.shared("llama")
        with monitor(model, vector) as found, torch.no_grad():
            model(inputs_embeds=torch.randn(1, 3, tiny.HIDDEN))
        assert len(plots.projections(found).patches) == 3
        with pytest.raises(ValueError, match="embeddings, not token ids"):
            plots.projections(found, tiny.tokenizer())


def test_other_axes_are_refused(swept: Sweep, evaluation: Evaluation) -> None:
    figure, grid = pyplot.subplots(3)
    with pytest.raises(TypeError, match="ax must be one or two matplotlib axes"):
        plots.heatmap(swept, ax=grid)
    with pytest.raises(TypeError, match="ax must be matplotlib axes"):
        plots.propensity_curves(evaluation, ax=[figure])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (plots.propensity_curves, "evaluation must be an? Evaluation, got tuple"),
        (plots.heatmap, "sweep must be a Sweep, got tuple"),
        (plots.layer_diagnostics, "diagnosis must be a Diagnosis, got tuple"),
        (plots.projections, "monitored must be a SteeringMonitor, got tuple"),
    ],
)
def test_another_result_is_refused(plot: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        plot((tiny, tiny))


def test_a_sweep_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="no rows"):
        plots.heatmap(Sweep((), None, (), None, 1, 1, 0))


def test_figures_have_no_background_and_text_in_the_colour_of_the_settings(
    evaluation: Evaluation, swept: Sweep
) -> None:
    with mpl.rc_context({"text.color": "#123456", "axes.labelcolor": "#123456", "xtick.labelcolor": "#123456"}):
        for axes in (
            plots.propensity_curves(evaluation),
            *plots.heatmap(swept),
            *plots.layer_diagnostics(DIAGNOSIS),
        ):
            assert axes.figure.get_facecolor()[3] == 0  # type: ignore[index]
            assert axes.get_facecolor()[3] == 0  # type: ignore[index]
            assert axes.xaxis.label.get_color() == "#123456"
            legend = axes.get_legend()
            assert all(to_hex(text.get_color()) == "#123456" for text in (legend.get_texts() if legend else ()))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"steering-vectors\[plots\]"):
        plots.layer_diagnostics(DIAGNOSIS)


def test_a_row_from_older_json_has_no_intervals() -> None:
    row = ConditionRow("vector", (-1.0, 1.0), (-0.8, 0.8), 0.8, 0.7, 0.9, 0.0, items=16)
    axes = plots.propensity_curves(Evaluation((row,), (), "text_propensity()", 0, 0))
    assert len(axes.lines) == 1
    assert not axes.collections
