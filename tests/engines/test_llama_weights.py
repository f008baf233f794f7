"""llama.cpp runs adapters and merged models as Hugging Face runs the steered ones, after its own converters."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steering_vectors import SteeringVector, ablate_everywhere, ablation_operator
from steering_vectors.merging import merge, merge_ablation, to_adapter
from tests.engines.llama_converters import convert_adapter, convert_model
from tests.engines.llama_engine import Engine
from tests.merging.fresh import lively, logits

IDS = [11, 12, 13, 14, 300, 5]
AGREEMENT = 1e-3
WIDTH = 64
ROWS: list[str] = []
DIRECTIONS = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))


def made(name: str, **settings: Any) -> Any:
    settings = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1, **settings}
    return lively(name, **settings)


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {}),
    "llama": ("llama", {}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Print the cases, once all have run."""
    ROWS[:] = [f"{'case':<52}{'agreement':>12}{'effect':>10}"]
    yield
    print("\n\n" + "\n".join(ROWS))


def of(model: Any, ids: list[int] = IDS) -> Tensor:
    return logits(model, torch.tensor([ids]))[0]


def ablated(model: Any, directions: Tensor) -> Tensor:
    with ablate_everywhere(model, directions):
        return of(model)


def check(case: str, found: Tensor, expected: Tensor, unsteered: Tensor) -> None:
    agreement, effect = float((found - expected).abs().max()), float((expected - unsteered).abs().max())
    ROWS.append(f"{case:<52}{agreement:>12.1e}{effect:>10.2f}")
    assert agreement < AGREEMENT
    assert effect > 0.5


class Base:
    """A model of Hugging Face, saved, and the same in llama.cpp."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.model.save_pretrained(folder / "base")
        self.engine = Engine(convert_model(folder / "base", folder / "base.gguf"))

    def adapter(self, directions: Tensor, multiplier: float = 1.0) -> Path:
        operator = ablation_operator()
        return to_adapter(
            directions, self.model, self.folder / "adapter", operator=operator, multiplier=multiplier
        ).folder

    def converted(self, adapter: Path) -> Path:
        return convert_adapter(adapter, self.folder / "base", self.folder / "adapter.gguf")


@pytest.mark.parametrize("name", MODELS)
def test_an_ablation_s_adapter(tmp_path: Path, name: str) -> None:
    architecture, settings = MODELS[name]
    base = Base(made(architecture, **settings), tmp_path)
    unsteered = of(base.model)
    assert (base.engine.logits(IDS) - unsteered).abs().max() < AGREEMENT
    for count in (1, 2):
        base.engine.adapt(base.converted(base.adapter(DIRECTIONS[:count])))
        expected = ablated(base.model, DIRECTIONS[:count])
        check(f"{name}, adapter of rank {count}", base.engine.logits(IDS), expected, unsteered)


def test_a_strength_is_that_of_the_adapter_times_that_of_the_option(tmp_path: Path) -> None:
    base = Base(made("llama"), tmp_path)
    base.engine.adapt(base.converted(base.adapter(DIRECTIONS[0], 2.0)), scale=0.35)
    with ablate_everywhere(base.model, DIRECTIONS[0], strength=0.7):
        expected = of(base.model)
    check("llama, adapter of strength 2, FILE:0.35", base.engine.logits(IDS), expected, of(base.model))


def test_without_the_embedding_an_ablation_is_wrong(tmp_path: Path) -> None:
    base = Base(made("llama"), tmp_path)
    adapter = base.adapter(DIRECTIONS[0])
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "embedding" not in name}
    save_file(kept, adapter / "adapter_model.safetensors", {"format": "pt"})
    base.engine.adapt(base.converted(adapter))
    assert (base.engine.logits(IDS) - ablated(base.model, DIRECTIONS[0])).abs().max() > 100 * AGREEMENT


_RUN = """
import json, sys
from pathlib import Path
from tests.engines.llama_engine import Engine
engine = Engine(Path(sys.argv[1]))
print("loaded", flush=True)
engine.adapt(Path(sys.argv[2]))
engine.logits(json.loads(sys.argv[3]))
print("ran")
"""


def test_llama_cpp_aborts_with_tied_embeddings_and_runs_with_a_head_of_their_own(tmp_path: Path) -> None:
    base = Base(made("llama", tie_word_embeddings=True), tmp_path)
    expected, unsteered = ablated(base.model, DIRECTIONS[0]), of(base.model)
    adapter = base.adapter(DIRECTIONS[0])
    command = [sys.executable, "-c", _RUN, str(tmp_path / "base.gguf"), str(base.converted(adapter)), json.dumps(IDS)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["loaded"]
    assert run.returncode != 0
    assert "GGML_ASSERT(ggml_can_mul_mat(a, b)) failed" in run.stderr

    untied = base.model
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings, untied.all_tied_weights_keys = False, {}
    again = Base(untied, tmp_path / "untied")
    again.engine.adapt(again.converted(adapter))
    check("llama with its head untied, adapter of rank 1", again.engine.logits(IDS), expected, unsteered)


@pytest.mark.parametrize(
    ("name", "operator", "message"),
    [("llama", None, "KeyError: 'lora_alpha'"), ("mixtral", ablation_operator(), "Can not map tensor")],
)
def test_its_converter_refuses_additions_and_experts(tmp_path: Path, name: str, operator: Any, message: str) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "base")
    adapter = to_adapter(SteeringVector({1: DIRECTIONS[0]}), model, tmp_path / "adapter", operator=operator)
    with pytest.raises(ValueError, match=message):
        convert_adapter(adapter.folder, tmp_path / "base", tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "granite"])
def test_a_merged_vector(tmp_path: Path, name: str) -> None:
    architecture, settings = MODELS[name]
    model = made(architecture, **settings)
    vector = SteeringVector({0: DIRECTIONS[0], 2: DIRECTIONS[1]})
    with vector.apply(model, multiplier=1.5):
        expected = of(model)
    merge(vector, model, multiplier=1.5).save_pretrained(tmp_path / "merged")
    engine = Engine(convert_model(tmp_path / "merged", tmp_path / "merged.gguf"))
    check(f"{name}, merged at layers 0 and 2", engine.logits(IDS), expected, of(model))


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_ablation(tmp_path: Path, tied: bool) -> None:
    model = made("llama", tie_word_embeddings=tied)
    merge_ablation(model, DIRECTIONS).save_pretrained(tmp_path / "merged")
    engine = Engine(convert_model(tmp_path / "merged", tmp_path / "merged.gguf"))
    case = f"llama{', tied' if tied else ''}, merged ablation of rank 2"
    check(case, engine.logits(IDS), ablated(model, DIRECTIONS), of(model))


def test_gemma_s_head_is_lost_as_the_page_says(tmp_path: Path) -> None:
    """llama.cpp's converter drops it without a word, and the changed embeddings become the head."""
    model = made("gemma")
    merge_ablation(model, DIRECTIONS).save_pretrained(tmp_path / "merged")
    engine = Engine(convert_model(tmp_path / "merged", tmp_path / "merged.gguf"))
    assert (engine.logits(IDS) - ablated(model, DIRECTIONS)).abs().max() > 50 * AGREEMENT


def test_smollm2_merged_at_layer_0_which_a_control_vector_can_not_steer(smollm2: Any, tmp_path: Path) -> None:
    model = smollm2[0]
    ids = [504, 3575, 282, 4649, 314, 253, 1123]
    vector = SteeringVector({0: torch.randn(576, generator=torch.Generator().manual_seed(0))})
    with vector.apply(model):
        expected = of(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merge(vector, model).save_pretrained(tmp_path / "merged")
    path = convert_model(tmp_path / "merged", tmp_path / "merged.gguf")
    check("SmolLM2, merged at layer 0", Engine(path).logits(ids), expected, of(model, ids))
