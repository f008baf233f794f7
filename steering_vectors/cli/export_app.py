"""The commands that write a vector for other programs."""

from __future__ import annotations

from typing import Annotated

import typer

from steering_vectors.cli.options import EXAMPLES, Dtype, GgufFile, ModelName, NewFile, NewFolder, Strength, VectorName

export_app = typer.Typer(help="Write a vector for other programs.", no_args_is_help=True, rich_markup_mode=None)


@export_app.command(
    epilog=f"{EXAMPLES}  steering-vectors export gguf joy.safetensors -o joy.gguf\n"
    "  steering-vectors export gguf joy.safetensors -m 1.5 -o joy.gguf"
)
def gguf(vector: VectorName, output: NewFile, multiplier: Strength = 1.0) -> None:
    """Write a control vector for llama.cpp. Its options are printed."""
    from steering_vectors.cli import exporting

    exporting.gguf(vector, output, multiplier)


@export_app.command(
    epilog=f"{EXAMPLES}  steering-vectors export adapter MODEL joy.safetensors -o joy-adapter\n"
    "  steering-vectors export adapter MODEL user/refusal --ablate -o no-refusal"
)
def adapter(
    model: ModelName,
    vector: VectorName,
    output: NewFolder,
    multiplier: Strength = 1.0,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Ablate the direction everywhere instead of adding it.")
    ] = False,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
) -> None:
    """Write a PEFT adapter. The options with which vLLM serves it are printed."""
    from steering_vectors.cli import exporting

    exporting.adapter(model, vector, output, multiplier, ablate, (gguf_file, dtype, None))


@export_app.command(
    name="lm-eval",
    epilog=f"{EXAMPLES}  steering-vectors export lm-eval MODEL joy.safetensors -o joy.pt\n"
    "  steering-vectors export lm-eval MODEL joy.safetensors -m 2 -o joy.pt",
)
def lm_eval(
    model: ModelName,
    vector: VectorName,
    output: NewFile,
    multiplier: Strength = 1.0,
    gguf_file: GgufFile = None,
) -> None:
    """Write a file for lm-evaluation-harness. Its model type 'steered' reads it."""
    from steering_vectors.cli import exporting

    exporting.lm_eval(model, vector, output, multiplier, (gguf_file, None, None))


@export_app.command(
    epilog=f"{EXAMPLES}  steering-vectors export weights MODEL joy.safetensors -o joyful-model\n"
    "  steering-vectors export weights MODEL joy.safetensors -m 1.5 -o joyful-model"
)
def weights(
    model: ModelName,
    vector: VectorName,
    output: NewFolder,
    multiplier: Strength = 1.0,
    gguf_file: GgufFile = None,
    dtype: Dtype = None,
) -> None:
    """Write a model that is always steered, without this library."""
    from steering_vectors.cli import exporting

    exporting.weights(model, vector, output, multiplier, (gguf_file, dtype, None))
