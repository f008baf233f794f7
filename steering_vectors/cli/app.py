"""The commands and their options. What they do is imported when one of them runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steering_vectors.cli.export_app import export_app
from steering_vectors.cli.options import (
    EXAMPLES,
    BatchSize,
    Device,
    Dtype,
    GgufFile,
    ItemsFile,
    Layers,
    ModelAndPairs,
    ModelName,
    NewFile,
    NewFolder,
    Output,
    PairsFile,
    ReadTokens,
    Seed,
    Selected,
    Strengths,
    TextsFile,
    VectorName,
)

app = typer.Typer(
    name="steering-vectors",
    help="Train steering vectors, steer models with them, and measure what they do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Every command is a line or two of Python, which the documentation shows. --debug: where an error arose.",
)
app.add_typer(export_app, name="export")


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors train pairs.csv -o joy.safetensors\n"
    "  steering-vectors train Qwen/Qwen2.5-0.5B-Instruct pairs.jsonl --layers 10-16 -o joy.safetensors"
)
def train(
    arguments: ModelAndPairs,
    output: NewFile,
    layers: Layers = None,
    tokens: Annotated[str, typer.Option(metavar="mean|last|completion", help="The tokens to read.")] = "last",
    aggregator: Annotated[str, typer.Option(metavar="mean|pca|logistic", help="The method.")] = "mean",
    batch_size: BatchSize = 8,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Train a vector from pairs of positive and negative texts or chats."""
    from steering_vectors.cli import vectors

    vectors.train(arguments, output, layers, tokens, aggregator, batch_size, (gguf_file, dtype, device))


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors generate joy.safetensors 'I think that' -m -2 -m 0 -m 2\n"
    "  steering-vectors generate MODEL joy.safetensors 'How are you?' --chat --max-new-tokens 80"
)
def generate(
    arguments: Annotated[list[str], typer.Argument(metavar="[MODEL] VECTOR PROMPT...", help="What to complete.")],
    multiplier: Strengths = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    tokens: Selected = "generated",
    max_new_tokens: Annotated[int, typer.Option(metavar="NUMBER", help="The length of an answer in tokens.")] = 40,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Complete prompts at several multipliers, side by side from one batch."""
    from steering_vectors.cli import talking

    talking.generate(arguments, multiplier, chat, tokens, max_new_tokens, (gguf_file, dtype, device))


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors chat MODEL joy.safetensors\n"
    "  steering-vectors chat MODEL joy.safetensors formal.safetensors -m 1 -m 0.5"
)
def chat(
    arguments: Annotated[list[str], typer.Argument(metavar="[MODEL] VECTOR...", help="The vectors to talk with.")],
    multiplier: Strengths = None,
    tokens: Selected = "generated",
    max_new_tokens: Annotated[int, typer.Option(metavar="NUMBER", help="The length of an answer in tokens.")] = 200,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Talk with a steered model. /m 1.5 sets the strength, /off stops steering, /trace shows what was steered."""
    from steering_vectors.cli import talking

    talking.chat(arguments, multiplier, tokens, max_new_tokens, (gguf_file, dtype, device))


@app.command(epilog=f"{EXAMPLES}  steering-vectors show joy.safetensors\n  steering-vectors show user/joy")
def show(vector: VectorName) -> None:
    """Show a vector's layers, norms, and how it was made."""
    from steering_vectors.cli import vectors

    vectors.show(vector)


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors evaluate MODEL joy.safetensors items.jsonl\n"
    "  steering-vectors evaluate MODEL joy.safetensors items.csv --pairs pairs.csv -o result.json"
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
    read: ReadTokens = "last",
    system_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="An instruction to compare with.")] = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    output: Output = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Measure whether a vector steers, beside random controls, and what it costs."""
    from steering_vectors.cli import measuring

    given = {"system_prompt": system_prompt, "batch_size": batch_size, "seed": seed}
    of_model = (gguf_file, dtype, device)
    measuring.evaluate(model, vector, items, multiplier, tokens, layers, texts, pairs, read, given, output, of_model)


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors sweep MODEL joy.safetensors items.jsonl --layers 8-20 --max-kl 0.5\n"
    "  steering-vectors sweep MODEL joy.safetensors items.jsonl --resume sweep.json"
)
def sweep(
    model: ModelName,
    vector: VectorName,
    items: ItemsFile,
    multiplier: Strengths = None,
    tokens: Selected = "generated",
    layers: Layers = None,
    max_kl: Annotated[float | None, typer.Option(metavar="NATS", help="The most that a choice may cost.")] = None,
    texts: TextsFile = None,
    pairs: PairsFile = None,
    read: ReadTokens = "last",
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
    """Choose a layer and a multiplier on half of the items, and report them on the other half."""
    from steering_vectors.cli import measuring

    given = {"max_kl": max_kl, "path": resume, "batch_size": batch_size, "seed": seed}
    of_model = (gguf_file, dtype, device)
    measuring.sweep(model, vector, items, multiplier, tokens, layers, texts, pairs, read, given, output, of_model)


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors calibrate MODEL joy.safetensors\n"
    "  steering-vectors calibrate MODEL joy.safetensors --max-kl 0.3 --texts texts.txt"
)
def calibrate(
    model: ModelName,
    vector: VectorName,
    max_kl: Annotated[float, typer.Option(metavar="NATS", help="The budget of KL per token.")] = 1.0,
    tokens: Selected = "generated",
    layers: Layers = None,
    texts: TextsFile = None,
    output: Output = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Find the multiplier at which steering costs as much as is allowed."""
    from steering_vectors.cli import measuring

    measuring.calibrate(model, vector, max_kl, tokens, layers, texts, output, (gguf_file, dtype, device))


@app.command(
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


@app.command(
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


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors combine joy.safetensors:1 formal.safetensors:-0.5 -o both.safetensors\n"
    "  steering-vectors combine user/joy:2 -o twice.safetensors"
)
def combine(
    vectors_given: Annotated[list[str], typer.Argument(metavar="VECTOR:FACTOR...", help="Vectors and their factors.")],
    output: NewFile,
) -> None:
    """Add vectors, each times a factor."""
    from steering_vectors.cli import vectors

    vectors.combine(vectors_given, output)


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors ablate MODEL refusal.safetensors -o model-without\n"
    "  steering-vectors ablate MODEL refusal.safetensors --layers 16 -o model-without"
)
def ablate(
    model: ModelName,
    vector: VectorName,
    output: NewFolder,
    layers: Layers = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
) -> None:
    """Write a model whose weights can't write along a vector's direction."""
    from steering_vectors.cli import exporting

    exporting.ablate(model, vector, output, layers, (gguf_file, dtype, None))
