"""Plain copies of models, and the comparison of what two models compute."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors.layer_matching import collect_matching_layers, guess_and_enhance_layer_config

__all__ = [
    "block_names",
    "check_equal",
    "check_mergeable",
    "check_text_alone",
    "logits_of",
    "pass_inputs",
    "plain_copy",
    "wide_dtype",
]

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The largest difference of logits, as a share of the largest logit.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_mergeable(model: object) -> None:
    """Raise TypeError unless it is a model of transformers, ValueError unless its weights can be copied and changed."""
    if not isinstance(model, PreTrainedModel):
        advice = ""
        if hasattr(model, "merge_and_unload"):
            advice = ": merge the adapter first, with model.merge_and_unload()"
        elif isinstance(model, nn.Module) and any(isinstance(part, PreTrainedModel) for part in model.children()):
            advice = ": pass the model inside this wrapper"
        raise TypeError(f"model must be a Hugging Face model (PreTrainedModel), got {type(model).__name__}{advice}")
    from steering_vectors import active_patches  # the package itself, which is not there yet when this is imported

    if active_patches(model):
        raise ValueError("the model is being steered: leave that block, or remove that patch, and call this again")
    if any(type(part).__module__.startswith("peft.") for part in model.modules()):
        raise ValueError(
            f"the {type(model).__name__} has layers of a PEFT adapter: merge them first, with "
            f"PeftModel.merge_and_unload(), or load the model without the adapter"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder; only decoders can be merged or get an adapter here")
    weights = dict(model.named_parameters())
    if on_meta := [name for name, weight in weights.items() if weight.device.type == "meta"]:
        raise ValueError(
            f"the model's weights aren't loaded: {on_meta[0]} is on the meta device. Load the whole model, without a "
            f"device_map that offloads"
        )
    devices = sorted({str(weight.device) for weight in weights.values()})
    if len(devices) > 1:
        raise ValueError(f"the model is split over the devices {', '.join(devices)}: load it on one, such as the CPU")
    check_plain(model, weights)


def check_text_alone(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that reads images or sounds, which enter the stream past the checked weights."""
    config = model.config  # in old versions of transformers, some are the text's config too
    if config.get_text_config() is not config or hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        raise ValueError(
            f"{type(model).__name__} reads more than text, and an ablation in its weights would leave out what images "
            f"or sounds write to the stream: steer with ablate_everywhere"
        )


def check_plain(model: PreTrainedModel, weights: dict[str, nn.Parameter]) -> None:
    """Raise ValueError if weights are quantized, with the name of one of them."""
    method = _quantization_method(model)
    odd = [name for name, weight in weights.items() if weight.dtype not in _PLAIN or type(weight.data) is not Tensor]
    if method not in (None, "gguf") or odd:
        by = f" by {method}" if method is not None else ""
        example = f", such as {odd[0]}" if odd else ""
        raise ValueError(
            f"the model is quantized{by}, and quantized weights can't be changed exactly{example}: load the model in "
            f"float32 or bfloat16, without quantization_config"
        )


def _quantization_method(model: PreTrainedModel) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


def plain_copy(model: PreTrainedModel) -> Any:
    """Return a copy of the model with plain weights, in evaluation mode; the given one is not changed.

    A model out of a GGUF file has plain weights, though its config names a quantization; the copy's doesn't.
    """
    copied: Any = copy.deepcopy(model)
    copied.eval()
    if getattr(copied.config, "quantization_config", None) is not None:
        del copied.config.quantization_config
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(copied).pop(name, None)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the decoder's blocks, in order."""
    return collect_matching_layers(model, guess_and_enhance_layer_config(model)["decoder_block"])


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which weights are computed: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def pass_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Return the inputs of a pass over a few token ids ``(2, 12)``, spread over the vocabulary and always the same."""
    embeddings: Any = model.get_input_embeddings()
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(embeddings.weight.shape[0], (2, 12), generator=generator, device="cpu")
    return {"input_ids": ids.to(embeddings.weight.device), "use_cache": False}


@torch.no_grad()
def logits_of(model: Any, within: AbstractContextManager[Any] | None = None) -> Tensor:
    """Return what the model computes for those tokens: logits, or the last hidden state if it has no head."""
    with nullcontext() if within is None else within:
        output = model(**pass_inputs(model))
    made = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return made.to(wide_dtype(made))  # type: ignore[no-any-return]


def check_equal(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise ValueError unless the logits agree up to the rounding of the model's dtype.

    In half precision, the rounding may send single tokens to other experts; most tokens must agree there.
    """
    apart = (got - expected).abs().amax(dim=-1).flatten()
    apart = apart.median() if dtype in (torch.float16, torch.bfloat16) else apart.max()
    share = float(apart / expected.abs().max().clamp(min=1e-30))
    if not share <= _TOLERANCES.get(dtype, 1e-4):
        raise ValueError(
            f"{what} would compute something else than the steered model: on a few tokens, logits differ by "
            f"{share:.2g} of the largest one, so nothing was made"
        )
