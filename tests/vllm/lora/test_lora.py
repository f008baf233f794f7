"""Stock vLLM, without any plugin, serves a base and its ablations side by side, as Hugging Face computes them.

``make test-vllm-lora`` runs this in an environment of its own.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steering_vectors import ablate_everywhere, ablation_operator
from steering_vectors.merging import Adapter, to_adapter
from steering_vectors.merging.in_vllm import PROVEN, PROVEN_BY_TRANSFORMERS
from tests.merging.fresh import lively
from tests.vllm.lora.sizes import GROUPED, WITH_HEAD_SIZES

pytest.importorskip("vllm")

ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("arcee", "ernie4_5", "helium", "llama", "nemotron", "qwen3", "seed_oss"), WITH_HEAD_SIZES),
    **dict.fromkeys(("granite", "phi3", "qwen2", "smollm3", "stablelm"), GROUPED),
    **dict.fromkeys(("cohere", "cohere2"), {**GROUPED, "logit_scale": 1.0}),
    "mistral": {**WITH_HEAD_SIZES, "sliding_window": None},
}
PROMPTS = [[11, 12, 13, 14, 15, 16], [21, 22, 300, 24]]


def directions(width: int) -> Tensor:
    return torch.randn(2, width, generator=torch.Generator().manual_seed(7))


def expected_steps(model: Any, removed: Tensor | None, ids: list[int], tokens: list[int]) -> Tensor:
    """The log-probabilities ``(steps, vocabulary)`` at which vLLM's tokens were chosen."""
    inputs = torch.tensor([[*ids, *tokens[:-1]]])
    with torch.no_grad():
        if removed is None:
            made = model(inputs, use_cache=False).logits
        else:
            with ablate_everywhere(model, removed):
                made = model(inputs, use_cache=False).logits
    return made[0, len(ids) - 1 :].float().log_softmax(dim=-1)  # type: ignore[no-any-return]


def apart(steps: list[dict[str, float]], expected: Tensor) -> float:
    """The largest difference of log-probability over vLLM's top 20."""
    return max(
        abs(logprob - float(row[int(token)]))
        for row, step in zip(expected, steps, strict=True)
        for token, logprob in step.items()
    )


def served(folder: Path, model: Path, adapters: dict[str, Adapter], engine: dict[str, Any]) -> list[Any]:
    """vLLM's answers to one batch: each prompt to the base and to each adapter, mixed."""
    requests = []
    for ids in PROMPTS:
        requests.append((ids, None))
        requests += [(ids, (one.name, n, str(one.folder))) for n, one in enumerate(adapters.values(), 1)]
    given, made = folder / "given.json", folder / "made.json"
    given.write_text(json.dumps({"model": str(model), "engine": engine, "requests": requests}))
    command = [sys.executable, "-m", "tests.vllm.lora.batch", str(given), str(made)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return json.loads(made.read_text())  # type: ignore[no-any-return]


def models(smollm2: Any, folder: Path, name: str) -> tuple[Any, Path]:
    if name == "smollm2":
        return smollm2[0], Path(smollm2[0].name_or_path)
    model = lively(name, **SETTINGS[name])
    model.save_pretrained(folder / "base")
    return model, folder / "base"


def beside_the_base(
    smollm2: Any, folder: Path, name: str, kept: list[str], **arguments: Any
) -> tuple[dict[str, float], list[float]]:
    """The largest difference by request, in one batch with the base, and the effects of the ablations."""
    model, base = models(smollm2, folder, name)
    rows = directions(model.config.hidden_size)
    removed = {"one": rows[0], "two": rows}
    adapters = {key: to_adapter(removed[key], model, folder / key, operator=ablation_operator()) for key in kept}
    engine = {**adapters[kept[-1]].vllm, "max_loras": len(adapters) + 1, **arguments}
    answers = served(folder, base, adapters, engine)
    found, effects = dict.fromkeys(["base", *kept], 0.0), []
    for answer, (ids, key) in zip(answers, [(ids, key) for ids in PROMPTS for key in found], strict=True):
        expected = expected_steps(model, removed.get(key), ids, answer["tokens"])
        found[key] = max(found[key], apart(answer["steps"], expected))
        if key != "base":
            effects.append(apart(answer["steps"], expected_steps(model, None, ids, answer["tokens"])))
    shown = ", ".join(f"{key} {off:.0e}" for key, off in found.items())
    print(f"\n{name}: off by {shown}; effects from {min(effects):.1f} to {max(effects):.1f}")
    return found, effects


def test_every_family_of_the_tables_is_among_the_cases() -> None:
    assert {*SETTINGS} == PROVEN | PROVEN_BY_TRANSFORMERS
    assert not PROVEN & PROVEN_BY_TRANSFORMERS


@pytest.mark.parametrize("name", [*sorted(PROVEN), "smollm2"])
def test_a_base_and_two_ablations_in_one_batch_are_exact(smollm2: Any, tmp_path: Path, name: str) -> None:
    found, effects = beside_the_base(smollm2, tmp_path, name, ["one", "two"])
    assert max(found.values()) < 5e-4
    assert min(effects) > 0.1


@pytest.mark.parametrize(
    ("name", "kept"), [("qwen2", "one"), *((name, "two") for name in sorted(PROVEN_BY_TRANSFORMERS))]
)
def test_one_ablation_is_exact_through_the_backend_of_transformers(
    smollm2: Any, tmp_path: Path, name: str, kept: str
) -> None:
    found, effects = beside_the_base(smollm2, tmp_path, name, [kept])
    assert max(found.values()) < 5e-4
    assert min(effects) > 0.1


def test_two_ablations_in_one_batch_are_not_exact_there_as_the_page_says(smollm2: Any, tmp_path: Path) -> None:
    """vLLM 0.32 takes all tokens' rows of the embeddings' change from the adapter of the batch's first token."""
    found, _ = beside_the_base(smollm2, tmp_path, "qwen2", ["one", "two"])
    assert found["base"] < 5e-4
    assert max(found.values()) > 0.1


def test_gemma_is_not_exact_there_as_the_page_says(
    smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "gemma", WITH_HEAD_SIZES)
    arguments = {"enable_lora": True, "max_lora_rank": 1, "model_impl": "transformers"}
    found, _ = beside_the_base(smollm2, tmp_path, "gemma", ["one"], **arguments)
    assert found["base"] < 5e-4
    assert found["one"] > 0.1


def test_without_the_embedding_an_ablation_is_wrong(smollm2: Any, tmp_path: Path) -> None:
    model, base = models(smollm2, tmp_path, "llama")
    direction = directions(model.config.hidden_size)[0]
    adapter = to_adapter(direction, model, tmp_path / "lame", operator=ablation_operator())
    path = adapter.folder / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if "embedding" not in name}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    config["target_modules"].remove("embed_tokens")
    (adapter.folder / "adapter_config.json").write_text(json.dumps(config))
    answers = served(tmp_path, base, {"lame": adapter}, dict(adapter.vllm))
    wrong = [
        apart(answers[n]["steps"], expected_steps(model, direction, ids, answers[n]["tokens"]))
        for n, ids in ((1, PROMPTS[0]), (3, PROMPTS[1]))
    ]
    print(f"\nwithout the embedding: off by {max(wrong):.1f}")
    assert min(wrong) > 0.1


@contextmanager
def server(model: Path, options: str, log: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "64", "--enforce-eager"]
    command += ["--served-model-name", "base", *options.split()]
    with log.open("w") as output, subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output) as process:
        try:
            for _ in range(180):
                assert process.poll() is None, log.read_text()[-4000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1/completions"
        finally:
            process.terminate()
            process.wait(30)


def asked(url: str, model: str, ids: list[int]) -> tuple[list[int], list[dict[str, float]]]:
    body = {"model": model, "prompt": ids, "max_tokens": 4, "temperature": 0, "logprobs": 20, "ignore_eos": True}
    body["return_tokens_as_token_ids"] = True
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)["choices"][0]["logprobs"]

    def number(token: str) -> int:
        return int(token.removeprefix("token_id:"))

    steps = [{str(number(token)): logprob for token, logprob in step.items()} for step in found["top_logprobs"]]
    return [number(token) for token in found["tokens"]], steps


def test_the_options_serve_a_base_and_its_ablation_over_http(smollm2: Any, tmp_path: Path) -> None:
    model, base = smollm2[0], Path(smollm2[0].name_or_path)
    direction = directions(model.config.hidden_size)[0]
    adapter = to_adapter(direction, model, tmp_path / "calm", operator=ablation_operator())
    found = {}
    with server(base, adapter.vllm_options, tmp_path / "log") as url:
        for turn in (1, 2):  # the second time from the prefix cache
            for ids in (*PROMPTS, 10 * PROMPTS[0]):  # the last one fills blocks of the cache
                for name, removed in (("base", None), (adapter.name, direction)):
                    tokens, steps = asked(url, name, ids)
                    found[turn, name, len(ids)] = apart(steps, expected_steps(model, removed, ids, tokens))
    print(f"\nover HTTP: off by {max(found.values()):.1e}, {adapter.vllm_options}")
    assert max(found.values()) < 5e-4
