"""Plain copies of models, and the comparison of what two models compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import reduce, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steering_vectors._precision import autocast_devices
from steering_vectors.layer_matching import collect_matching_layers, guess_and_enhance_layer_config

__all__ = [
    "block_names",
    "check_equal",
    "check_is_model",
    "check_mergeable",
    "check_text_alone",
    "in_whole_float32",
    "logits_of",
    "pass_inputs",
    "restore_dtypes",
    "wide_copy",
    "wide_dtype",
]

P = ParamSpec("P")
T = TypeVar("T")

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The packages whose hooks place and run modules, and change nothing that these compute.
_RUNNERS = ("torch", "transformers", "accelerate", "kernels")
# By dtype, the largest difference of logits, as a share of the largest logit.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}


def in_whole_float32(function: Callable[P, T]) -> Callable[P, T]:
    """Return ``function`` wrapped to compute in float32 as such, outside ``torch.autocast`` and without TF32."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for device in autocast_devices():
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(_without_tf32())
            return function(*args, **kwargs)

    return run


@contextmanager
def _without_tf32() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    kept = {backend: backend.fp32_precision for backend in backends if hasattr(backend, "fp32_precision")}
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by backend, which PyTorch has from 2.9 on
        precision = None
    try:
        if precision is not None:
            torch.set_float32_matmul_precision("highest")
        else:
            for backend in kept:
                backend.fp32_precision = "ieee"
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, allowed in kept.items():
            backend.fp32_precision = allowed


def check_is_model(model: object) -> None:
    """Raise TypeError unless it is a model of transformers, with advice where one is inside."""
    if not isinstance(model, PreTrainedModel):
        advice = ""
        if hasattr(model, "merge_and_unload"):
            advice = ": merge the adapter first, with model.merge_and_unload()"
        elif isinstance(model, nn.Module) and any(isinstance(part, PreTrainedModel) for part in model.children()):
            advice = ": pass the model inside this wrapper"
        raise TypeError(f"model must be a Hugging Face model (PreTrainedModel), got {type(model).__name__}{advice}")


def check_mergeable(model: PreTrainedModel) -> None:
    """Raise TypeError unless it is a model of transformers, ValueError unless its weights can be copied and changed."""
    check_is_model(model)
    from steering_vectors import active_patches  # the package itself, which is not there yet when this is imported

    if active_patches(model):
        raise ValueError("the model is being steered: leave that block, or remove that patch, and call this again")
    if any(type(part).__module__.startswith("peft.") for part in model.modules()):
        raise ValueError(
            f"the {type(model).__name__} has layers of a PEFT adapter: merge them first, with "
            f"PeftModel.merge_and_unload(), or load the model without the adapter"
        )
    _check_without_hooks(model)
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


def _check_without_hooks(model: nn.Module) -> None:
    """Raise ValueError if a module has forward hooks, except those by which PyTorch and transformers work."""
    for name, module in model.named_modules():
        for hook in _hooks_of(module):
            maker = getattr(hook, "__module__", None) or type(hook).__module__
            if maker.partition(".")[0] not in _RUNNERS:
                called = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise ValueError(
                    f"{name or 'the model'} has a forward hook, {called} of {maker}, which weights can't hold: remove "
                    f"the hook, or leave the block that has set it, and call this again"
                )


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield the forward hooks of a module, and what replaces its ``forward``, such as the hooks of accelerate."""
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()
    if "forward" in vars(module):
        replacement = vars(module).get("_hf_hook", module.forward)
        yield from getattr(replacement, "hooks", [replacement])


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


def wide_copy(model: PreTrainedModel) -> Any:
    """Return a copy of the model with plain weights in float32 or wider, in evaluation mode.

    Rounding to half precision would hide small differences between two models. Flash attention, which needs half
    precision, is replaced. A model out of a GGUF file has plain weights, though its config names a quantization; the
    copy's doesn't.
    """
    copied: Any = copy.deepcopy(model)
    copied.eval()
    if getattr(copied.config, "quantization_config", None) is not None:
        del copied.config.quantization_config
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(copied).pop(name, None)
    tensors = [*copied.parameters(), *(buffer for buffer in copied.buffers() if buffer.is_floating_point())]
    wide = reduce(torch.promote_types, {tensor.dtype for tensor in tensors}, torch.float32)
    for tensor in tensors:
        tensor.grad = None
        tensor.data = tensor.data.to(wide)
    if "flash" in str(getattr(copied.config, "_attn_implementation", None)):
        copied.config._attn_implementation = "eager"
    return copied


def restore_dtypes(made: Any, model: PreTrainedModel) -> None:
    """Round what was made of a wide copy to the dtypes of the model's weights, in place.

    A new bias has the dtype of its layer's weight. Raises ValueError if a number is too large.
    """
    given = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, weight in made.named_parameters():
        like = given.get(name, given.get(f"{name.rpartition('.')[0]}.weight"))
        rounded = weight.data.to(model.dtype if like is None else like.dtype)
        if bool(weight.isfinite().all()) and not bool(rounded.isfinite().all()):
            raise ValueError(
                f"with this vector, {name} has numbers too large for the model's {rounded.dtype}: choose a smaller "
                f"multiplier, or load the model in bfloat16 or float32"
            )
        weight.data = rounded
    for name, buffer in made.named_buffers():
        if name in given:
            buffer.data = buffer.data.to(given[name].dtype)
    made.config._attn_implementation = getattr(model.config, "_attn_implementation", None)


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
    return output.logits if hasattr(output, "logits") else output.last_hidden_state  # type: ignore[no-any-return]


def check_equal(got: Tensor, expected: Tensor, what: str) -> None:
    """Raise ValueError unless the logits of two models in float32 or wider agree up to rounding."""
    share = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not share <= _TOLERANCES.get(expected.dtype, 1e-4):
        raise ValueError(
            f"{what} would compute something else than the steered model: on a few tokens, logits differ by "
            f"{share:.2g} of the largest one, so nothing was made"
        )
