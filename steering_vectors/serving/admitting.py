"""Checks of the engine's settings and of each request, and the keys that keep cached tokens apart."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import ref

import torch

from steering_vectors.serving.binding import Bound, Catalog
from steering_vectors.serving.patching import check_version, patch
from steering_vectors.serving.settings import Settings
from steering_vectors.serving.spec import KEY
from steering_vectors.serving.store import read_folder

__all__ = ["ADMITTED", "CONFIG", "Prepared", "catalog", "install"]

# The entry of vLLM's additional_config by which workers know what to prepare.
CONFIG = "steering_vectors"
# Architectures on which steering was compared with Hugging Face: make test-vllm.
_TRIED = {
    *("GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GraniteForCausalLM"),
    *("LlamaForCausalLM", "MistralForCausalLM", "OPTForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Idefics3ForConditionalGeneration"),
}
# The texts of the steering that was admitted for an answer over HTTP.
ADMITTED: ContextVar[list[str] | None] = ContextVar("admitted", default=None)
_logger = logging.getLogger("vllm.steering_vectors")
# Those of the engines that begin in this process, each with a reference to its model's config; the newest first.
_catalogs: list[tuple[ref[Any], Catalog]] = []
os.register_at_fork(after_in_child=_catalogs.clear)


class Prepared(dict[str, Any]):
    """The layers and the capacity, which are part of the key of compiled graphs, and hashes by name, which are not."""

    def __init__(self, layers: Sequence[int], capacity: int, hashes: Mapping[str, str]) -> None:
        super().__init__(layers=list(layers), capacity=capacity)
        self.hashes = dict(hashes)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make it again in another process."""
        return Prepared, (self["layers"], self["capacity"], self.hashes)


def catalog(model_config: Any) -> Catalog:
    """Return the vectors that the engine of a model serves by name."""
    for model, served in _catalogs:
        if model() is model_config:
            return served
    raise RuntimeError("this engine was configured without steering vectors: make its config by EngineArgs")


def install() -> None:
    """Change the methods of vLLM by which it configures itself, admits requests, and hashes cached blocks.

    Raises RuntimeError for a version of vLLM for which this wasn't proven.
    """
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core import block_pool, kv_cache_utils

    from steering_vectors.serving import arming

    check_version(vllm.__version__)
    patch(EngineArgs, "create_engine_config", "self usage_context headless", _configured)
    patch(SamplingParams, "_verify_args", "self", _made)
    verified = "self model_config speculative_config structured_outputs_config tokenizer"
    patch(SamplingParams, "verify", verified, _sent)
    for module in (kv_cache_utils, block_pool):
        hashed = "request start_token_idx end_token_idx start_mm_idx"
        patch(module, "generate_block_hash_extra_keys", hashed, _keyed)
    arming.install()


def _made(original: Callable[..., Any]) -> Callable[..., Any]:
    def verify_arguments(self: Any) -> None:
        original(self)
        # Its engine is not known yet.
        _admit(self, [served for _, served in _catalogs])

    return verify_arguments


def _sent(original: Callable[..., Any]) -> Callable[..., Any]:
    def verify(self: Any, model_config: Any, *arguments: Any, **named: Any) -> None:
        original(self, model_config, *arguments, **named)
        # In other processes than the one where the engine begins, requests have been admitted already.
        if _catalogs and KEY in (self.extra_args or {}):
            _admit(self, [catalog(model_config)])

    return verify


def _admit(parameters: Any, catalogs: Sequence[Catalog]) -> None:
    """Admit a request to the first of the catalogs that has its vectors, unless one has admitted it already."""
    asked = parameters.extra_args
    if not asked or KEY not in asked or any(served.has_admitted(asked) for served in catalogs):
        return
    refusals = []
    for served in catalogs:
        try:
            parameters.extra_args = served.admit(asked)
        except ValueError as error:
            refusals.append(error)
            continue
        if (admitted := ADMITTED.get()) is not None:
            admitted.append(asked[KEY])
        return
    if refusals:
        raise refusals[0]


def _keyed(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> Any:
        keys, next_index = original(request, start_token_idx, end_token_idx, start_mm_idx)
        bound = Bound.of(request.sampling_params and request.sampling_params.extra_args)
        key = bound and bound.block_key(request.num_prompt_tokens, start_token_idx, end_token_idx)
        return ((*(keys or ()), key) if key else keys), next_index

    return generate_keys


def _configured(original: Callable[..., Any]) -> Callable[..., Any]:
    def create(self: Any, *arguments: Any, **named: Any) -> Any:
        config = original(self, *arguments, **named)
        _prepare(config, Settings.of_environment())
        return config

    return create


def _prepare(config: Any, settings: Settings) -> None:
    """Check that what is configured can be steered exactly, and tell the workers what to prepare."""
    if reason := _obstacle(config, settings):
        raise ValueError(f"steering vectors can't be served: {reason}")
    depth = config.model_config.get_total_num_hidden_layers()
    vectors = read_folder(settings.folder, depth=depth, width=config.model_config.get_hidden_size())
    if len(vectors) > settings.capacity:
        raise ValueError(
            f"{settings.folder} has {len(vectors)} vectors, and the table of directions holds {settings.capacity}: set "
            f"STEERING_VECTORS_CAPACITY={len(vectors)}"
        )
    # A vector that is loaded later may have any layer.
    named = {layer for vector in vectors.values() for layer in vector.directions}
    layers = list(range(depth)) if settings.loading else sorted(named)
    config.additional_config = {
        **config.additional_config,
        CONFIG: Prepared(layers, settings.capacity, {vector.name: vector.hash for vector in vectors.values()}),
    }
    config.parallel_config.worker_extension_cls = "steering_vectors.serving.arming.SteeringWorker"
    _refuse_beams()
    largest = torch.finfo(config.model_config.dtype).max
    served = Catalog(vectors.values(), layers=layers, capacity=settings.capacity, largest=largest)
    _catalogs[:] = [(ref(config.model_config), served), *((model, one) for model, one in _catalogs if model())]
    shown = ", ".join(f"{name} (layers {sorted(vector.directions)})" for name, vector in vectors.items()) or "none"
    _logger.info(
        "Steering vectors served: %s. The table of directions holds %d vectors; %s.",
        shown,
        settings.capacity,
        "others may be loaded" if settings.loading else "loading is off",
    )


def _refuse_beams() -> None:
    """Let requests fail whose parameters for beam search would leave out their steering."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    def unsteered(original: Callable[..., Any]) -> Callable[..., Any]:
        def make(self: Any, *arguments: Any, **named: Any) -> Any:
            if KEY in (self.vllm_xargs or {}):
                raise ValueError("beam search can't be steered: leave out use_beam_search")
            return original(self, *arguments, **named)

        return make

    for request in (CompletionRequest, ChatCompletionRequest):
        patch(request, "to_beam_search_params", "self max_tokens default_sampling_params", unsteered)


def _obstacle(config: Any, settings: Settings) -> str | None:
    """Return why steering could not be exact under these settings, and the way out."""
    model, parallel = config.model_config, config.parallel_config
    extension = parallel.worker_extension_cls
    obstacles = {
        "Model Runner V2 is not supported yet: set VLLM_USE_V2_MODEL_RUNNER=0": config.use_v2_model_runner,
        f"the architecture {model.architecture} was not tried; those tried are {', '.join(sorted(_TRIED))}. Set "
        "STEERING_VECTORS_UNTRIED_MODELS=1 to serve it all the same": (
            model.architecture not in _TRIED and not settings.untried_models
        ),
        "the model does not generate text": model.runner_type != "generate" or model.is_encoder_decoder,
        "micro-batches show a layer only a part of a step's tokens: leave out --enable-dbo": parallel.use_ubatching,
        "prefill context parallel shows a layer only a part of a step's tokens: use "
        "--prefill-context-parallel-size 1": parallel.prefill_context_parallel_size > 1,
        "--kv-sharing-fast-prefill shows layers other tokens: leave it out": (
            config.cache_config.kv_sharing_fast_prefill
        ),
        "sequence parallelism of experts splits the tokens among processes: leave out --enable-expert-parallel": (
            parallel.use_sequence_parallel_moe
        ),
        "a connector of KV caches may hand steered tokens to other requests: leave out --kv-transfer-config and "
        "--kv-offloading-size": config.kv_transfer_config is not None,
        "sleep mode discards the tables of directions: leave out --enable-sleep-mode": model.enable_sleep_mode,
        f"the worker extension {extension!r} takes the place of the plugin's: leave out --worker-extension-cls": (
            extension not in ("", "steering_vectors.serving.arming.SteeringWorker")
        ),
        "loading needs one server process and one engine, which alone know all requests: use --api-server-count 1 "
        "and --data-parallel-size 1, or leave out STEERING_VECTORS_LOADING": settings.loading
        and (parallel._api_process_count > 1 or parallel.data_parallel_size > 1),
    }
    return next((reason for reason, applies in obstacles.items() if applies), None)
