"""Models, vectors and requests for both engines: vLLM with the plugin, and Hugging Face with ``vec.apply``."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering_vectors import SteeringVector
from steering_vectors.serving.spec import parse
from tests import tiny

ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "steering_vectors",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
Request = tuple[list[int], str | None, int]


@dataclass(frozen=True)
class Served:
    """A model in Hugging Face, the same in a folder, and a folder of vectors for it."""

    model: Any
    path: Path
    vectors: Path


def ids(seed: int, length: int, vocabulary: int = tiny.VOCABULARY) -> list[int]:
    """Token ids of a prompt."""
    return torch.randint(5, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[no-any-return]


def prepared(folder: Path, model: Any, path: Path | None = None, *, size: float = 1.0) -> Served:
    """The model and three vectors in ``folder``, of ``size`` times the norm of the activations."""
    if path is None:
        path = folder / "model"
        model.save_pretrained(path)
    text = model.config.get_text_config()
    depth, width = text.num_hidden_layers, text.hidden_size
    with torch.no_grad():
        states = model(torch.tensor([ids(99, 12)]), output_hidden_states=True).hidden_states
    norms = [float(state[0, 1:].norm(dim=-1).median()) for state in states]
    chance = torch.Generator().manual_seed(5)

    def vector(*layers: int) -> SteeringVector:
        rows = {layer: torch.randn(width, generator=chance) for layer in layers}
        return SteeringVector({layer: size * norms[layer] * row / row.norm() for layer, row in rows.items()})

    made = {"first": vector(0), "middle": vector(depth // 2), "both": vector(depth // 2, depth - 1)}
    (folder / "vectors").mkdir(exist_ok=True)
    for name, one in made.items():
        one.save(folder / "vectors" / f"{name}.safetensors")
    return Served(model, path, folder / "vectors")


@cache
def engines() -> subprocess.Popen[str]:
    """The process that forks one for each engine: to import vLLM takes longer than to run a tiny model."""
    command = [sys.executable, "-m", "tests.vllm.plugin.engine"]
    variables = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("STEERING")}
    process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run(
    served: Served,
    batches: Sequence[Sequence[tuple[Any, str | None, int]]],
    *,
    fault: str | None = None,
    adapter: Path | None = None,
    environment: dict[str, str | None] | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """What vLLM answers to batches, in a process of its own; every second request of a batch has the adapter."""
    folder = served.vectors.parent
    given, made, log = folder / "given.json", folder / "made.json", folder / "log"
    made.unlink(missing_ok=True)
    asked = {"model": str(served.path), "engine": engine, "batches": batches, "adapter": adapter and str(adapter)}
    given.write_text(json.dumps(asked))
    variables = {"STEERING_VECTORS_DIR": str(served.vectors), **(environment or {})}
    job = {"given": str(given), "made": str(made), "log": str(log), "fault": fault, "environment": variables}
    process = engines()
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(job), file=process.stdin, flush=True)
    while not (line := process.stdout.readline()).startswith("status "):
        assert line, "the process that forks has ended"
    if line != "status 0\n":
        raise RuntimeError(f"{line}{log.read_text()[-6000:]}")
    return {**json.loads(made.read_text()), "log": log.read_text()}


def expected(served: Served, request: Request, tokens: list[int], **images: Tensor) -> Tensor:
    """The log-probabilities ``(steps, vocabulary)`` at which Hugging Face, steered by the files, chooses the tokens."""
    prompt, steering, _ = request
    inputs = torch.tensor([[*prompt, *tokens[:-1]]])
    with ExitStack() as stack, torch.no_grad():
        if steering:
            spec = parse(steering)
            selected = None if spec.tokens == "all" else slice(len(prompt) - 1, None)
            for name, multiplier in spec.multipliers:
                vector = SteeringVector.load(served.vectors / f"{name}.safetensors")
                stack.enter_context(vector.apply(served.model, multiplier=multiplier, tokens=selected))
        logits = served.model(inputs, use_cache=False, **images).logits
    return logits[0, len(prompt) - 1 :].float().log_softmax(dim=-1)  # type: ignore[no-any-return]


def apart(steps: list[dict[str, float]], wanted: Tensor) -> float:
    """The largest difference of log-probability over vLLM's top 20."""
    return max(
        abs(logprob - float(row[int(token)]))
        for row, step in zip(wanted, steps, strict=True)
        for token, logprob in step.items()
    )


def compared(served: Served, requests: list[Request], answers: list[Any]) -> tuple[float, float]:
    """The largest difference from Hugging Face among the requests, and the smallest effect of their steering."""
    off, effects = 0.0, [float("inf")]
    for request, answer in zip(requests, answers, strict=True):
        off = max(off, apart(answer["steps"], expected(served, request, answer["tokens"])))
        if request[1]:
            unsteered = (request[0], None, request[2])
            effects.append(apart(answer["steps"], expected(served, unsteered, answer["tokens"])))
    return off, min(effects)
