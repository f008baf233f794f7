"""A vector merged into weights, against a model that is steered by hooks."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from steering_vectors import SteeringVector
from steering_vectors.merging import merge
from steering_vectors.merging.families import FAMILIES, FAMILIES_AS_LLAMA, PROVEN_IN_VLLM
from tests import tiny
from tests.merging.cases import ADDED, MULTIPLIER, VECTOR, there
from tests.merging.fresh import IDS, lively, logits, logits_in_a_fresh_process

pytestmark = [
    pytest.mark.xdist_group("merging"),
    # those of old versions of transformers
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"),
]

NAMES = there(ADDED)


def steered_by_hand(model: nn.Module, vector: SteeringVector = VECTOR, multiplier: float = MULTIPLIER) -> Tensor:
    def add(layer: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            change = multiplier * vector.layer_activations[layer]
            return output + change if isinstance(output, Tensor) else (output[0] + change, *output[1:])

        return hook

    blocks = blocks_of(model)
    handles = [blocks[layer].register_forward_hook(add(layer)) for layer in vector.layers]
    made = logits(model)
    for handle in handles:
        handle.remove()
    return made


def blocks_of(model: Any) -> Any:
    """The blocks, by hand: the one list of as many modules as the config says."""
    count = model.config.num_hidden_layers
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    return lists[0]


@pytest.mark.parametrize("name", NAMES)
class TestEachFamily:
    def test_computes_what_the_steered_model_does(self, merged: Any, name: str) -> None:
        architecture, settings = ADDED[name]
        model = lively(architecture, **settings)
        steered, (made, _) = steered_by_hand(model), merged["added", name]
        torch.testing.assert_close(made, steered, atol=1e-5, rtol=1e-5)
        assert (steered - logits(model)).abs().max() > 0.1

    def test_saved_and_loaded_in_a_fresh_process_computes_the_same(self, merged: Any, name: str) -> None:
        made, fresh = merged["added", name]
        assert torch.equal(made, fresh)


def test_every_family_of_the_table_is_among_the_cases() -> None:
    assert {*FAMILIES, *FAMILIES_AS_LLAMA} <= {name for name, _ in ADDED.values()}
    assert set(FAMILIES) >= PROVEN_IN_VLLM


class TestTheCopy:
    @pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
    def test_leaves_the_given_model_as_it_was(self, name: str) -> None:
        model = tiny.build(name).train()
        state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
        made = merge(VECTOR, model)
        assert model.training
        assert not made.training
        assert model.config.to_dict() == config
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        owned = {parameter.data_ptr() for parameter in model.parameters()}
        assert not owned & {parameter.data_ptr() for parameter in made.parameters()}

    @pytest.mark.parametrize("name", ["llama", "qwen2"])
    def test_keeps_tied_weights_tied(self, name: str) -> None:
        made: Any = merge(VECTOR, tiny.build(name, tie_word_embeddings=True))
        assert made.lm_head.weight is made.get_input_embeddings().weight
        made: Any = merge(VECTOR, tiny.build(name, tie_word_embeddings=False))
        assert made.lm_head.weight is not made.get_input_embeddings().weight

    @pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3", "gpt_oss"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_keeps_the_dtype(self, name: str, dtype: torch.dtype) -> None:
        if not tiny.is_there(name) or (name == "gpt_oss" and dtype is torch.float64):
            pytest.skip("not in this version of transformers, or not in this dtype")
        model = tiny.build(name).to(dtype)
        made = merge(VECTOR, model, multiplier=0.2)
        assert {parameter.dtype for parameter in made.parameters()} == {dtype}
        assert logits(made).dtype == dtype

    def test_of_a_vector_of_negative_layers_is_that_of_the_same_layers(self) -> None:
        model = tiny.shared("llama")
        direction = VECTOR.layer_activations[2]
        expected = logits(merge(SteeringVector({2: direction}), model))
        assert torch.equal(logits(merge(SteeringVector({-1: direction}), model)), expected)

    def test_generates_what_the_steered_model_does(self) -> None:
        model: Any = tiny.shared("llama")
        made: Any = merge(VECTOR, model, multiplier=MULTIPLIER)
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        with VECTOR.apply(model, multiplier=MULTIPLIER):
            expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(made.generate(**inputs, max_new_tokens=8, do_sample=False), expected)

    def test_of_a_model_out_of_a_gguf_file_names_no_quantization(self, tmp_path: Path) -> None:
        model = tiny.build("llama")
        model.config.quantization_config = {"quant_method": "gguf"}
        made = merge(VECTOR, model)
        made.save_pretrained(tmp_path)
        assert not hasattr(made.config, "quantization_config")
        assert "quantization_config" not in (tmp_path / "config.json").read_text()
        assert model.config.quantization_config is not None

    def test_works_without_a_head(self) -> None:
        model = transformers.LlamaModel(tiny.build("llama").config).eval()
        made: Any = merge(VECTOR, model)
        with VECTOR.apply(model), torch.no_grad():
            expected = model(IDS).last_hidden_state
            torch.testing.assert_close(made(IDS).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model


def on_meta() -> Any:
    return tiny.build("llama").to("meta")


def with_norm_after() -> Any:
    return tiny.build("opt", do_layer_norm_before=False)


def quantized() -> Any:
    model = tiny.build("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    return model


def in_eight_bits() -> Any:
    model: Any = tiny.build("llama")
    weight = model.lm_head.weight.to(torch.int8)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def of_other_layers() -> SteeringVector:
    return SteeringVector({0: torch.ones(tiny.HIDDEN)}, metadata={"layer_config": '{"decoder_block": "model.x.{num}"}'})


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "another family": (VECTOR, lambda: tiny.build("mixtral"), {}, ValueError, "of type 'mixtral': its blocks have no bias.*"
        "Types that can be merged: arcee, .*mistral \\(without a sliding window\\).*xglm"),
    "a window": (VECTOR, lambda: tiny.build("mistral"), {}, ValueError, "only without a sliding window, as it is .*, "
        "but it has a sliding window"),
    "longrope": (VECTOR, lambda: tiny.build("phi3", rope_scaling={"type": "longrope", "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4}, original_max_position_embeddings=64), {}, ValueError, "but it has longrope"),
    "partial rotary": (VECTOR, lambda: tiny.build("phi3", partial_rotary_factor=0.5), {}, ValueError,
        "but it has partial rotary embeddings"),
    "another head": (VECTOR, lambda: transformers.Qwen2ForSequenceClassification(tiny.build("qwen2").config), {},
        ValueError, "but it is a Qwen2ForSequenceClassification, not a Qwen2ForCausalLM"),
    "a norm after it": (VECTOR, with_norm_after, {}, ValueError,
        "with do_layer_norm_before=False, the model has a norm after its blocks' last bias"),
    "a norm after it, in bfloat16": (VECTOR, lambda: with_norm_after().bfloat16(), {}, ValueError, "has a norm after"),
    "vLLM that drops biases": (VECTOR, lambda: tiny.build("cohere"), {"engine": "vllm"}, ValueError,
        "would leave it out without a word. Types that are known: arcee, gpt2"),
    "another engine": (VECTOR, lambda: tiny.build("llama"), {"engine": "llama.cpp"}, ValueError, "engine must be 'vllm'"),
    "a layer type": (SteeringVector({0: torch.ones(32)}, "mlp"), lambda: tiny.build("llama"), {}, ValueError,
        "only a vector of decoder blocks' outputs can be merged, and this one is of mlp"),
    "other modules": (of_other_layers(), lambda: tiny.build("llama"), {}, ValueError, "this one is of other modules"),
    "no directions": (SteeringVector({}), lambda: tiny.build("llama"), {}, ValueError, "the vector has no directions"),
    "a direction": (torch.ones(32), lambda: tiny.build("llama"), {}, TypeError, "vector must be a SteeringVector, got Tensor"),
    "a layer": (SteeringVector({3: torch.ones(32)}), lambda: tiny.build("llama"), {}, ValueError, "layer 3 does not exist"),
    "a width": (SteeringVector({1: torch.ones(31)}), lambda: tiny.build("llama"), {}, ValueError, "31 numbers"),
    "NaN": (VECTOR, lambda: tiny.build("llama"), {"multiplier": float("nan")}, ValueError, "multiplier must be finite"),
    "rows": (VECTOR, lambda: tiny.build("llama"), {"multiplier": [1.0, 2.0]}, TypeError, "multiplier must be a number"),
    "tokens": (VECTOR, lambda: tiny.build("llama"), {"tokens": [1]}, TypeError, "a bias is added at every token"),
    "an operator": (VECTOR, lambda: tiny.build("llama"), {"operator": len}, TypeError, "by addition alone"),
    "a wrapper": (VECTOR, lambda: Wrapper(tiny.build("llama")), {}, TypeError, "pass the model inside this wrapper"),
    "no model": (VECTOR, lambda: "gpt2", {}, TypeError, "model must be a Hugging Face model"),
    "meta": (VECTOR, on_meta, {}, ValueError, "weights aren't loaded: .* is on the meta device"),
    "quantized": (VECTOR, quantized, {}, ValueError, "quantized by bitsandbytes, and quantized weights can't be changed"),
    "eight bits": (VECTOR, in_eight_bits, {}, ValueError, "can't be changed exactly, such as lm_head.weight"),
    "too large": (SteeringVector({1: torch.full((32,), 6e4)}), lambda: tiny.build("llama").half(), {"multiplier": 2.0},
        ValueError, "too large for the model's torch.float16"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*rope.*")
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_merged_is_refused_in_words(case: str) -> None:
    vector, make, arguments, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        merge(vector, make(), **arguments)


def test_a_steered_model_is_refused() -> None:
    model = tiny.build("llama")
    with VECTOR.apply(model), pytest.raises(ValueError, match="the model is being steered: leave that block"):
        merge(VECTOR, model)


def test_a_model_split_over_devices_is_refused() -> None:
    model: Any = tiny.build("llama")
    real = nn.Module.named_parameters

    def split(self: Any, *args: Any, **kwargs: Any) -> Any:
        for number, (name, weight) in enumerate(real(self, *args, **kwargs)):
            yield name, _On(weight, "cuda:1") if number == 2 else weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "named_parameters", split)
        with pytest.raises(ValueError, match=re.escape("split over the devices cpu, cuda:1: load it on one")):
            merge(VECTOR, model)


class _On:
    def __init__(self, weight: nn.Parameter, device: str) -> None:
        self.dtype, self.data, self.device = weight.dtype, weight.data, torch.device(device)


def test_a_wrong_merge_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from steering_vectors.merging import biases

    monkeypatch.setattr(biases, "_add", lambda *args: None)
    with pytest.raises(ValueError, match="the merged model would compute something else than the steered model"):
        merge(VECTOR, tiny.build("llama"))


def test_smollm2_merged_gives_the_steered_logits_in_a_fresh_process(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    ids = tokenizer("The weather in Paris is", return_tensors="pt")["input_ids"]
    generator = torch.Generator().manual_seed(0)
    vector = SteeringVector({16: 20 * torch.nn.functional.normalize(torch.randn(576, generator=generator), dim=0)})
    with vector.apply(model, multiplier=2.0):
        expected = logits(model, ids)
    merged = merge(vector, model, multiplier=2.0)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    (fresh,) = logits_in_a_fresh_process([tmp_path / "merged"], tmp_path, ids).values()
    torch.testing.assert_close(fresh, expected, atol=1e-4, rtol=1e-5)
    assert (expected - logits(model, ids)).abs().max() > 1
