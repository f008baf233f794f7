"""Quantized weights, bitsandbytes' four bits and torchao's int8: the stream is in another dtype. And a quantized cache."""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from steering_vectors import SteeringVector, generated, record_activations
from steering_vectors.merging import merge, merge_ablation, to_adapter
from tests import tiny
from tests.pages.test_docs import ON_QUANTIZED, run_page
from tests.wrapped.promises import INPUTS, LAYER, SELECTIONS, check_steered, check_trained, some_vector

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*script_method.*:DeprecationWarning",  # torch's own, when bitsandbytes is imported
    ),
    pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="today's bitsandbytes and torchao need transformers 5"),
]

# bitsandbytes' kernel for CPUs takes weights whose height is a multiple of 32 and whose width is one of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def four_bits(compute_dtype: torch.dtype, kind: str) -> Any:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_type=kind
    )


def eight_bits() -> Any:
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def int8_weight_only() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


QUANTIZED: dict[str, Callable[[], Any]] = {
    "bitsandbytes nf4": lambda: four_bits(torch.float32, "nf4"),
    "bitsandbytes fp4 computing in bfloat16": lambda: four_bits(torch.bfloat16, "fp4"),
    "bitsandbytes int8": eight_bits,
    "torchao int8": int8_weight_only,
}


@cache
def quantized(kind: str) -> Any:
    """A tiny Llama as ``from_pretrained`` quantizes it."""
    with TemporaryDirectory() as folder:
        tiny.build("llama", **SIZES).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            Path(folder), quantization_config=QUANTIZED[kind](), device_map="cpu", dtype=torch.float32
        )
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model(**INPUTS)  # bitsandbytes packs the weights for the CPU at the first pass
    return model


@pytest.fixture(params=QUANTIZED)
def model(request: pytest.FixtureRequest) -> Any:
    return quantized(request.param)


def test_the_weights_are_quantized(model: Any) -> None:
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = model.model.layers[LAYER].get_submodule(name)
        assert type(layer) is not torch.nn.Linear or type(layer.weight.data) is not torch.Tensor


def test_nothing_is_merged_into_quantized_weights(model: Any, tmp_path: Path) -> None:
    direction = torch.ones(SIZES["hidden_size"])
    vector = SteeringVector({LAYER: direction})
    calls: list[Callable[[], Any]] = [lambda: merge(vector, model), lambda: merge_ablation(model, direction)]
    if importlib.util.find_spec("peft"):
        calls.append(lambda: to_adapter(vector, model, tmp_path / "adapter"))
    for call in calls:
        with pytest.raises(
            ValueError, match="the model is quantized by .*can't be changed exactly.*: load the model in"
        ):
            call()
    assert list(tmp_path.iterdir()) == []


def test_training_reads_what_a_loop_over_the_quantized_model_reads(model: Any) -> None:
    check_trained(model, model, tiny.blocks(model))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_steering_is_as_by_hand(model: Any, selection: str) -> None:
    check_steered(model, model, model, tiny.blocks(model), selection, hidden=SIZES["hidden_size"])


@pytest.mark.parametrize("layer_type", ["self_attn", "mlp"])
def test_parts_are_moved_by_exactly_the_direction_in_their_own_dtype(model: Any, layer_type: Any) -> None:
    vector = SteeringVector(some_vector(SIZES["hidden_size"]).layer_activations, layer_type)
    runs = []
    for multiplier in (0, 1):
        with (
            vector.apply(model, multiplier=multiplier),
            record_activations(model, layer_type) as records,
            torch.no_grad(),
        ):
            model(**INPUTS)
        runs.append(records[LAYER][0])
    assert runs[0].dtype is runs[1].dtype
    assert torch.equal(runs[1], runs[0] + vector.layer_activations[LAYER].to(runs[0].dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("tokens", [None, generated(INPUTS)], ids=["all", "generated"])
def test_under_a_quantized_cache_the_same_tokens_are_steered_as_by_hand(tokens: Any) -> None:
    """Its own rounding moves the logits; so the oracle runs under the same cache."""
    pytest.importorskip("optimum.quanto")
    model: Any = tiny.build("llama", hidden_size=64, num_attention_heads=2, head_dim=32)
    vector = some_vector(64)
    cache = {"backend": "quanto", "nbits": 4, "q_group_size": 32, "residual_length": 4}
    options = {"cache_implementation": "quantized", "cache_config": cache, "max_new_tokens": 6, "do_sample": False}
    first = 0 if tokens is None else INPUTS["input_ids"].shape[1] - 1

    def by_hand(_module: Any, _args: Any, output: Any) -> Any:
        steered = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        steered[:, first if steered.shape[1] > 1 else 0 :] += vector.layer_activations[LAYER]
        return steered

    handle = tiny.blocks(model)[LAYER].register_forward_hook(by_hand)
    expected = model.generate(**INPUTS, **options)
    handle.remove()
    with vector.apply(model, tokens=tokens):
        assert torch.equal(model.generate(**INPUTS, **options), expected)
    assert not torch.equal(model.generate(**INPUTS, **options), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("smollm2")  # which unpacks the model
def test_the_page_on_quantized_models_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder = Path(sys.prefix) / "share" / "smollm2-135m-instruct"
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda name, load=load, **options: load(folder, **options))
    monkeypatch.chdir(tmp_path)
    for page in ON_QUANTIZED:
        run_page(page)
