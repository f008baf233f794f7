"""From a model, a layer type and numbers to modules."""

from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    JambaConfig,
    JambaForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

from steering_vectors import LayerType, get_num_matching_layers, guess_and_enhance_layer_config
from steering_vectors._models import anatomy_of
from steering_vectors.layer_matching import collect_matching_layers, find_layers
from tests import tiny
from tests.test_extraction import states_of

LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
AT_INPUT: tuple[LayerType, ...] = ("heads", "neurons")
PARTS = [layer_type for layer_type in LAYER_TYPES if layer_type != "decoder_block"]
PROMPT = [11, 12, 13, 14, 15, 16, 17, 18]

_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5_SIZES: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}

# Parts that a block of this architecture has not.
MISSING: dict[str, list[str]] = {
    "falcon": ["post_attention_layernorm"],
    "gptj": ["post_attention_layernorm"],
    "phi": ["post_attention_layernorm"],
    "mamba": ["self_attn", "mlp", "post_attention_layernorm", "heads", "neurons"],
    "mixtral": ["neurons"],
    "rwkv": ["heads"],
}


@cache
def t5(depth: int = 5) -> PreTrainedModel:
    """An encoder of so many blocks beside a decoder of three."""
    model: PreTrainedModel = T5ForConditionalGeneration(T5Config(**_T5_SIZES, num_layers=depth, num_decoder_layers=3))
    return model.eval()


@cache
def jamba() -> PreTrainedModel:
    """Four blocks, of which those numbered 1 and 3 have attention and experts."""
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    mamba = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    model: PreTrainedModel = JambaForCausalLM(
        JambaConfig(**{**_SIZES, "num_hidden_layers": 4}, **periods, **mamba, num_experts=4)
    )
    return model.eval()


class Stack(nn.Module):
    """Somebody's own model: some lists of blocks."""

    def __init__(self, *names: str, count: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        for name in names:
            self.add_module(name, nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(count)))


class Motley(nn.Module):
    """Blocks of which one has no attention, and the others have it under two names."""

    def __init__(self) -> None:
        super().__init__()
        parts = [{"attn": nn.Linear(2, 2)}, {"mlp": nn.Linear(2, 2)}, {"self_attn": nn.Linear(2, 2)}]
        self.blocks = nn.ModuleList(nn.ModuleDict(part) for part in parts)


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model is its ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def found_modules(model: nn.Module, layer_type: LayerType = "decoder_block", **kwargs: Any) -> list[nn.Module]:
    names = find_layers(model, layer_type, **kwargs).names
    return [model.get_submodule(names[number]) for number in sorted(names)]


def found_modules_parent(model: nn.Module) -> nn.Module:
    """The module whose list the blocks are."""
    return model.get_submodule(find_layers(model).names[0].removesuffix(".layers.0"))


def watch(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each module's input and output, ``(seq, hidden)``, in one pass over PROMPT."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            result = output if isinstance(output, Tensor) else output[0]
            # Copies: Falcon goes on in place.
            seen[name] = given.reshape(len(PROMPT), -1).clone(), result.reshape(len(PROMPT), -1).clone()

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    with torch.no_grad():
        model(torch.tensor([PROMPT]))
    for handle in handles:
        handle.remove()
    return seen


class TestBlocks:
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_those_whose_outputs_are_the_hidden_states(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        blocks = found_modules(model)
        seen = watch(model, {str(n): block for n, block in enumerate(blocks)})
        assert len(blocks) == len(tiny.blocks(model))
        for n, state in enumerate(states_of(model, PROMPT)):
            torch.testing.assert_close(seen[str(n)][1], state, atol=1e-5, rtol=1e-5)
            if n + 1 < len(blocks):
                torch.testing.assert_close(seen[str(n + 1)][0], state, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_told_from_the_bare_model_too(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        assert found_modules(model.base_model) == found_modules(model) == tiny.blocks(model)

    @pytest.mark.parametrize("depth", [2, 3, 5])
    def test_are_never_those_of_a_vision_tower_however_deep(self, depth: int) -> None:
        names = find_layers(tiny.llava(depth)).names
        assert sorted(names) == [0, 1, 2]
        assert all("vision" not in name and "language_model" in name for name in names.values())
        assert {type(module).__name__ for module in found_modules(tiny.llava(depth))} == {"LlamaDecoderLayer"}

    @pytest.mark.parametrize("depth", [2, 3, 5])
    def test_are_the_decoders_where_an_encoder_stands_beside_it(self, depth: int) -> None:
        assert find_layers(t5(depth)).names == {n: f"decoder.block.{n}" for n in range(3)}

    def test_are_the_encoders_where_it_stands_alone(self) -> None:
        model = T5EncoderModel(T5Config(**_T5_SIZES, num_layers=2))
        assert find_layers(model).names == {0: "encoder.block.0", 1: "encoder.block.1"}

    @pytest.mark.parametrize("experts", [2, 3, 4])
    def test_are_never_experts(self, experts: int) -> None:
        mixtral = tiny.build("mixtral", num_local_experts=experts)
        assert found_modules(mixtral) == tiny.blocks(mixtral)
        sizes = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        qwen = Qwen2MoeForCausalLM(Qwen2MoeConfig(**_SIZES, **sizes, shared_expert_intermediate_size=16))
        assert find_layers(qwen).names == {n: f"model.layers.{n}" for n in range(3)}

    def test_of_somebodys_own_model_are_its_only_list(self) -> None:
        assert find_layers(Stack("stack")).names == {n: f"stack.{n}" for n in range(3)}

    def test_of_xlm_which_has_none_are_the_last_parts_of_each(self) -> None:
        config = XLMConfig(vocab_size=tiny.VOCABULARY, emb_dim=tiny.HIDDEN, n_layers=3, n_heads=4)
        model = XLMWithLMHeadModel(config).eval()
        blocks = found_modules(model)
        seen = watch(model, {str(n): block for n, block in enumerate(blocks)})
        for n, state in enumerate(states_of(model, PROMPT)):
            torch.testing.assert_close(seen[str(n)][1], state, atol=1e-5, rtol=1e-5)


class TestParts:
    @pytest.mark.parametrize("layer_type", PARTS)
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_stand_one_in_each_block(self, architecture: str, layer_type: LayerType) -> None:
        model = tiny.shared(architecture)
        if layer_type in MISSING.get(architecture, []):
            with pytest.raises(ValueError, match=rf"no {layer_type} found in the blocks of .*layer_config="):
                find_layers(model, layer_type)
            return
        parts = found_modules(model, layer_type)
        blocks = tiny.blocks(model)
        assert len(parts) == len(blocks)
        for part, block in zip(parts, blocks, strict=True):
            assert part is not block
            assert any(part is module for module in block.modules())

    @pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "mamba"])
    def test_attention_and_mlp_are_what_a_block_adds_to_its_stream(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        parts = {kind: found_modules(model, kind)[1] for kind in ("decoder_block", "self_attn", "mlp")}
        seen = watch(model, parts)
        before, after = seen["decoder_block"]
        attention, mlp = seen["self_attn"][1], seen["mlp"][1]
        if architecture in ("bloom", "mpt"):  # the MLP takes the stream in and gives it back
            torch.testing.assert_close(mlp, after, atol=1e-5, rtol=1e-5)
            assert "Attention" in type(parts["self_attn"]).__name__
        elif architecture in ("gemma2", "gemma3"):  # a norm comes after either
            attention = model.model.layers[1].post_attention_layernorm(attention)
            mlp = model.model.layers[1].post_feedforward_layernorm(mlp)
            torch.testing.assert_close(before + attention + mlp, after, atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(before + attention + mlp, after, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name != "rwkv"])
    def test_the_input_norm_gets_the_stream(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        parts = {kind: found_modules(model, kind)[1] for kind in ("decoder_block", "input_layernorm")}
        seen = watch(model, parts)
        torch.testing.assert_close(seen["input_layernorm"][0], seen["decoder_block"][0])

    @pytest.mark.parametrize(
        "architecture", ["bloom", "gpt2", "gpt_neo", "llama", "mistral", "mixtral", "mpt", "qwen2"]
    )
    def test_norms_give_attention_and_mlp_their_inputs(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        kinds = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        seen = watch(model, {kind: found_modules(model, kind)[1] for kind in kinds})  # type: ignore[arg-type]
        torch.testing.assert_close(seen["input_layernorm"][1], seen["self_attn"][0])
        torch.testing.assert_close(seen["post_attention_layernorm"][1], seen["mlp"][0])

    @pytest.mark.parametrize(
        ("architecture", "expected"),
        [
            ("gpt2", ["h.0", "h.0.attn", "h.0.mlp", "h.0.ln_1", "h.0.ln_2"]),
            ("llama", ["layers.0", "layers.0.self_attn", "layers.0.mlp", "layers.0.input_layernorm", None]),
            ("gpt_neox", ["layers.0", "layers.0.attention", "layers.0.mlp", "layers.0.input_layernorm", None]),
        ],
    )
    def test_are_those_of_0_12_2_where_it_was_right(self, architecture: str, expected: list[str | None]) -> None:
        model = tiny.shared(architecture)
        for layer_type, name in zip(LAYER_TYPES[:5], expected, strict=True):
            ending = name or "layers.0.post_attention_layernorm"
            assert find_layers(model, layer_type).names[0].endswith(f".{ending}")

    def test_of_a_vision_language_model_stand_in_its_text_blocks(self) -> None:
        for layer_type in PARTS:
            names = find_layers(tiny.llava(), layer_type).names
            assert sorted(names) == [0, 1, 2]
            assert all("vision" not in name for name in names.values())

    def test_of_t5_stand_in_its_decoder(self) -> None:
        assert find_layers(t5(), "self_attn").names[2] == "decoder.block.2.layer.0.SelfAttention"
        assert find_layers(t5(), "mlp").names[2] == "decoder.block.2.layer.2.DenseReluDense"

    def test_of_a_hybrid_model_are_in_the_blocks_that_have_them(self) -> None:
        assert find_layers(jamba(), "self_attn").names == {n: f"model.layers.{n}.self_attn" for n in (1, 3)}
        assert find_layers(jamba(), "self_attn").numbers(None) == [1, 3]
        assert sorted(find_layers(jamba(), "mlp").names) == [0, 1, 2, 3]

    @pytest.mark.parametrize("layer", [0, 2, -2])
    def test_a_hybrid_models_block_without_one_is_an_error_that_names_those_with_one(self, layer: int) -> None:
        message = rf"block {layer % 4} of JambaForCausalLM has no self_attn; blocks that have one: \[1, 3\]"
        with pytest.raises(ValueError, match=message):
            find_layers(jamba(), "self_attn").numbers([1, layer])


class TestWrappers:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when torch.compile is imported
    @pytest.mark.parametrize("layer_type", LAYER_TYPES)
    @pytest.mark.parametrize(
        "wrap",
        [Wrapper, torch.compile, lambda model: Wrapper(torch.compile(model))],
        ids=["parallel", "compiled", "both"],
    )
    def test_are_looked_through(self, wrap: Any, layer_type: LayerType) -> None:
        model = tiny.shared("gpt2")
        assert found_modules(wrap(model), layer_type) == found_modules(model, layer_type)

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own
    @pytest.mark.parametrize("layer_type", LAYER_TYPES)
    @pytest.mark.parametrize("architecture", ["gpt2", "opt"])
    @pytest.mark.parametrize("kind", ["lora", "prompt tuning"])
    def test_of_peft_are_looked_through(self, kind: str, architecture: str, layer_type: LayerType) -> None:
        peft = pytest.importorskip("peft")
        model = tiny.build(architecture)
        expected = found_modules(model, layer_type)
        config = {
            "lora": lambda: peft.LoraConfig(
                target_modules=["c_attn"] if architecture == "gpt2" else ["q_proj"],
                task_type="CAUSAL_LM",
                fan_in_fan_out=architecture == "gpt2",
            ),
            "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        }[kind]()
        wrapped = peft.get_peft_model(model, config)
        assert found_modules(wrapped, layer_type) == expected
        assert anatomy_of(wrapped).pass_modules[0] is wrapped
        assert any(expected[0] is module for module in anatomy_of(wrapped).decoder.modules())
        assert found_modules(Wrapper(wrapped), layer_type) == expected

    def test_passes_go_from_the_wrapper_to_the_text_decoder(self) -> None:
        model = tiny.shared("opt")
        wrapped = Wrapper(model)
        assert anatomy_of(wrapped).pass_modules == (wrapped, model, model.model, model.model.decoder)
        assert anatomy_of(tiny.llava()).decoder is found_modules_parent(tiny.llava())

    def test_a_wrapped_encoder_decoder_is_told(self) -> None:
        assert anatomy_of(Wrapper(t5())).is_encoder_decoder
        assert not anatomy_of(Wrapper(tiny.shared("gpt2"))).is_encoder_decoder


class TestAnExplicitConfig:
    def test_wins_as_a_template(self) -> None:
        model = tiny.shared("llama")
        names = find_layers(model, "decoder_block", {"decoder_block": "model.layers.{num}.mlp"}).names
        assert names == {n: f"model.layers.{n}.mlp" for n in range(3)}

    def test_wins_as_a_callable(self) -> None:
        model = tiny.shared("llama")
        given: list[nn.Module] = []

        def matcher(asked: nn.Module, number: int) -> str:
            given.append(asked)
            return f"model.layers.{2 - number}"

        names = find_layers(model, "mlp", {"mlp": matcher}).names
        assert names == {0: "model.layers.2", 1: "model.layers.1", 2: "model.layers.0"}
        assert all(asked is model for asked in given)

    def test_says_nothing_of_other_types(self) -> None:
        model = tiny.shared("llama")
        config: Any = {"decoder_block": "model.layers.{num}.mlp"}
        assert find_layers(model, "self_attn", config) == find_layers(model, "self_attn")

    def test_names_a_vision_towers_blocks(self) -> None:
        template = next(
            name.replace(".0", ".{num}", 1)
            for name, module in tiny.llava().named_modules()
            if type(module).__name__ == "CLIPEncoderLayer"
        )
        assert len(find_layers(tiny.llava(), "decoder_block", {"decoder_block": template}).names) == 5

    def test_helps_where_nothing_is_sure(self) -> None:
        model = Stack("left", "right")
        names = find_layers(model, "decoder_block", {"decoder_block": "right.{num}"}).names
        assert names == {n: f"right.{n}" for n in range(3)}

    def test_may_leave_blocks_out(self) -> None:
        found = find_layers(jamba(), "self_attn", {"self_attn": "model.layers.{num}.self_attn"})
        assert sorted(found.names) == [1, 3]
        assert found.numbers([-1]) == [3]

    def test_takes_a_name_for_a_text_not_for_a_pattern(self) -> None:
        with pytest.raises(ValueError, match="matches no module"):
            find_layers(tiny.shared("llama"), "mlp", {"mlp": "model.layers.{num}.m.p"})

    def test_that_matches_nothing_is_an_error_that_lists_the_models_lists(self) -> None:
        message = (
            r"layer_config\['mlp'\] = 'model\.h\.\{num\}' matches no module of LlamaForCausalLM.*model\.layers\.\{num\}"
        )
        with pytest.raises(ValueError, match=message):
            find_layers(tiny.shared("llama"), "mlp", {"mlp": "model.h.{num}"})

    def test_needs_a_number_in_its_template(self) -> None:
        with pytest.raises(ValueError, match=r"a template with \{num\} in it, such as .*, got 'model\.layers'"):
            find_layers(tiny.shared("llama"), "mlp", {"mlp": "model.layers"})

    @pytest.mark.parametrize("matcher", [3, ["model.layers.{num}"]])
    def test_takes_no_other_matchers(self, matcher: Any) -> None:
        with pytest.raises(TypeError, match=r"a layer matcher must be a callable or a template with \{num\}"):
            find_layers(tiny.shared("llama"), "mlp", {"mlp": matcher})

    def test_takes_no_other_layer_types(self) -> None:
        with pytest.raises(
            ValueError, match="unknown layer type 'attention'; expected one of decoder_block, self_attn"
        ):
            find_layers(tiny.shared("llama"), "mlp", {"attention": "model.layers.{num}"})  # type: ignore[dict-item]

    @pytest.mark.parametrize("config", ["model.layers.{num}", ["mlp"]])
    def test_is_a_mapping(self, config: Any) -> None:
        with pytest.raises(TypeError, match="layer_config must be a mapping from layer types to matchers, such as"):
            find_layers(tiny.shared("llama"), "mlp", config)

    def test_that_is_a_number_may_be_a_multiplier(self) -> None:
        with pytest.raises(TypeError, match=r"did you mean multiplier=2\.0\?"):
            find_layers(tiny.shared("llama"), "mlp", 2.0)  # type: ignore[arg-type]


class TestWhereNothingIsSure:
    def test_the_candidates_are_listed(self) -> None:
        message = (
            r"can't tell which modules are the decoder blocks of Stack; candidates: "
            r"\['left\.\{num\}', 'right\.\{num\}'\].*layer_config=\{'decoder_block': 'PATH\.\{num\}'\}"
        )
        with pytest.raises(ValueError, match=message):
            find_layers(Stack("left", "right"))

    def test_a_module_without_lists_has_no_blocks(self) -> None:
        with pytest.raises(ValueError, match="can't tell which modules are the decoder blocks of Linear"):
            find_layers(nn.Linear(2, 2))

    def test_a_part_that_is_not_found_lists_those_that_are_there(self) -> None:
        with pytest.raises(
            ValueError, match=r"no self_attn found in the blocks of MambaForCausalLM.*\['mixer', 'norm'\]"
        ):
            find_layers(tiny.shared("mamba"), "self_attn")

    @pytest.mark.parametrize("layer_type", ["attention", "", None, 3])
    def test_an_unknown_layer_type_lists_the_known_ones(self, layer_type: Any) -> None:
        with pytest.raises(
            ValueError, match=f"unknown layer type {layer_type!r}; expected one of decoder_block, self_attn"
        ):
            find_layers(tiny.shared("llama"), layer_type)

    @pytest.mark.parametrize("model", [None, "gpt2", 3])
    def test_no_module_is_no_model(self, model: Any) -> None:
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module such as a Hugging Face model, got"):
            find_layers(model)

    def test_a_pipeline_is_told_to_give_its_model(self) -> None:
        class Pipeline:
            model = tiny.shared("llama")

        with pytest.raises(TypeError, match=r"got Pipeline: pass its \.model"):
            find_layers(Pipeline())  # type: ignore[arg-type]


class TestNumbers:
    @pytest.mark.parametrize(
        ("asked", "expected"),
        [
            (None, [0, 1, 2]),
            (1, [1]),
            (-1, [2]),
            (range(3), [0, 1, 2]),
            ([2, 0], [0, 2]),
            ((1, -2, 1), [1]),
            ({0, -1}, [0, 2]),
            (np.int64(1), [1]),
            ([np.int32(2), -3], [0, 2]),
            (torch.tensor(1), [1]),
            ([torch.tensor(2)], [2]),
            (np.arange(1, 3), [1, 2]),
            (torch.tensor([0, 2]), [0, 2]),
        ],
        ids=str,
    )
    def test_come_in_any_form_and_are_folded_and_sorted(self, asked: Any, expected: list[int]) -> None:
        assert find_layers(tiny.shared("llama")).numbers(asked) == expected

    @pytest.mark.parametrize("layer", [3, 40, -4])
    def test_beyond_the_model_name_its_layers(self, layer: int) -> None:
        with pytest.raises(ValueError, match=f"^layer {layer} does not exist: the model has 3 layers, 0 to 2"):
            find_layers(tiny.shared("llama")).numbers([0, layer])

    @pytest.mark.parametrize("layers", ["1", 1.0, b"1", ["1"], [1.0], True, [False], [None]])
    def test_that_are_no_whole_numbers_are_a_type_error(self, layers: Any) -> None:
        with pytest.raises(TypeError, match=r"layer.*(whole )?number.*got"):
            find_layers(tiny.shared("llama")).numbers(layers)

    def test_none_at_all_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="layers is empty: pass at least one layer number, or None for all"):
            find_layers(tiny.shared("llama")).numbers([])


class TestCollecting:
    def test_counts_up_from_zero_to_the_first_gap(self) -> None:
        model = tiny.shared("gpt2")
        assert collect_matching_layers(model, "transformer.h.{num}.mlp") == [f"transformer.h.{n}.mlp" for n in range(3)]
        assert collect_matching_layers(jamba(), "model.layers.{num}.self_attn") == []
        assert collect_matching_layers(model, lambda _model, n: f"transformer.h.{n}" if n < 2 else "none") == [
            "transformer.h.0",
            "transformer.h.1",
        ]
        assert get_num_matching_layers(model, "transformer.h.{num}") == 3
        assert get_num_matching_layers(model, "no.such.{num}") == 0

    def test_numbers_of_two_digits_are_in_order(self) -> None:
        model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(1, 1) for _ in range(12))})
        assert collect_matching_layers(model, "blocks.{num}") == [f"blocks.{n}" for n in range(12)]

    def test_needs_a_number_in_the_template(self) -> None:
        with pytest.raises(ValueError, match=r"\{num\}"):
            collect_matching_layers(tiny.shared("gpt2"), "transformer.h")


class TestGuessing:
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_gives_matchers_for_the_layers_that_are_found(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        config = guess_and_enhance_layer_config(model)
        assert set(config) == set(LAYER_TYPES) - set(MISSING.get(architecture, []))
        for layer_type, matcher in config.items():
            assert collect_matching_layers(model, matcher) == list(find_layers(model, layer_type).names.values())

    def test_gives_templates_where_one_fits_all(self) -> None:
        assert guess_and_enhance_layer_config(tiny.shared("gpt2")) == {
            "decoder_block": "transformer.h.{num}",
            "self_attn": "transformer.h.{num}.attn",
            "mlp": "transformer.h.{num}.mlp",
            "input_layernorm": "transformer.h.{num}.ln_1",
            "post_attention_layernorm": "transformer.h.{num}.ln_2",
            "heads": "transformer.h.{num}.attn.c_proj",
            "neurons": "transformer.h.{num}.mlp.c_proj",
        }

    def test_is_for_one_type_if_asked(self) -> None:
        assert guess_and_enhance_layer_config(tiny.shared("gpt2"), layer_type="mlp") == {
            "mlp": "transformer.h.{num}.mlp"
        }

    def test_keeps_what_is_given_and_does_not_change_it(self) -> None:
        given: Any = {"mlp": "transformer.h.{num}.ln_1"}
        config = guess_and_enhance_layer_config(tiny.shared("gpt2"), given)
        assert given == {"mlp": "transformer.h.{num}.ln_1"}
        assert config["mlp"] == "transformer.h.{num}.ln_1"
        assert config["decoder_block"] == "transformer.h.{num}"

    def test_leaves_out_what_it_cannot_tell(self) -> None:
        assert guess_and_enhance_layer_config(Stack("left", "right")) == {}

    def test_a_hybrid_models_guess_finds_its_layers_again(self) -> None:
        matcher = guess_and_enhance_layer_config(jamba())["self_attn"]
        assert (
            find_layers(jamba(), "self_attn", {"self_attn": matcher}).names == find_layers(jamba(), "self_attn").names
        )

    def test_of_blocks_that_name_their_parts_differently_finds_them_again(self) -> None:
        model = Motley()
        matcher = guess_and_enhance_layer_config(model)["self_attn"]
        expected = {0: "blocks.0.attn", 2: "blocks.2.self_attn"}
        assert find_layers(model, "self_attn").names == expected
        assert find_layers(model, "self_attn", {"self_attn": matcher}).names == expected

    def test_an_unknown_type_is_refused(self) -> None:
        with pytest.raises(ValueError, match="unknown layer type 'attention'"):
            guess_and_enhance_layer_config(tiny.shared("gpt2"), layer_type="attention")  # type: ignore[arg-type]
