"""Arguments and options that several commands have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from steering_vectors.cli.usage import BadParameter

_Numbers = TypeVar("_Numbers", float, "float | None", "list[float] | None")


def _finite(numbers: _Numbers) -> _Numbers:
    """Return an option's numbers. Raises BadParameter unless each is finite."""
    for number in numbers if isinstance(numbers, list) else [numbers]:
        if number is not None and not math.isfinite(number):
            raise BadParameter(f"{number} is not a finite number")
    return numbers


ModelAndPairs = Annotated[
    list[str], typer.Argument(metavar="[MODEL] PAIRS", help="A model of the hub or a folder, and a CSV or JSONL file.")
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model of the hub, or a folder.")]
VectorName = Annotated[str, typer.Argument(metavar="VECTOR", help="A vector's file, folder, or repository.")]
ItemsFile = Annotated[
    Path, typer.Argument(metavar="ITEMS", help="A CSV or JSONL file with prompt, matching and not_matching.")
]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the result as JSON.")]
NewFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")]
NewFolder = Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")]
Layers = Annotated[str | None, typer.Option(metavar="10-16", help="The layers, such as 12, 10-16 or 8,12,-1.")]
Strengths = Annotated[
    list[float] | None,
    typer.Option("-m", "--multiplier", metavar="NUMBER", help="A multiplier; may be repeated.", callback=_finite),
]
Strength = Annotated[
    float, typer.Option("-m", "--multiplier", metavar="NUMBER", help="The multiplier.", callback=_finite)
]
Budget = Annotated[float, typer.Option(metavar="NATS", help="The budget of KL per token.", callback=_finite)]
MostCost = Annotated[
    float | None, typer.Option(metavar="NATS", help="The most that a choice may cost.", callback=_finite)
]
Selected = Annotated[str, typer.Option(metavar="generated|all|prompt", help="The tokens to steer.")]
BatchSize = Annotated[int, typer.Option(metavar="NUMBER", min=1, help="The number of samples or items in a pass.")]
GgufFile = Annotated[str | None, typer.Option(metavar="NAME", help="The GGUF file in the model's folder.")]
Dtype = Annotated[str | None, typer.Option(metavar="float32|bfloat16", help="The dtype to run the model in.")]
Device = Annotated[str | None, typer.Option(metavar="cpu|cuda", help="The device to run the model on.")]
PairsFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The training pairs, for the control with permuted labels.")
]
ReadTokens = Annotated[
    str | None, typer.Option(metavar="mean|last|completion", help="The tokens that training read, if not in VECTOR.")
]
TrainedBy = Annotated[
    str | None, typer.Option(metavar="mean|pca|logistic", help="The method of the training, if not in VECTOR.")
]
TextsFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Neutral texts, one in each line.")]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME=ITEMS|TEXT",
        help="The items in other words, in a CSV or JSONL file, or after a system prompt; may be repeated.",
    ),
]
PropensityName = Annotated[
    str, typer.Option("--propensity", metavar="text|choice", help="Compare the answers' texts, or letters of choices.")
]
Seed = Annotated[int, typer.Option(metavar="NUMBER", help="The seed of controls and intervals.")]
EXAMPLES = "\b\nExamples:\n"
