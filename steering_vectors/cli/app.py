"""The commands and their options. What they do is imported when one of them runs, so that help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from steering_vectors.cli.export_app import export_app
from steering_vectors.cli.measure_app import measure_app
from steering_vectors.cli.options import (
    EXAMPLES,
    BatchSize,
    Device,
    Dtype,
    GgufFile,
    Layers,
    ModelAndPairs,
    ModelName,
    NewFile,
    NewFolder,
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
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Every command is a line or two of Python, which the documentation shows. --debug: where an error arose.",
)


def _print_version(asked: bool) -> None:
    if asked:
        from steering_vectors import __version__

        print(f"steering-vectors {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


app.add_typer(measure_app)
app.add_typer(export_app, name="export")


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors train pairs.csv -o joy.safetensors\n"
    "  steering-vectors train MODEL pairs.jsonl --layers 10-16 -o joy.safetensors"
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
    """Train a vector from pairs of contrasting texts or chats."""
    from steering_vectors.cli import vectors

    vectors.train(arguments, output, layers, tokens, aggregator, batch_size, (gguf_file, dtype, device))


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors generate joy.safetensors 'I think that' -m -2 -m 0 -m 2\n"
    "  steering-vectors generate MODEL joy.safetensors 'How are you?' --chat"
)
def generate(
    arguments: Annotated[list[str], typer.Argument(metavar="[MODEL] VECTOR PROMPT...", help="What to complete.")],
    multiplier: Strengths = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    tokens: Selected = "generated",
    layers: Layers = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="The length of an answer in tokens.")
    ] = 40,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Complete prompts at several multipliers, side by side."""
    from steering_vectors.cli import talking

    talking.generate(arguments, multiplier, chat, tokens, layers, max_new_tokens, (gguf_file, dtype, device))


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors chat MODEL joy.safetensors\n"
    "  steering-vectors chat MODEL joy.safetensors formal.safetensors -m 1 -m 0.5"
)
def chat(
    arguments: Annotated[list[str], typer.Argument(metavar="[MODEL] VECTOR...", help="The vectors to talk with.")],
    multiplier: Strengths = None,
    tokens: Selected = "generated",
    layers: Layers = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="NUMBER", min=1, help="The length of an answer in tokens.")
    ] = 200,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Talk with a steered model. /m 1.5 sets the strength, /off stops steering, /trace shows what was steered."""
    from steering_vectors.cli import talking

    talking.chat(arguments, multiplier, tokens, layers, max_new_tokens, (gguf_file, dtype, device))


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors playground MODEL joy.safetensors\n"
    "  steering-vectors playground MODEL joy.safetensors calm.safetensors --range 3"
)
def playground(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[MODEL] VECTOR...", help="The vectors, a slider for each.")
    ],
    layers: Layers = None,
    texts: TextsFile = None,
    limit: Annotated[
        float | None, typer.Option("--range", metavar="NUMBER", help="The sliders' ends, without calibration.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="NUMBER", min=2, help="The longest answer in tokens.")] = 400,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="NUMBER", min=1, max=65535, help="By default the first free from 7860.")
    ] = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Serve a page that steers by sliders. Their ranges are calibrated."""
    from steering_vectors.cli.playground import serving

    of_model = (gguf_file, dtype, device)
    serving.playground(arguments, layers, texts, limit, max_new_tokens, (host, port), of_model)


@app.command(epilog=f"{EXAMPLES}  steering-vectors show joy.safetensors\n  steering-vectors show user/joy")
def show(vector: VectorName) -> None:
    """Show a vector's layers, norms, and how it was made."""
    from steering_vectors.cli import vectors

    vectors.show(vector)


@app.command(
    epilog=f"{EXAMPLES}  steering-vectors combine user/joy:1 user/calm:-0.5 -o both.safetensors\n"
    "  steering-vectors combine joy.safetensors:2 -o twice.safetensors"
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
    "  steering-vectors ablate MODEL refusal.safetensors --layers 16 -o ablated"
)
def ablate(
    model: ModelName,
    vector: VectorName,
    output: NewFolder,
    layers: Layers = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
) -> None:
    """Write a model that can't write along a vector's direction."""
    from steering_vectors.cli import exporting

    exporting.ablate(model, vector, output, layers, (gguf_file, dtype, None))
