"""Write steering into adapters of PEFT."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors._arguments import finite_number, with_hints
from steering_vectors.ablation import ablate_everywhere
from steering_vectors.merging.added import last_linears
from steering_vectors.merging.biases import check_addable
from steering_vectors.merging.copies import (
    check_equal,
    check_mergeable,
    check_text_alone,
    in_whole_float32,
    logits_of,
    wide_copy,
)
from steering_vectors.merging.folders import check_target, hash_of_weights, written_folder
from steering_vectors.merging.in_vllm import engine_arguments
from steering_vectors.merging.low_rank import factors_of
from steering_vectors.merging.projecting import unit_rows_of
from steering_vectors.merging.writers import check_complete, watched_places, writing_weights
from steering_vectors.steering_operators import PatchDeltaOperator, ablation_operator, addition_operator
from steering_vectors.steering_vector import SteeringVector

__all__ = ["Adapter", "to_adapter"]


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and what a server needs to know of it.

    Attributes:
        folder: The folder that ``PeftModel.from_pretrained`` loads.
        name: A name that ends in a hash of the weights. vLLM's prefix cache knows an adapter by its
            name and path, so changed weights need another name.
        rank: The rank of an ablation's low-rank change; 0 for an addition.
        vllm: The arguments with which vLLM serves the adapter beside its base: keyword arguments of
            ``vllm.LLM``. ``max_loras`` is the number of adapters plus 1; with
            ``model_impl="transformers"``, there can be one only. Empty if vLLM can't serve it exactly.
        why_not_vllm: The reason for which it can't; empty if it can.
    """

    folder: Path
    name: str
    rank: int
    vllm: Mapping[str, Any]
    why_not_vllm: str = ""

    @property
    def vllm_options(self) -> str:
        """The same as options of ``vllm serve``, with the adapter's name and folder; empty if vLLM can't serve it.

        They are one line for a shell; ``shlex.split`` makes a list of them.
        """
        if not self.vllm:
            return ""
        options: list[str] = []
        for name, value in self.vllm.items():
            options += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        named = f"{self.name}={self.folder}"
        if "," in named or "=" in self.name:  # vLLM would divide it elsewhere
            named = json.dumps({"name": self.name, "path": str(self.folder)})
        return shlex.join([*options, "--lora-modules", named])


@with_hints(
    tokens="an adapter acts at every token: steer chosen tokens with vector.apply",
    layer_config="only outputs of the model's decoder blocks can be written into an adapter",
    missing="the arguments begin with vector_or_direction, model, folder",
)
@in_whole_float32
def to_adapter(
    vector_or_direction: SteeringVector | Tensor,
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    operator: PatchDeltaOperator | Callable[..., Tensor] | None = None,
    multiplier: float = 1.0,
) -> Adapter:
    """Write a steering into an adapter of PEFT, which runs without this library.

    ``PeftModel.from_pretrained(model, folder)`` then computes what the steered model does. Additions
    are adapters of PEFT's BEFT method, a bias on the last linear layer of each steered block, in any
    family in which such a layer is added to the stream as it is. Ablations are LoRA adapters on all
    layers that write to the stream, embeddings included, and remove the direction everywhere, as
    :func:`~steering_vectors.ablate_everywhere` does; vLLM serves them beside their base.

    The adapted model is compared with the steered one on a few tokens before anything is written.
    The folder is written whole or not at all; it replaces an adapter that is there. Beside PEFT's
    files it has ``steering_adapter.json``, with the operation and a hash of the base's weights. The
    given model is not changed; memory is needed for a copy of it in float32.

    Args:
        vector_or_direction: A vector of decoder blocks' outputs, to add. To ablate, a direction
            ``(hidden,)``, several ``(k, hidden)`` of which the span is removed, or a vector of one
            layer.
        model: The Hugging Face model that the adapter is for.
        folder: The path of the adapter's folder.
        operator: ``addition_operator()``, which is the default, or ``ablation_operator()``.
        multiplier: The factor on the directions; of an ablation, the ``strength``.

    Returns:
        The folder, a name for servers, and how vLLM serves the adapter.

    Raises:
        ImportError: If PEFT isn't installed, or too old.
        TypeError: If an argument has the wrong type.
        ValueError: If the operator is another one, if an adapter can't do it exactly, as where a
            norm follows the layer or an ablated layer has a bias, and as in :func:`~steering_vectors.merging.merge`.
        OSError: If the folder has something else in it than an adapter, if it is a file, or if no
            folder can be made there.

    >>> adapter = to_adapter(direction, model, folder / "ablated", operator=ablation_operator())  # doctest: +SKIP
    """
    number = finite_number(multiplier, "multiplier")
    ablates = _ablates(operator)
    peft = _peft()
    check_mergeable(model)
    if ablates:
        check_text_alone(model)
    target = check_target(folder)
    made, names, settings = (_ablating if ablates else _adding)(vector_or_direction, model, number, peft)
    rank = settings.pop("rank", 0)
    found: Any = "vLLM has no adapters that add a constant: serve a merged model instead"
    if ablates:
        found = engine_arguments(model.config.model_type, names, rank)
    facts = {**settings, "multiplier": number, "base_model": model.name_or_path, "base_sha256": hash_of_weights(model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        digest = written_folder(
            target, lambda path: made.save_pretrained(path, save_embedding_layers=False), facts, found
        )
    served = found if isinstance(found, dict) else {}
    return Adapter(target, f"{target.name}-{digest[:8]}", rank, MappingProxyType(served), "" if served else str(found))


def _ablates(operator: object) -> bool:
    """Return True for ablation, False for addition. Raises ValueError for other operators."""
    if operator is None or operator == addition_operator():
        return False
    if operator == ablation_operator():
        return True
    raise ValueError(
        f"an adapter can do addition_operator() and ablation_operator(), got {operator!r}: steer with vector.apply"
    )


def _peft() -> Any:
    try:
        import peft

        peft.BeftConfig  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise ImportError("to_adapter needs peft 0.21 or newer: pip install 'steering-vectors[adapters]'") from error
    return peft


def _adding(vector: Any, model: PreTrainedModel, multiplier: float, peft: Any) -> tuple[Any, list[str], dict[str, Any]]:
    """Return the model with an adapter that adds, the names of the adapted modules, and facts on the adapter."""
    if isinstance(vector, Tensor):
        raise TypeError(
            "vector_or_direction must be a SteeringVector, whose directions have layers, got Tensor: for an ablation "
            "everywhere, pass operator=ablation_operator()"
        )
    check_addable(vector, "written into an adapter")
    copied = wide_copy(model)
    expected = logits_of(copied, vector.apply(copied, multiplier=multiplier))
    linears = last_linears(copied, vector.layers)
    names = {layer: name for layer, (name, _) in linears.items()}
    adapted = _adapted(peft, copied, peft.BeftConfig(target_modules=[*names.values()], task_type=_task_of(model)))
    for layer, (name, factor) in linears.items():
        bias = adapted.base_model.model.get_submodule(name).beft_bias["default"]
        direction = vector.layer_activations[layer].detach().reshape(1, -1).to(bias.device, torch.float64)
        _fill(bias, direction * (multiplier / factor))
    check_equal(_logits(adapted), expected, "the adapted model")
    return adapted, [*names.values()], {"operation": "add", "layers": sorted(linears)}


def _ablating(
    direction: Any, model: PreTrainedModel, strength: float, peft: Any
) -> tuple[Any, list[str], dict[str, Any]]:
    """Return the model with an adapter that ablates, the names of the adapted modules, and facts on the adapter."""
    if not isinstance(direction, (Tensor, SteeringVector)):
        raise TypeError(
            f"vector_or_direction must be a tensor (hidden,) or (k, hidden), or a vector of one layer, got "
            f"{type(direction).__name__}"
        )
    copied = wide_copy(model)
    expected = logits_of(copied, ablate_everywhere(copied, direction, strength=strength))
    units = unit_rows_of(direction)
    places = watched_places(copied)
    axes = writing_weights(copied, places)
    check_complete(copied, places, axes, units)
    factors = factors_of(copied, axes, units, strength)
    parameters = [name for name, factor in factors.items() if factor.of_experts]
    modules = [name.rpartition(".")[0] for name, factor in factors.items() if not factor.of_experts]
    config = peft.LoraConfig(
        r=len(units),
        lora_alpha=len(units),
        target_modules=_shortened(modules, (name for name, _ in copied.named_modules())),
        target_parameters=_shortened(parameters, (name for name, _ in copied.named_parameters()), parts=2) or None,
        fan_in_fan_out=any(factor.is_transposed for factor in factors.values()),
        task_type=_task_of(model),
    )
    adapted = _adapted(peft, copied, config)
    for name, factor in factors.items():
        layer = adapted.base_model.model.get_submodule(name.rpartition(".")[0])
        if isinstance(getattr(layer, "base_layer", None), nn.Embedding):
            _fill(layer.lora_embedding_A["default"], factor.a)
            _fill(layer.lora_embedding_B["default"], factor.b)
        else:
            _fill(layer.lora_A["default"].weight, factor.a)
            _fill(layer.lora_B["default"].weight, factor.b)
    check_equal(_logits(adapted), expected, "the adapted model")
    return adapted, [*modules, *parameters], {"operation": "ablate everywhere", "rank": len(units)}


def _task_of(model: PreTrainedModel) -> str | None:
    """Return PEFT's name for a model that generates, and None for one without a language head."""
    return "CAUSAL_LM" if model.can_generate() else None


def _adapted(peft: Any, model: PreTrainedModel, config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on tied weights and biases, which stay as they are
        try:
            return peft.get_peft_model(model, config).eval()
        except (ValueError, NotImplementedError) as error:
            raise ValueError(
                f"PEFT has no such adapters for {type(model).__name__}: merge into the weights instead, or steer with "
                f"vector.apply or ablate_everywhere. PEFT says: {error}"
            ) from error


def _shortened(names: list[str], all_names: Iterable[str], parts: int = 1) -> list[str]:
    """Return the ends of the names, of so many parts, if no other names end so; else the names as they are."""

    def end(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    ends = {end(name) for name in names}
    return sorted(ends) if {name for name in all_names if end(name) in ends} == {*names} else names


def _logits(adapted: Any) -> Tensor:
    """Return what the adapted model computes for a few tokens. Raises ValueError if it can't be run."""
    try:
        return logits_of(adapted)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"PEFT's adapters don't fit {type(adapted.base_model.model).__name__}, which can't be run with one: {error}"
        ) from error


@torch.no_grad()
def _fill(weight: nn.Parameter, values: Tensor) -> None:
    if weight.shape != values.shape:
        raise ValueError(f"PEFT expects a weight {tuple(weight.shape)} where {tuple(values.shape)} was computed")
    weight.copy_(values)
