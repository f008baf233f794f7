"""Evaluate, sweep, calibrate and diagnose; draw the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steering_vectors._whole_files import whole_file
from steering_vectors.cli.loading import (
    check_output,
    layers_of,
    load_model,
    load_vector,
    read_rows,
    read_texts,
    write_json,
)
from steering_vectors.cli.screen import note, shows_progress
from steering_vectors.cli.talking import steered_tokens
from steering_vectors.cli.usage import BadParameter
from steering_vectors.cli.vectors import (
    OfModel,
    aggregator_of,
    chosen,
    model_and_pairs,
    pairs_of,
    read_tokens,
    training_of,
)


@dataclass(frozen=True)
class Asked:
    """The options that evaluate and sweep share, as they were written."""

    multipliers: Sequence[float] | None
    tokens: str
    texts: Path | None
    pairs: Path | None
    read: str | None
    aggregator: str | None
    variants: Sequence[str]
    propensity: str

    def arguments(self, vector: Any) -> dict[str, Any]:
        """Return them as arguments of the functions that measure a vector."""
        from steering_vectors.evaluation import Controls, choice_propensity, text_propensity

        propensities = {"text": text_propensity, "choice": choice_propensity}
        found: dict[str, Any] = {
            "tokens": steered_tokens(self.tokens),
            "texts": read_texts(self.texts),
            "variants": _variants(self.variants),
            "propensity": chosen(self.propensity, "--propensity", propensities)(),
        }
        if self.multipliers:
            found["multipliers"] = self.multipliers
        if self.pairs is not None:
            found["training_samples"] = pairs_of(self.pairs)
            found["controls"] = Controls(training=training_of(vector, self.read, self.aggregator))
        return found


def measure(
    function: str,
    sources: tuple[str, str, Path],
    layers: str | None,
    asked: Asked,
    given: dict[str, Any],
    output: Path | None,
    of_model: OfModel,
) -> None:
    """Print what ``evaluate`` or ``sweep`` finds of a model, a vector and items, and write it as JSON."""
    from steering_vectors import evaluation

    model, vector, items = sources
    check_output(output, vector, items, asked.pairs, asked.texts, given.get("path"))
    check_output(given.get("path"), vector, items, asked.pairs, asked.texts)
    directions = load_vector(vector, layers)
    arguments, rows = {**given, **asked.arguments(directions)}, _items(items)
    gguf_file, dtype, device = of_model
    loaded = load_model(model, gguf_file=gguf_file, dtype=dtype, device=device)
    result = getattr(evaluation, function)(*loaded, directions, rows, show_progress=shows_progress(), **arguments)
    if output is not None:
        result.to_json(output)
    print(result)


def _variants(given: Sequence[str]) -> dict[str, Any]:
    """Return the variants by their names. Raises BadParameter for a name that comes twice."""
    found: dict[str, Any] = {}
    for name, value in map(_variant, given):
        if name in found:
            raise BadParameter(f"the name {name} comes twice: name each variant differently", param_hint="--variant")
        found[name] = value
    return found


def _variant(given: str) -> tuple[str, Any]:
    """Return the name of a variant, and its items or system prompt."""
    name, equals, value = given.partition("=")
    if not (name and equals and value):
        raise BadParameter(f"{given!r} names no variant: write NAME=FILE or NAME=TEXT", param_hint="--variant")
    path = Path(value)
    return name, _items(path) if path.suffix in (".csv", ".jsonl") else value


def calibrate(
    model: str,
    vector: str,
    max_kl: float,
    tokens: str,
    layers: str | None,
    texts: Path | None,
    output: Path | None,
    of_model: OfModel,
) -> None:
    """Print a calibration, and write it as JSON."""
    from steering_vectors import evaluation

    check_output(output, vector, texts)
    if not max_kl > 0:
        raise BadParameter(f"{max_kl:g} is not more than 0", param_hint="--max-kl")
    neutral, selection = read_texts(texts), steered_tokens(tokens)
    directions = load_vector(vector, layers)
    gguf_file, dtype, device = of_model
    loaded = load_model(model, gguf_file=gguf_file, dtype=dtype, device=device)
    result = evaluation.calibrate(
        *loaded, directions, neutral, max_kl=max_kl, tokens=selection, show_progress=shows_progress()
    )
    if output is not None:
        write_json(output, asdict(result))
    print(result)


def diagnose(
    arguments: Sequence[str],
    layers: str | None,
    tokens: str,
    aggregator: str,
    batch_size: int,
    output: Path | None,
    of_model: OfModel,
) -> None:
    """Print a diagnosis, and write it as JSON."""
    from steering_vectors import evaluation

    name, pairs = model_and_pairs(arguments)
    read, method, numbers = read_tokens(tokens), aggregator_of(aggregator), layers_of(layers)
    check_output(output, pairs)
    samples = pairs_of(pairs)
    gguf_file, dtype, device = of_model
    model, tokenizer = load_model(name, gguf_file=gguf_file, dtype=dtype, device=device, layers=numbers)
    _, result = evaluation.diagnose(
        model,
        tokenizer,
        samples,
        layers=numbers,
        tokens=read,
        aggregator=method,
        batch_size=batch_size,
        show_progress=shows_progress(),
    )
    if output is not None:
        write_json(output, asdict(result))
    print(result)


def plot(source: Path, output: Path) -> None:
    """Draw what evaluate, sweep or diagnose wrote."""
    from steering_vectors._pair_files import read_text

    check_output(output, source)
    text = read_text(source)
    try:
        drawn = _drawn(source, json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{source} is nothing that evaluate, sweep or diagnose wrote with -o") from None
    with whole_file(output) as path:
        drawn.figure.savefig(path, format=output.suffix[1:] or "png", bbox_inches="tight")
    note(str(output))


def _drawn(source: Path, found: dict[str, Any]) -> Any:
    """Return the axes of a result's picture. Raises an error of some type for anything else than a result."""
    from steering_vectors import plots
    from steering_vectors.evaluation import Diagnosis, Evaluation, LayerDiagnosis, Sweep

    if "pairs" in found:
        rows = tuple(LayerDiagnosis(**row) for row in found["rows"])
        return plots.layer_diagnostics(Diagnosis(rows, found["pairs"]))[0]
    if "chosen" in found:
        return plots.heatmap(Sweep.from_json(source))[0]
    return plots.propensity_curves(Evaluation.from_json(source))


def _items(path: Path) -> list[Any]:
    return read_rows(path, ("prompt", "matching", "not_matching"))
