"""Train, show and combine vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering_vectors._arguments import finite_number
from steering_vectors.cli.loading import check_output, layers_of, load_model, load_vector, read_rows
from steering_vectors.cli.screen import note, print_table, shows_progress
from steering_vectors.cli.usage import BadParameter, UsageError

OfModel = tuple[str | None, str | None, str | None]  # the GGUF file, the dtype, the device
_SHOWN_ABOVE = {"activation_norms", "hidden_size", "layer_type", "norms"}


def train(
    arguments: Sequence[str],
    output: Path,
    layers: str | None,
    tokens: str,
    aggregator: str,
    batch_size: int,
    of_model: OfModel,
) -> None:
    """Train a vector and save it."""
    name, pairs = model_and_pairs(arguments)
    read, method, numbers = read_tokens(tokens), aggregator_of(aggregator), layers_of(layers)
    check_output(output, pairs)
    samples = pairs_of(pairs)
    gguf_file, dtype, device = of_model
    model, tokenizer = load_model(name, gguf_file=gguf_file, dtype=dtype, device=device, layers=numbers)
    from steering_vectors import train_steering_vector

    vector = train_steering_vector(
        model,
        tokenizer,
        samples,
        layers=numbers,
        tokens=read,
        aggregator=method,
        batch_size=batch_size,
        show_progress=shows_progress(),
    )
    vector.save(output)
    first, last = vector.layers[0], vector.layers[-1]
    note(f"{output}: {len(samples)} pairs, {f'layer {first}' if first == last else f'layers {first} to {last}'}")


def model_and_pairs(arguments: Sequence[str]) -> tuple[str | None, Path]:
    """Return the model's name, if one is given, and the pairs' file."""
    if len(arguments) > 2:
        raise UsageError("expected [MODEL] PAIRS")
    *model, pairs = arguments
    return (model[0] if model else None), Path(pairs)


def pairs_of(path: Path) -> list[tuple[Any, Any]]:
    """Return the pairs of a file."""
    return [(row["positive"], row["negative"]) for row in read_rows(path, ("positive", "negative"))]


def read_tokens(name: str) -> Any:
    """Return the tokens to read by their name; None is the last one."""
    return chosen(name, "--tokens", _read())


def aggregator_of(name: str) -> Any:
    """Return an aggregator by its name."""
    return chosen(name, "--aggregator", _aggregators())()


def training_of(vector: Any, read: str | None, aggregator: str | None) -> dict[str, Any]:
    """Return the arguments that a vector was trained with, by the names that are given, or else by its metadata.

    Raises UsageError where neither says them.
    """
    named_reads = {f"tokens={tokens!r}": name for name, tokens in _read().items()} | {"read_token_index=-1": "last"}
    named_methods = {repr(made()): name for name, made in _aggregators().items()}
    read = read or _recorded(vector, "read", named_reads, "--read")
    aggregator = aggregator or _recorded(vector, "method", named_methods, "--aggregator")
    return {
        "tokens": chosen(read, "--read", _read()),
        "aggregator": chosen(aggregator, "--aggregator", _aggregators())(),
    }


def _recorded(vector: Any, entry: str, names: dict[str, str], option: str) -> str:
    """Return the name of what a vector's metadata says. Raises UsageError, which asks for the option, for none."""
    recorded = vector.metadata.get(entry)
    if recorded is None:
        raise UsageError(f"the vector doesn't say how it was trained: for the control of --pairs, name {option} too")
    if recorded not in names:
        raise UsageError(f"the vector was trained with {recorded}: name the nearest with {option}, or omit --pairs")
    return names[recorded]


def _read() -> dict[str, Any]:
    from steering_vectors import completion, from_index

    return {"last": None, "mean": from_index(1), "completion": completion()}


def _aggregators() -> dict[str, Any]:
    from steering_vectors import logistic_aggregator, mean_aggregator, pca_aggregator

    return {"mean": mean_aggregator, "pca": pca_aggregator, "logistic": logistic_aggregator}


def chosen(name: str, option: str, values: dict[str, Any]) -> Any:
    """Return the value of a name. Raises BadParameter, which lists the names, for another."""
    if name not in values:
        raise BadParameter(f"{name!r} is not one of {', '.join(values)}", param_hint=option)
    return values[name]


def show(name: str) -> None:
    """Print a vector's layers and its metadata."""
    vector = load_vector(name)
    shares = vector.shares()
    rows = [
        (layer, f"{norm:.3g}", f"{shares[layer]:.3f}" if layer in shares else "")
        for layer, norm in vector.norms().items()
    ]
    count = len(vector.layers)
    print(f"{vector.layer_type}, {vector.hidden_size} wide, {count} layer{'s' * (count != 1)}")
    print()
    print_table(["layer", "norm", "norm / stream"], rows)
    made = sorted((name, value) for name, value in vector.metadata.items() if name not in _SHOWN_ABOVE)
    if made:
        print()
        print_table(["how it was made", ""], made, numbers=False)


def combine(given: Sequence[str], output: Path) -> None:
    """Add vectors, each times its factor, and save the sum."""
    terms = []
    for argument in given:
        name, colon, factor = argument.rpartition(":")
        try:
            terms.append((name, finite_number(float(factor), "a factor")) if colon else (argument, 1.0))
        except ValueError:
            raise BadParameter(f"{argument!r} has no finite number behind the colon, as in {name}:0.5") from None
    check_output(output, *(name for name, _ in terms))
    total: Any = sum(load_vector(name) * factor for name, factor in terms)
    if not any(total.norms().values()):
        raise ValueError("the sum is zero at all layers: it would steer nothing, and is not written")
    total.save(output)
    note(f"{output}: {' '.join(f'{factor:+g} × {name}' for name, factor in terms)}")
