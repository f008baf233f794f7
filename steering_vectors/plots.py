"""Plot evaluations, sweeps, diagnoses and projections with matplotlib, which the extra ``[plots]`` installs.

Each function draws on axes that it is given or makes, and returns them. The colour-blind see the colours differ; in
grey, markers, dashes and numbers take their place. Figures that are made here have no background, and text has
matplotlib's colour, as in ``matplotlib.style.use("dark_background")``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any, NamedTuple

from steering_vectors.evaluation import ConditionRow, Diagnosis, Evaluation, Sweep, SweepRow
from steering_vectors.evaluation.propensity import UNITS
from steering_vectors.monitoring import SteeringMonitor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any  # types can be resolved without matplotlib

__all__ = ["heatmap", "layer_diagnostics", "projections", "propensity_curves"]

_FEW_LAYERS = 12  # each has its number below
# Colours like those of Okabe and Ito that stand out from white and from black.
_BLUE, _ORANGE, _GREEN, _PINK, _GREY = "#1e88cf", "#d55e00", "#009e73", "#cc79a7", "#808080"


class _Line(NamedTuple):
    color: str
    marker: str
    linestyle: Any
    linewidth: float = 1.4


# By the first word of a condition; variants of the items differ from each other in their markers.
_LINES = {
    "vector": _Line(_BLUE, "o", "-", 2.2),
    "random": _Line(_GREY, "", ":"),
    "permuted": _Line(_ORANGE, "^", "--"),
    "variant:": _Line(_GREEN, "s", "-."),
    "unsteered": _Line(_GREY, "", (0, (1, 4)), 1.0),
    "system": _Line(_PINK, "", (0, (6, 2))),
}
_MARKERS_OF_VARIANTS = "sDvXP<>*"


def propensity_curves(evaluation: Evaluation, *, ax: Axes | None = None) -> Axes:
    """Plot the mean propensity over the multiplier: the vector's with its intervals, and the others'.

    An interval covers how far the items lie apart, too: where those of two conditions overlap, their
    slopes may still be far apart. Conditions without steering are level lines.

    Args:
        evaluation: The evaluation.
        ax: The axes to draw on; by default those of a new figure.

    Raises:
        ImportError: If matplotlib isn't installed.
        TypeError: If ``evaluation`` or ``ax`` is something else.

    >>> row = ConditionRow("vector", (-1.0, 1.0), (-0.8, 0.8), 0.8, 0.7, 0.9, 0.0, items=16)
    >>> axes = propensity_curves(Evaluation((row,), (), "text_propensity()", texts=0, seed=0))
    >>> axes.get_ylabel()
    'propensity (nats per token)'
    """
    _check(evaluation, Evaluation, "evaluation")
    (axes,) = _axes(ax, 1)
    labelled = set()
    variants = [row.condition for row in evaluation.rows if row.condition.startswith("variant:")]
    markers = dict(zip(variants, itertools.cycle(_MARKERS_OF_VARIANTS), strict=False))
    for row in reversed(evaluation.rows):  # the vector's line lies on top
        line = _LINES.get(row.condition.split()[0], _LINES["unsteered"])._asdict()
        line["marker"] = markers.get(row.condition, line["marker"])
        label = "_random" if row.condition.startswith("random") and "random" in labelled else _label(row)
        labelled.add(label)
        if row.slope is None:
            axes.axhline(row.propensities[0], label=label, **line)
            continue
        x = sorted(row.multipliers)
        axes.plot(x, _at(x, row, row.propensities), label=label, markersize=5, **line)
        if row.condition == "vector" and row.propensities_low:
            ends = _at(x, row, row.propensities_low), _at(x, row, row.propensities_high)
            axes.fill_between(x, *ends, color=line["color"], alpha=0.2, linewidth=0)
    axes.set_xticks(sorted(evaluation.rows[0].multipliers))
    axes.set_xlabel("multiplier")
    axes.set_ylabel(f"propensity{_unit(evaluation)}")
    handles, labels = axes.get_legend_handles_labels()
    _legend_above(axes, handles[::-1], labels[::-1])
    return axes


def _check(given: object, kind: type, name: str) -> None:
    if not isinstance(given, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(given).__name__}")


def _legend_above(axes: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    where: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.45, 1)}
    axes.legend(handles, labels, **where, ncols=2, frameon=False, fontsize="small")


def _unit(result: Evaluation | Sweep) -> str:
    return f" ({UNITS[result.propensity]})" if result.propensity in UNITS else ""


def _label(row: ConditionRow) -> str:
    return "random" if row.condition.startswith("random") else row.condition


def _at(multipliers: Sequence[float], row: ConditionRow, values: Sequence[float]) -> list[float]:
    found = dict(zip(row.multipliers, values, strict=True))
    return [found[multiplier] for multiplier in multipliers]


def heatmap(sweep: Sweep, *, ax: Axes | Sequence[Axes] | None = None) -> tuple[Axes, ...]:
    """Plot the gain of each layer and multiplier on the items held out, and beside it the cost.

    The cost is the 95th percentile of KL per token. Numbers of points beyond the
    sweep's budget are in brackets, and a frame marks the chosen point. Without texts there is no
    cost, and only one plot.

    Args:
        sweep: The sweep.
        ax: The axes for the gain and for the cost, or one for the gain alone; by default those of a
            new figure.

    Returns:
        The axes for the gain and, where it is drawn, for the cost.

    Raises:
        ImportError: If matplotlib isn't installed.
        TypeError: If ``sweep`` or ``ax`` is something else.
        ValueError: If the sweep has no rows.

    >>> row = SweepRow(16, 1.0, gain=0.9, held_out_gain=0.8, held_out_low=0.7, held_out_high=0.9, reversed=0.0)
    >>> (axes,) = heatmap(Sweep((row,), row, (), max_kl=None, choosing=8, held_out=8, texts=0))
    >>> axes.get_title()
    'gain on items held out (nats per token)'
    """
    _check(sweep, Sweep, "sweep")
    if not sweep.rows:
        raise ValueError("the sweep has no rows to draw")
    height = 1.3 + 0.28 * len({row.layer for row in sweep.rows})
    count = 2 if sweep.texts else 1
    drawn = _axes(ax, count, size=(0.6 + 3.0 * count, height))
    gains = [row.held_out_gain for row in sweep.rows]
    reach = max(map(abs, gains)) or 1.0
    _cells(drawn[0], sweep, gains, "{:+.2f}", "cividis", (-reach, reach))
    drawn[0].set_title(f"gain on items held out{_unit(sweep)}", fontsize="medium")
    drawn[0].set_ylabel("layer")
    if len(drawn) > 1:
        costs = [row.kl_p95 or 0.0 for row in sweep.rows]
        _cells(drawn[1], sweep, costs, "{:.2f}", "cividis_r", (0.0, max(costs) or 1.0))
        drawn[1].set_title("KL, 95th percentile (nats per token)", fontsize="medium")
    if sweep.max_kl is not None:
        drawn[-1].set_xlabel(f"multiplier; in brackets: KL above {sweep.max_kl:g}")
    for axes in drawn:
        _frame(axes, sweep)
    return drawn


def _cells(
    axes: Axes, sweep: Sweep, values: Sequence[float], written: str, colours: str, bounds: tuple[float, float]
) -> None:
    """Draw a value of each row as a coloured cell with the number in it, in brackets beyond the budget."""
    import numpy

    layers, multipliers = (sorted({getattr(row, name) for row in sweep.rows}) for name in ("layer", "multiplier"))
    grid = numpy.full((len(layers), len(multipliers)), numpy.nan)
    places = [(layers.index(row.layer), multipliers.index(row.multiplier)) for row in sweep.rows]
    for place, value in zip(places, values, strict=True):
        grid[place] = value
    image = axes.imshow(grid, cmap=colours, vmin=bounds[0], vmax=bounds[1], aspect="auto", origin="lower")
    for (y, x), row, value in zip(places, sweep.rows, values, strict=True):
        red, green, blue, _ = image.to_rgba(grid[y : y + 1, x])[0]
        ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        number = f"({written.format(value)})" if _is_beyond(row, sweep.max_kl) else written.format(value)
        weight = "bold" if row == sweep.chosen else "normal"
        axes.text(x, y, number, color=ink, weight=weight, fontsize=8, ha="center", va="center")
    axes.set_xticks(range(len(multipliers)), [f"{multiplier:+g}" for multiplier in multipliers])
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlabel("multiplier")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _is_beyond(row: SweepRow, max_kl: float | None) -> bool:
    return max_kl is not None and row.kl_p95 is not None and row.kl_p95 > max_kl


def _frame(axes: Axes, sweep: Sweep) -> None:
    """Frame the chosen point."""
    from matplotlib.patches import Rectangle

    if sweep.chosen is not None:
        layers, multipliers = (sorted({getattr(row, name) for row in sweep.rows}) for name in ("layer", "multiplier"))
        corner = (multipliers.index(sweep.chosen.multiplier) - 0.5, layers.index(sweep.chosen.layer) - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=_ORANGE, linewidth=3, zorder=3))


def layer_diagnostics(diagnosis: Diagnosis, *, ax: Axes | Sequence[Axes] | None = None) -> tuple[Axes, ...]:
    """Plot how well the training pairs agree at each layer: shares and cosines above, the separation below.

    Args:
        diagnosis: The diagnosis.
        ax: The axes for shares and cosines and for the separation, or one for the former alone; by
            default those of a new figure.

    Returns:
        The axes for shares and cosines and, where it is drawn, for the separation.

    Raises:
        ImportError: If matplotlib isn't installed.
        TypeError: If ``diagnosis`` or ``ax`` is something else.

    >>> from steering_vectors.evaluation import LayerDiagnosis
    >>> row = LayerDiagnosis(7, pair_cosine=0.5, separation=2.0, auc=0.9, split_half=0.8, norm_share=0.2)
    >>> above, below = layer_diagnostics(Diagnosis((row,), pairs=20))
    >>> below.get_xlabel()
    'layer'
    """
    _check(diagnosis, Diagnosis, "diagnosis")
    drawn = _axes(ax, 2, size=(5.5, 5.0), stacked=True)
    layers = [row.layer for row in diagnosis.rows]
    lines = {
        "AUC on pairs left out": ([row.auc for row in diagnosis.rows], _Line(_BLUE, "o", "-")),
        "cosine of pairs to direction": ([row.pair_cosine for row in diagnosis.rows], _Line(_ORANGE, "^", "--")),
        "cosine of split halves": ([row.split_half for row in diagnosis.rows], _Line(_GREEN, "s", "-.")),
        "norm, share of the stream's": (_or_nan(row.norm_share for row in diagnosis.rows), _Line(_GREY, "x", ":")),
    }
    for label, (values, line) in lines.items():
        drawn[0].plot(layers, values, label=label, markersize=4, **line._asdict())
    drawn[0].set_ylabel("share or cosine")
    _legend_above(drawn[0], *drawn[0].get_legend_handles_labels())
    if len(layers) <= _FEW_LAYERS:
        drawn[0].set_xticks(layers)
    if len(drawn) > 1:
        drawn[1].bar(layers, [row.separation for row in diagnosis.rows], color=_BLUE)
        drawn[1].set_ylabel("separation d'\n(standard deviations)")
    drawn[-1].set_xlabel("layer")
    return drawn


def projections(
    monitored: SteeringMonitor,
    tokenizer: Any = None,
    *,
    sequence: int = 0,
    layer: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the projection of each token of a sequence on a layer's direction.

    The scale leaves out the first token, whose activation is often a hundred times as long as the
    others'; an arrow marks it where its bar is cut.

    Args:
        monitored: The monitor.
        tokenizer: The model's tokenizer, for the tokens' text; by default tokens are numbered.
        sequence: The number of the sequence, as in ``monitored.by_sequence()``.
        layer: The layer; by default the last one that is monitored.
        ax: The axes to draw on; by default those of a new figure.

    Raises:
        ImportError: If matplotlib isn't installed.
        LookupError: If there is no such sequence or layer.
        TypeError: If ``monitored`` or ``ax`` is something else.
        ValueError: If a tokenizer is given, but the model got embeddings instead of token ids.

    >>> from steering_vectors import monitor
    >>> with monitor(model, vector) as watched:
    ...     _ = model(torch.tensor([[5, 6, 7]]))
    >>> projections(watched).get_xlabel()
    'token'
    """
    _check(monitored, SteeringMonitor, "monitored")
    number = monitored.layers[-1] if layer is None else layer
    if number not in monitored.layers:
        raise LookupError(f"layer {number} is not monitored; those that are: {monitored.layers}")
    found = monitored.by_sequence()[number]
    if not 0 <= sequence < len(found):
        raise LookupError(f"there is no sequence {sequence}: the monitor has {len(found)}, counted from 0")
    values = found[sequence].tolist()
    labels = None if tokenizer is None else _texts(monitored.token_ids()[sequence], tokenizer)
    (axes,) = _axes(ax, 1, size=(min(2 + 0.2 * len(values), 12), 3.2))
    colours = [_BLUE if value > 0 else _ORANGE for value in values]
    axes.bar(range(len(values)), values, color=colours, hatch=["" if value > 0 else "////" for value in values])
    axes.axhline(0, color=_GREY, linewidth=0.8)
    _leave_out_first(axes, values)
    axes.margins(x=0.01)
    if labels is not None:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize="small")
    axes.set_xlabel("token")
    axes.set_ylabel(f"projection at layer {number}\n(units of activations)")
    return axes


def _leave_out_first(axes: Axes, values: Sequence[float]) -> None:
    """Scale the axes to all values but the first, and mark the first if it is cut."""
    others = [value for value in values[1:] if not isnan(value)]
    if not others:
        return
    low, high = min(0.0, *others) * 1.15, max(0.0, *others) * 1.15
    if not low <= values[0] <= high and abs(values[0]) > 2 * max(map(abs, others)):
        axes.set_ylim(low, high)
        arrow, side = ("↑", "top") if values[0] > 0 else ("↓", "bottom")  # beside its bar, beyond zero
        axes.text(0, 0, f" {arrow} {values[0]:.0f} ", rotation=90, ha="center", va=side, fontsize="small")


def _texts(ids: Sequence[int | None], tokenizer: Any) -> list[str]:
    if None in ids:
        raise ValueError(
            "the model got embeddings, not token ids, so there is no text to show: leave the tokenizer out"
        )
    # A dollar sign would begin a formula, and a line break a second line.
    return [repr(piece)[1:-1].replace("$", r"\$") for piece in tokenizer.batch_decode([[token] for token in ids])]


def _or_nan(values: Iterable[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _axes(
    given: Axes | Sequence[Axes] | None,
    count: int,
    *,
    size: tuple[float, float] = (5.5, 3.6),
    stacked: bool = False,
) -> tuple[Axes, ...]:
    """Return the axes that are given, at most ``count``, or those of a new figure of the size in inches."""
    try:
        from matplotlib import pyplot
        from matplotlib.axes import Axes as OneAxes
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'steering-vectors[plots]'") from error
    if given is None:
        shape: dict[str, Any] = {"nrows": count, "sharex": True} if stacked else {"ncols": count, "sharey": True}
        _, made = pyplot.subplots(**shape, figsize=size, layout="constrained", facecolor="none", squeeze=False)
        for axes in made.flat:
            axes.set_facecolor("none")
        return tuple(made.flat)
    listed = (given,) if isinstance(given, OneAxes) else tuple(given)
    if not 1 <= len(listed) <= count or not all(isinstance(axes, OneAxes) for axes in listed):
        raise TypeError(
            f"ax must be {'matplotlib axes' if count == 1 else 'one or two matplotlib axes'}, got {given!r}"
        )
    return listed
