"""Reading a model's rows, against each prompt run alone under plain hooks."""

import inspect
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from steering_vectors._extraction.extractor import ReadPrompt
from steering_vectors._extraction.reading import extractor_for
from steering_vectors._extraction.ways import OneAtATime, Packed
from steering_vectors._models import anatomy_of
from steering_vectors.layer_matching import find_layers

_DRAW = torch.Generator().manual_seed(3)
STEM = torch.randint(3, 90, (40,), generator=_DRAW).tolist()
PROMPTS = [
    # Nothing shared and short; then branches off one stem, some of them inside others; then places inside prompts.
    *(ReadPrompt([n, n + 1, 5], [2]) for n in range(10, 16)),
    *(ReadPrompt([*STEM[:depth], 60 + depth, 7, *range(20, 20 + depth % 5)], [depth + 1]) for depth in range(4, 40, 5)),
    *(ReadPrompt(STEM[:depth], [depth - 1]) for depth in (1, 2, 16, 33, 40)),
    *(ReadPrompt(STEM, [position]) for position in (0, 1, 20)),
]


def check_reading(model: Any, refusal: str | None) -> str:
    """How the model was run in the end; its rows must be those of each prompt alone, or reading refused in words."""
    if refusal is not None:
        with pytest.raises((ValueError, RuntimeError), match=refusal):
            _how_rows_are_read(model)
        return "refused"
    how, worst = _how_rows_are_read(model)
    assert worst < 3e-5
    return how


def _how_rows_are_read(model: Any) -> tuple[str, float]:
    """How the model was run in the end, and how far its rows are from those of each prompt alone, relative."""
    found = find_layers(model)
    modules = {layer: model.get_submodule(name) for layer, name in found.names.items()}
    extractor, worst, packed = extractor_for(anatomy_of(model), None, "decoder_block", None, batch_size=8), 0.0, False
    parts = list(extractor(PROMPTS))
    alone = [_rows_alone(model, modules, prompt) for prompt in PROMPTS]
    for part in parts:
        packed = isinstance(extractor._ways[0], Packed)
        for number, row in zip(part.prompts, part.rows, strict=True):
            expected = alone[number][part.layer]
            worst = max(worst, float((row - expected).norm() / expected.norm()))
    how = "one at a time" if isinstance(extractor._ways[0], OneAtATime) else "packs" if packed else "rows"
    return how, worst


def _rows_alone(model: Any, modules: Mapping[int, Any], prompt: ReadPrompt) -> dict[int, Tensor]:
    rows: dict[int, Tensor] = {}
    (position,) = prompt.positions

    def keep(layer: int, output: Any) -> None:
        while not isinstance(output, Tensor):
            output = next(iter(output.values())) if hasattr(output, "values") else output[0]
        rows[layer] = output.reshape(len(prompt.input_ids), -1)[position]

    handles = [
        module.register_forward_hook(lambda _m, _a, output, layer=layer: keep(layer, output))
        for layer, module in modules.items()
    ]
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        model(torch.tensor([prompt.input_ids]), **options)
    for handle in handles:
        handle.remove()
    return rows
