"""The commands that measure: does a vector steer, at which layer and strength, and do its pairs agree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steering_vectors.cli.options import (
    EXAMPLES,
    BatchSize,
    Budget,
    Device,
    Dtype,
    GgufFile,
    ItemsFile,
    Layers,
    ModelAndPairs,
    ModelName,
    MostCost,
    NewFile,
    Output,
    PairsFile,
    PropensityName,
    ReadTokens,
    Seed,
    Selected,
    Strengths,
    TextsFile,
    TrainedBy,
    Variants,
    VectorName,
)

measure_app = typer.Typer(rich_markup_mode=None)


@measure_app.command(
    epilog=f"{EXAMPLES}  steering-vectors evaluate MODEL joy.safetensors items.jsonl\n"
    "  steering-vectors evaluate MODEL user/joy items.csv --variant 'rude=Be rude.'"
)
def evaluate(
    model: ModelName,
    vector: VectorName,
    items: ItemsFile,
    multiplier: Strengths = None,
    tokens: Selected = "generated",
    layers: Layers = None,
    texts: TextsFile = None,
    pairs: PairsFile = None,
    read: ReadTokens = None,
    aggregator: TrainedBy = None,
    variant: Variants = None,
    propensity: PropensityName = "text",
    system_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="An instruction to compare with.")] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    output: Output = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure how a vector steers, beside controls, and its cost."""
    from steering_vectors.cli import measuring

    given = {"system_prompt": system_prompt, "batch_size": batch_size, "seed": seed}
    asked = measuring.Asked(multiplier, tokens, texts, pairs, read, aggregator, variant or (), propensity)
    measuring.measure("evaluate", (model, vector, items), layers, asked, given, output, (gguf_file, dtype, device))


@measure_app.command(
    epilog=f"{EXAMPLES}  steering-vectors sweep MODEL joy.safetensors items.jsonl --max-kl 0.5\n"
    "  steering-vectors sweep MODEL joy.safetensors items.jsonl --resume kept.json"
)
def sweep(
    model: ModelName,
    vector: VectorName,
    items: ItemsFile,
    multiplier: Strengths = None,
    tokens: Selected = "generated",
    layers: Layers = None,
    max_kl: MostCost = None,
    texts: TextsFile = None,
    pairs: PairsFile = None,
    read: ReadTokens = None,
    aggregator: TrainedBy = None,
    variant: Variants = None,
    propensity: PropensityName = "text",
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what was measured here, and go on from it.")
    ] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    output: Output = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Choose a layer and a multiplier, and report on other items."""
    from steering_vectors.cli import measuring

    given = {"max_kl": max_kl, "path": resume, "batch_size": batch_size, "seed": seed}
    asked = measuring.Asked(multiplier, tokens, texts, pairs, read, aggregator, variant or (), propensity)
    measuring.measure("sweep", (model, vector, items), layers, asked, given, output, (gguf_file, dtype, device))


@measure_app.command(
    epilog=f"{EXAMPLES}  steering-vectors calibrate MODEL joy.safetensors\n"
    "  steering-vectors calibrate MODEL joy.safetensors --texts texts.txt"
)
def calibrate(
    model: ModelName,
    vector: VectorName,
    max_kl: Budget = 1.0,
    tokens: Selected = "generated",
    layers: Layers = None,
    texts: TextsFile = None,
    output: Output = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Find the multiplier whose cost is just what is allowed."""
    from steering_vectors.cli import measuring

    measuring.calibrate(model, vector, max_kl, tokens, layers, texts, output, (gguf_file, dtype, device))


@measure_app.command(
    epilog=f"{EXAMPLES}  steering-vectors diagnose pairs.csv\n"
    "  steering-vectors diagnose MODEL pairs.jsonl --tokens mean --layers 8-20"
)
def diagnose(
    arguments: ModelAndPairs,
    layers: Layers = None,
    tokens: Annotated[str, typer.Option(metavar="mean|last|completion", help="The tokens to read.")] = "last",
    aggregator: Annotated[str, typer.Option(metavar="mean|pca|logistic", help="The method.")] = "mean",
    batch_size: BatchSize = 8,
    output: Output = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure at each layer how well training pairs agree."""
    from steering_vectors.cli import measuring

    measuring.diagnose(arguments, layers, tokens, aggregator, batch_size, output, (gguf_file, dtype, device))


@measure_app.command(
    epilog=f"{EXAMPLES}  steering-vectors plot result.json -o result.png\n"
    "  steering-vectors plot sweep.json -o sweep.svg"
)
def plot(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="What evaluate, sweep or diagnose wrote with -o.")],
    output: NewFile,
) -> None:
    """Draw an evaluation, a sweep or a diagnosis."""
    from steering_vectors.cli import measuring

    measuring.plot(result, output)
