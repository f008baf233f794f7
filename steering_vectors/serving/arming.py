"""vLLM's workers: decoder blocks that add a row to each token, and the rows of each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steering_vectors.serving.admitting import CONFIG
from steering_vectors.serving.bank import Bank
from steering_vectors.serving.binding import Bound
from steering_vectors.serving.patching import patch
from steering_vectors.serving.settings import Settings
from steering_vectors.serving.store import read_vector

__all__ = ["SteeringWorker", "install"]


def install() -> None:
    """Change the methods of vLLM by which a worker loads its model and prepares a step."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    patch(GPUModelRunner, "load_model", "self load_dummy_weights model", _loaded)
    patch(CPUModelRunner, "load_model", "self load_dummy_weights", _loaded)
    patch(GPUModelRunner, "_prepare_inputs", "self scheduler_output num_scheduled_tokens", _prepared)


class SteeringWorker:
    """Methods that vLLM adds to its workers, for the server to call."""

    model_runner: Any

    def load_steering_vector(self, name: str, key: str) -> str | None:
        """Load a vector of the folder, whose hash must be ``key``, and return the reason if that fails.

        It raises nothing: vLLM would take the other workers' answers for those to its next call.
        """
        try:
            self.model_runner.steering.load(name, key)
        except Exception as error:
            return str(error)
        return None

    def unload_steering_vector(self, key: str) -> None:
        """Forget the vector with this hash."""
        self.model_runner.steering.bank.unload(key)


class _Steering:
    """The tables of one worker, and the row of each token of a step."""

    def __init__(self, runner: Any, blocks: dict[int, nn.Module]) -> None:
        config, settings = runner.vllm_config, Settings.of_environment()
        prepared = config.additional_config[CONFIG]
        model = config.model_config
        self._fit = {"depth": model.get_total_num_hidden_layers(), "width": model.get_hidden_size()}
        self._folder = settings.folder
        self.bank = Bank(
            [layer for layer in prepared["layers"] if layer in blocks],
            model.get_hidden_size(),
            capacity=prepared["capacity"],
            requests=runner.max_num_reqs,
            dtype=model.dtype,
            device=runner.device,
        )
        for name, key in prepared.hashes.items():
            self.load(name, key)
        self._row_of_token = runner._make_buffer(runner.max_num_tokens, dtype=torch.int64)
        self._row_of_token.np[:] = 0
        self._row_of_token.copy_to_gpu()
        self._steered = False
        for layer in self.bank.layers:
            _arm(blocks[layer], self.bank.rows(layer), self._row_of_token.gpu)

    def load(self, name: str, key: str) -> None:
        vector = read_vector(self._folder, name, **self._fit)
        if vector.hash != key:
            raise ValueError(
                f"the file of the vector {name!r} changed after it was checked: load it, or start the server, again"
            )
        self.bank.load(key, vector.directions)

    def prepare(self, runner: Any, scheduled: np.ndarray[Any, Any]) -> None:
        """Give each token of a step the row of its request, from the request's first steered token on."""
        batch, count = runner.input_batch, runner.input_batch.num_reqs
        requests = [runner.requests[name] for name in batch.req_ids[:count]]
        bound = [Bound.of(request.sampling_params and request.sampling_params.extra_args) for request in requests]
        if not any(bound) and not self._steered:
            return
        self._steered = any(bound)
        rows = self.bank.assign([steering.multipliers if steering else () for steering in bound])
        of_token = self._row_of_token.np
        of_token[:] = 0
        end = 0
        for i, (steering, row) in enumerate(zip(bound, rows, strict=True)):
            begin, end = end, end + int(scheduled[i])
            if steering:
                first = steering.start(requests[i].num_prompt_tokens) - int(batch.num_computed_tokens_cpu[i])
                of_token[min(begin + max(first, 0), end) : end] = row
        self._row_of_token.copy_to_gpu()


def _loaded(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *arguments: Any, **named: Any) -> Any:
        result = original(self, *arguments, **named)
        if CONFIG not in self.vllm_config.additional_config:
            raise RuntimeError("the engine was configured without steering vectors: make its config by EngineArgs")
        # Before the first pass, which compiles the model.
        self.steering = _Steering(self, _blocks(self.get_model(), self.model_config.get_total_num_hidden_layers()))
        return result

    return load_model


def _prepared(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray[Any, Any]) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens)
        self.steering.prepare(self, num_scheduled_tokens)
        return result

    return prepare_inputs


def _blocks(model: Any, depth: int) -> dict[int, nn.Module]:
    """Return the model's decoder blocks by number: in a pipeline, those of this process."""
    from vllm.model_executor.models.interfaces import supports_multimodal
    from vllm.model_executor.models.utils import PPMissingLayer

    # Where there is a tower for images, it may be as deep.
    language = model.get_language_model() if supports_multimodal(model) else model
    lists = [module for module in language.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise RuntimeError(
            f"steering vectors can't be served: {type(model).__name__} has {len(lists)} lists of {depth} modules, and "
            f"so its decoder blocks aren't known"
        )
    return {layer: block for layer, block in enumerate(lists[0]) if not isinstance(block, PPMissingLayer)}


def _arm(block: nn.Module, rows: Tensor, row_of_token: Tensor) -> None:
    # Buffers, so that a compiled graph reads them anew in each step.
    block.register_buffer("_steering_rows", rows, persistent=False)
    block.register_buffer("_steering_row_of_token", row_of_token, persistent=False)
    block.__class__ = _steered(type(block))  # type: ignore[arg-type]


@cache
def _steered(block_class: Any) -> type[nn.Module]:
    """Return the class of blocks that add the row of each token to their output."""

    class Steered(block_class):  # type: ignore[misc]
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = block_class.forward(self, *arguments, **named)
            # Where a block returns its output and the residual stream apart, the next one adds them up.
            hidden, *rest = output if isinstance(output, tuple) else (output,)
            rows = self._steering_row_of_token[: hidden.shape[-2]]
            hidden = hidden + self._steering_rows.index_select(0, rows)  # (…, tokens, hidden)
            return (hidden, *rest) if isinstance(output, tuple) else hidden

    Steered.__name__ = Steered.__qualname__ = f"Steered{block_class.__name__}"
    return Steered
