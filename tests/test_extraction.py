"""Running a model over prompts: every row is what the prompt alone gives, and the model is as it was."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
)

from steering_vectors import SteeringVector, at
from steering_vectors._extraction import read_model
from steering_vectors._extraction import ways as ways_module
from steering_vectors._extraction.extractor import Extractor, LayerRows, ReadPrompt
from steering_vectors._extraction.packs import distinct_prefixes
from steering_vectors._extraction.reading import extractor_for
from steering_vectors._extraction.ways import OneAtATime, Packed, Way
from steering_vectors._models import Attention, Site, anatomy_of
from steering_vectors.layer_matching import find_layers
from tests import tiny

# Longer than a sliding window of tiny.WINDOW; of many lengths; one twice.
PROMPTS = [
    [11, 12, 13, 14, 15],
    [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32],
    [31],
    [11, 12, 13, 99],
    [41, 42, 43, 44, 45, 46, 47, 48, 49],
    [11, 12, 13, 14, 15],
]
_BERT_SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def states_of(model: PreTrainedModel, input_ids: list[int]) -> list[Tensor]:
    """Each block's output but the last one's, ``(seq, hidden)``, as Hugging Face gives it for one prompt alone."""
    with torch.no_grad():
        states = model(torch.tensor([input_ids]), output_hidden_states=True).hidden_states
    # In most models the embeddings come first; and after the last block, its output behind the final norm.
    first = 0 if model.config.model_type in ("mamba", "rwkv") else 1
    return [state[0] for state in states[first:-1]]


def sites_of(model: nn.Module, layers: list[int] | None = None, **kwargs: Any) -> dict[int, Site]:
    found = find_layers(model, **kwargs)
    return {n: Site(model.get_submodule(found.names[n])) for n in found.numbers(layers)}


def extract_rows(
    model: nn.Module, sites: dict[int, Site], prompts: list[ReadPrompt], *, rows_per_pass: int
) -> Iterator[LayerRows]:
    return Extractor(model, sites, batch_size=max(1, rows_per_pass // 2))(prompts)


def check_causal(model: nn.Module, sites: dict[int, Site], input_ids: list[int]) -> None:
    list(Extractor(model, sites, batch_size=1)(last([input_ids])))


def rows_by_prompt(parts: Iterator[LayerRows]) -> dict[tuple[int, int], Tensor]:
    """(layer, prompt) → row ``(hidden,)``; each may come only once."""
    rows: dict[tuple[int, int], Tensor] = {}
    for part in parts:
        assert part.rows.shape[0] == len(part.prompts)
        for number, row in zip(part.prompts, part.rows, strict=True):
            assert (part.layer, number) not in rows
            rows[part.layer, number] = row
    return rows


def last(prompts: list[list[int]]) -> list[ReadPrompt]:
    return [ReadPrompt(prompt, [len(prompt) - 1]) for prompt in prompts]


class TestRows:
    @pytest.mark.parametrize("rows_per_pass", [1, 2, 4, 100])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_those_of_each_prompt_alone(self, architecture: str, rows_per_pass: int) -> None:
        model = tiny.shared(architecture)
        sites = sites_of(model)
        rows = rows_by_prompt(extract_rows(model, sites, last(PROMPTS), rows_per_pass=rows_per_pass))
        assert rows.keys() == {(layer, number) for layer in sites for number in range(len(PROMPTS))}
        for number, prompt in enumerate(PROMPTS):
            for layer, expected in enumerate(tiny.hidden_states(model, prompt)):
                torch.testing.assert_close(rows[layer, number], expected[-1], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_hugging_faces_hidden_states(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        rows = rows_by_prompt(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        for number, prompt in enumerate(PROMPTS):
            for layer, expected in enumerate(states_of(model, prompt)):
                torch.testing.assert_close(rows[layer, number], expected[-1], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_read_at_any_position(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        prompts = [ReadPrompt(PROMPTS[1], [n]) for n in range(12)] + [ReadPrompt(PROMPTS[0], [0])]
        rows = rows_by_prompt(extract_rows(model, sites_of(model, [1]), prompts, rows_per_pass=13))
        expected = tiny.hidden_states(model, PROMPTS[1])[1]
        for n in range(12):
            torch.testing.assert_close(rows[1, n], expected[n], atol=1e-5, rtol=1e-5)

    def test_of_several_positions_are_their_weighted_mean(self) -> None:
        model = tiny.shared("gpt2")
        prompts = [
            ReadPrompt(PROMPTS[0], [1, 2, 4], [0.5, 0.25, 0.25]),
            ReadPrompt(PROMPTS[1], [3]),
            ReadPrompt(PROMPTS[2], [0], [1.0]),
        ]
        rows = rows_by_prompt(extract_rows(model, sites_of(model), prompts, rows_per_pass=3))
        for layer in range(3):
            first, second, third = (tiny.hidden_states(model, prompt)[layer] for prompt in PROMPTS[:3])
            expected = 0.5 * first[1] + 0.25 * first[2] + 0.25 * first[4]
            torch.testing.assert_close(rows[layer, 0], expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(rows[layer, 1], second[3], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(rows[layer, 2], third[0], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("layer_type", ["self_attn", "mlp", "input_layernorm", "post_attention_layernorm"])
    @pytest.mark.parametrize("architecture", ["opt", "mixtral", "gpt2"])
    def test_of_other_layer_types_are_those_of_each_prompt_alone(self, architecture: str, layer_type: str) -> None:
        model = tiny.shared(architecture)
        sites = sites_of(model, layer_type=layer_type)
        together = rows_by_prompt(extract_rows(model, sites, last(PROMPTS), rows_per_pass=10))
        alone = rows_by_prompt(extract_rows(model, sites, last(PROMPTS), rows_per_pass=1))
        for key, row in alone.items():
            torch.testing.assert_close(together[key], row, atol=1e-5, rtol=1e-5)

    def test_carry_no_gradients(self) -> None:
        model = tiny.shared("llama")
        rows = rows_by_prompt(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        assert not any(row.requires_grad for row in rows.values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_of_single_tokens_keep_the_models_dtype_and_means_are_wide(self, dtype: torch.dtype) -> None:
        model = tiny.build("llama").to(dtype)
        single, mean = ReadPrompt(PROMPTS[0], [4]), ReadPrompt(PROMPTS[1], [0, 1], [0.5, 0.5])
        sites = sites_of(model, [0])
        assert [p.rows.dtype for p in extract_rows(model, sites, [single], rows_per_pass=1)] == [dtype]
        wide = torch.promote_types(dtype, torch.float32)
        assert [p.rows.dtype for p in extract_rows(model, sites, [mean], rows_per_pass=1)] == [wide]

    def test_of_a_model_that_counts_positions_from_its_padding_id_are_those_of_each_prompt_alone(self) -> None:
        """RoBERTa and its kin number their tokens from pad_token_id + 1 on."""
        model = RobertaForCausalLM(RobertaConfig(**_BERT_SIZES, is_decoder=True, pad_token_id=1)).eval()
        rows = rows_by_prompt(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        for number, prompt in enumerate(PROMPTS):
            for layer, expected in enumerate(states_of(model, prompt)):
                torch.testing.assert_close(rows[layer, number], expected[-1], atol=1e-5, rtol=1e-5)

    def test_of_an_inner_module_are_the_models(self) -> None:
        model = tiny.shared("gpt2")
        inner = model.base_model
        rows = rows_by_prompt(extract_rows(inner, sites_of(inner), last(PROMPTS), rows_per_pass=3))
        expected = rows_by_prompt(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        assert all(torch.equal(row, expected[key]) for key, row in rows.items())

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="LLaVA of transformers 4.46 doesn't run without an image")
    def test_of_a_vision_language_model_are_those_of_its_text_decoder(self) -> None:
        vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
        config = LlavaConfig(
            text_config={"model_type": "llama", **_BERT_SIZES, "num_key_value_heads": 2},
            vision_config={"model_type": "clip_vision_model", **vision, "image_size": 16, "patch_size": 8},
            image_token_index=tiny.VOCABULARY - 1,
        )
        model = LlavaForConditionalGeneration(config).eval()
        rows = rows_by_prompt(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        for number, prompt in enumerate(PROMPTS):
            for layer, expected in enumerate(states_of(model, prompt)):
                torch.testing.assert_close(rows[layer, number], expected[-1], atol=1e-5, rtol=1e-5)

    def test_inside_a_steering_are_what_was_steered(self) -> None:
        model = tiny.shared("llama")
        sites = sites_of(model, [0, 1])
        plain = rows_by_prompt(extract_rows(model, sites, last(PROMPTS), rows_per_pass=3))
        with SteeringVector({1: torch.ones(tiny.HIDDEN)}).apply(model):
            steered = rows_by_prompt(extract_rows(model, sites, last(PROMPTS), rows_per_pass=3))
        for number in range(len(PROMPTS)):
            assert torch.equal(steered[0, number], plain[0, number])
            torch.testing.assert_close(steered[1, number], plain[1, number] + 1)


class TestTheModel:
    @pytest.mark.parametrize("mode", ["training", "evaluation", "mixed"])
    def test_has_each_modules_mode_as_before(self, mode: str) -> None:
        model = tiny.build("llama").train(mode != "evaluation")
        if mode == "mixed":
            for number, module in enumerate(model.modules()):
                module.training = number % 3 == 0
        before = {name: module.training for name, module in model.named_modules()}
        seen: list[bool] = []
        handle = tiny.blocks(model)[0].register_forward_hook(lambda m, _a, _o: seen.append(m.training))
        list(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        handle.remove()
        assert {name: module.training for name, module in model.named_modules()} == before
        assert not any(seen)

    def test_is_in_its_own_mode_between_the_passes(self) -> None:
        model = tiny.build("llama").train()
        for _part in extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=1):
            assert all(module.training for module in model.modules())

    def test_runs_without_dropout(self) -> None:
        model = tiny.build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
        expected = rows_by_prompt(extract_rows(model.eval(), sites_of(model), last(PROMPTS), rows_per_pass=3))
        rows = rows_by_prompt(extract_rows(model.train(), sites_of(model), last(PROMPTS), rows_per_pass=3))
        assert all(torch.equal(row, expected[key]) for key, row in rows.items())

    def test_does_not_move_the_random_numbers(self) -> None:
        model = tiny.build("gpt2", resid_pdrop=0.5).train()
        before = torch.random.get_rng_state()
        list(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        assert torch.equal(torch.random.get_rng_state(), before)

    @pytest.mark.parametrize("fails", [False, True])
    def test_keeps_other_peoples_hooks_and_none_of_ours(self, fails: bool) -> None:
        model = tiny.build("llama").train()

        def mine(_module: nn.Module, _args: Any, _output: Any) -> None:
            if fails:
                raise KeyError("somebody else's bug")

        handle = tiny.blocks(model)[2].register_forward_hook(mine)
        if fails:
            with pytest.raises(KeyError, match="somebody else's bug"):
                list(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        else:
            list(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.blocks(model)] == [0, 0, 1]
        assert handle.id in tiny.blocks(model)[2]._forward_hooks
        assert all(module.training for module in model.modules())

    def test_is_as_before_when_nobody_asks_for_more(self) -> None:
        model = tiny.build("llama").train()
        rows = extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=1)
        next(rows)
        rows.close()  # type: ignore[attr-defined]
        assert sum(len(module._forward_hooks) for module in model.modules()) == 0
        assert all(module.training for module in model.modules())

    def test_makes_logits_of_one_position_at_most(self) -> None:
        model = tiny.build("llama")
        widths: list[int] = []
        model.lm_head.register_forward_hook(lambda _m, _a, output: widths.append(output.shape[1]))
        list(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        assert all(width <= 1 for width in widths)

    def test_makes_no_cache(self) -> None:
        model = tiny.build("llama")
        seen: list[Any] = []
        model.register_forward_hook(lambda _m, _a, output: seen.append(output.get("past_key_values")))
        list(extract_rows(model, sites_of(model), last(PROMPTS), rows_per_pass=3))
        assert seen == [None] * len(seen)

    def test_may_leave_no_asked_layer_out(self) -> None:
        model = tiny.build("llama")
        sites = {0: Site(tiny.blocks(model)[0]), 7: Site(nn.Linear(2, 2))}
        with pytest.raises(RuntimeError, match=r"layers \[7\] of LlamaForCausalLM did not run"):
            list(extract_rows(model, sites, last(PROMPTS), rows_per_pass=3))


class TestCausality:
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_decoders_pass(self, architecture: str) -> None:
        model = tiny.shared(architecture)
        check_causal(model, sites_of(model), PROMPTS[1])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_decoders_of_other_precisions_pass(self, dtype: torch.dtype) -> None:
        model = tiny.build("llama").to(dtype)
        check_causal(model, sites_of(model), PROMPTS[1])

    def test_bert_as_a_decoder_passes(self) -> None:
        model = BertLMHeadModel(BertConfig(**_BERT_SIZES, is_decoder=True)).eval()
        check_causal(model, sites_of(model), PROMPTS[1])

    @pytest.mark.parametrize("length", [1, 2, 3, 12])
    @pytest.mark.parametrize("with_head", [True, False])
    def test_encoders_are_refused_however_short_the_prompts(self, with_head: bool, length: int) -> None:
        model = (BertLMHeadModel if with_head else BertModel)(BertConfig(**_BERT_SIZES)).eval()
        with pytest.raises(ValueError, match=r"is not a decoder-only language model.*is_decoder=True"):
            check_causal(model, sites_of(model), PROMPTS[1][:length])


# Each shares beginnings, goes beyond a sliding window, and some begin others.
SHARING = [
    [*range(11, 31), 40, 41, 42],
    [*range(11, 31), 50],
    [*range(11, 31), 50, 51],
    [*range(11, 25)],
    [7, 8, 9],
    [7, 8, 10, 11],
]
PACKED_ON_TRANSFORMERS_5 = {
    *("gpt2", "llama", "gpt_neox", "opt", "qwen2", "gptj", "mixtral", "stablelm", "phi", "gemma2", "gemma3", "mistral"),
    *("falcon", "qwen3"),
}
PACKED_ON_TRANSFORMERS_4 = {
    *("llama", "gpt_neox", "qwen2", "gptj", "mixtral", "stablelm", "phi"),
    *("falcon", "mistral", "gemma2"),
    *(("opt", "qwen3") if tiny.VERSION > (4, 46) else ()),
}


def ways_of(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fills with whether each pass that counted ran packs."""
    ways: list[bool] = []
    run = Way.run

    def noted(self: Way, packs: Any, prompts: Any) -> Any:
        result = run(self, packs, prompts)
        ways.append(isinstance(self, Packed) and any(pack.branches for pack in packs))
        return result

    monkeypatch.setattr(Way, "run", noted)
    return ways


class TestPacks:
    @pytest.mark.parametrize("batch_size", [1, 8])
    @pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
    def test_are_exact_or_left(
        self, architecture: str, batch_size: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = tiny.shared(architecture)
        extractor = Extractor(model, sites_of(model), batch_size=batch_size)
        ways = ways_of(monkeypatch)
        rows = rows_by_prompt(extractor(last(SHARING)))
        for number, prompt in enumerate(SHARING):
            for layer, expected in enumerate(tiny.hidden_states(model, prompt)):
                torch.testing.assert_close(rows[layer, number], expected[-1], atol=2e-5, rtol=1e-4)
        with capsys.disabled():
            print(f"{architecture}: {'packs' if ways[-1] else 'rows'}", end=" ")
        packed = PACKED_ON_TRANSFORMERS_4 if tiny.ON_TRANSFORMERS_4 else PACKED_ON_TRANSFORMERS_5
        assert ways[-1] == (architecture in packed)

    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
    def test_a_mask_that_is_left_out_is_noticed(self, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """With it left out the walk's first prompt would be right all the same."""
        model = tiny.shared(architecture)
        masks = ways_module.attention_masks

        def causal(kinds: Any, attention: Any, visible: Tensor, depths: Tensor, dtype: torch.dtype) -> Any:
            return masks(kinds, attention, torch.ones_like(visible).tril(), depths, dtype)

        monkeypatch.setattr(ways_module, "attention_masks", causal)
        extractor = Extractor(model, sites_of(model), batch_size=8)
        ways = ways_of(monkeypatch)
        rows = rows_by_prompt(extractor(last(SHARING)))
        assert not any(ways)
        for number, prompt in enumerate(SHARING):
            torch.testing.assert_close(rows[2, number], tiny.hidden_states(model, prompt)[2][-1], atol=2e-5, rtol=1e-4)

    def test_a_window_that_later_prompts_pass_is_noticed_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Within the window a mask for full attention is right, beyond it it isn't."""
        monkeypatch.setattr(Attention, "window", None)
        model = tiny.build("mistral", sliding_window=12)
        extractor = Extractor(model, sites_of(model), batch_size=8)
        ways = ways_of(monkeypatch)
        short = [prompt[-5:] for prompt in SHARING] + [[7, 8, 9, 1], [7, 8, 9, 2]]
        for prompts, packed in ((short, True), ([*short, *SHARING], False)):
            ways.clear()
            rows = rows_by_prompt(extractor(last(prompts)))
            assert ways[-1] == packed
            for number, prompt in enumerate(prompts):
                expected = tiny.hidden_states(model, prompt)[2][-1]
                torch.testing.assert_close(rows[2, number], expected, atol=2e-5, rtol=1e-4)

    def test_a_window_that_only_masks_get_wrong_is_noticed_after_a_pass_without_masks(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Attention, "window", None)
        model = tiny.build("mistral", sliding_window=12, max_position_embeddings=1024)
        long = [[5, *(n % 300 + 10 for n in range(start, start + 519))] for start in (0, 150)]
        shallow = [[k % 17 + 7, k % 13 + 30, k % 11 + 50, k % 7 + 70] for k in range(200)]
        deep = [[7, 30, *range(100, 130), 9], [7, 30, *range(100, 130), 8]]
        check_rows(model, last([*long, *deep, *shallow]), batch_size=1)

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_the_deepest_of_a_wide_tree_is_exact(self, batch_size: int) -> None:
        model = tiny.shared("llama")
        stem = [n % 300 + 5 for n in range(60)]
        prompts = [[*stem[:depth], 310 + depth % 9, *range(20, 20 + depth % 5)] for depth in range(60)]
        rows = rows_by_prompt(Extractor(model, sites_of(model, [2]), batch_size=batch_size)(last(prompts)))
        for number, prompt in enumerate(prompts):
            expected = tiny.hidden_states(model, prompt)[2][-1]
            torch.testing.assert_close(rows[2, number], expected, atol=2e-5, rtol=1e-4)

    def test_what_follows_the_last_position_is_not_run(self) -> None:
        model = tiny.build("llama")
        lengths: list[int] = []
        tiny.blocks(model)[0].register_forward_pre_hook(lambda _m, args: lengths.append(args[0].shape[1]))
        prompts = [ReadPrompt([n, *range(11, 100)], [2]) for n in (5, 6, 7)]
        list(Extractor(model, sites_of(model), batch_size=4)(prompts))
        assert lengths
        assert max(lengths) <= 9

    def test_no_later_layer_runs_and_no_logits(self) -> None:
        model: Any = tiny.build("llama")
        extractor = Extractor(model, sites_of(model, [1]), batch_size=8)
        ran: list[str] = []
        for name in ("model.layers.0", "model.layers.2", "model.norm", "lm_head"):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        list(extractor(last(SHARING)))  # compared with the whole model
        ran.clear()
        list(extractor(last(SHARING)))
        assert ran == ["model.layers.0"]

    @pytest.mark.parametrize("limit", [1, 2])
    @pytest.mark.parametrize("architecture", ["llama", "mamba"])
    def test_full_memory_halves_a_pass_and_nothing_is_lost(self, architecture: str, limit: int) -> None:
        model = tiny.build(architecture)
        extractor = Extractor(model, sites_of(model), batch_size=8)
        expected = rows_by_prompt(extractor(last(SHARING)))
        full = 0

        def refuse(_module: nn.Module, args: Any) -> None:
            nonlocal full
            if args[0].shape[0] * args[0].shape[1] > 23 + limit:
                full += 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        tiny.blocks(model)[1].register_forward_pre_hook(refuse)
        rows = rows_by_prompt(extractor(last(SHARING)))
        assert full
        assert rows.keys() == expected.keys()
        for key, row in expected.items():
            torch.testing.assert_close(rows[key], row, atol=2e-5, rtol=1e-4)

    def test_after_full_memory_with_one_pack_later_packs_are_smaller(self) -> None:
        model = tiny.build("llama")
        extractor = Extractor(model, sites_of(model), batch_size=1)
        prompts = last([[group, 2, 3, n, n + 1] for group in range(10, 40) for n in range(40, 80)])
        list(extractor(prompts[:2]))
        full = passes = 0

        def refuse(_module: nn.Module, args: Any) -> None:
            nonlocal full, passes
            passes += 1
            if args[0].shape[0] * args[0].shape[1] > 200:
                full += 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        tiny.blocks(model)[1].register_forward_pre_hook(refuse)
        assert len(rows_by_prompt(extractor(prompts))) == 3 * len(prompts)
        assert full <= 3
        assert passes >= 10

    @pytest.mark.parametrize(("times", "halvings"), [(1, 4), (50, 1)])
    def test_after_full_memory_later_passes_are_smaller(self, times: int, halvings: int) -> None:
        model = tiny.build("mamba")
        extractor = Extractor(model, sites_of(model), batch_size=2)
        prompts = last([[n, 2 * n, 3 * n] * times for n in range(5, 38)])  # as many rows as fill a pack, or four
        list(extractor(prompts[:1]))
        full = 0

        def refuse(_module: nn.Module, args: Any) -> None:
            nonlocal full
            if len(args[0]) > 2:
                full += 1
                raise RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB"
                )

        tiny.blocks(model)[1].register_forward_pre_hook(refuse)
        assert len(rows_by_prompt(extractor(prompts))) == 3 * len(prompts)
        assert full == halvings

    @pytest.mark.parametrize("index", [0, 2, 3, 20])
    def test_a_steering_of_some_tokens_is_that_of_each_prompt_alone(self, index: int) -> None:
        """In a pack a token's column isn't its index: the model is run as its user would."""
        model = tiny.build("llama")
        vector = SteeringVector({0: torch.full((tiny.HIDDEN,), 3.0)})
        with vector.apply(model, tokens=at([index])):
            extractor = extractor_for(anatomy_of(model), [1], "decoder_block", None, batch_size=8)
            assert [way.module for way in extractor._ways] == [model, model]
            rows = rows_by_prompt(extractor(last(SHARING)))

        def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
            state = output if isinstance(output, Tensor) else output[0]
            steered = state.clone()
            steered[:, index : index + 1] += 3
            return steered if isinstance(output, Tensor) else (steered, *output[1:])

        tiny.blocks(model)[0].register_forward_hook(steer)
        for number, prompt in enumerate(SHARING):
            expected = tiny.hidden_states(model, prompt)[1][-1]
            torch.testing.assert_close(rows[1, number], expected, atol=2e-5, rtol=1e-4)

    def test_memory_that_is_too_small_for_one_prompt_is_an_error(self) -> None:
        model = tiny.build("llama")

        def refuse(_module: nn.Module, args: Any) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        tiny.blocks(model)[1].register_forward_pre_hook(refuse)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            list(Extractor(model, sites_of(model), batch_size=8)(last(SHARING)))


class TestWrappers:
    def test_a_wrapper_that_changes_what_the_decoder_gets_is_read_through(self) -> None:
        class Shifted(nn.Module):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
                embeddings = self.model.get_input_embeddings()(input_ids) + 1
                return self.model(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False)

        wrapped = Shifted(tiny.build("llama"))
        rows = rows_by_prompt(Extractor(wrapped, sites_of(wrapped), batch_size=8)(last(SHARING)))
        for number, prompt in enumerate(SHARING):
            kept: list[Tensor] = []
            handle = tiny.blocks(wrapped.model)[2].register_forward_hook(
                lambda _m, _a, output, kept=kept: kept.append(output if isinstance(output, Tensor) else output[0])
            )
            with torch.no_grad():
                wrapped(torch.tensor([prompt]))
            handle.remove()
            torch.testing.assert_close(rows[2, number], kept[0][0, -1], atol=2e-5, rtol=1e-4)


def check_rows(
    model: Any, prompts: list[ReadPrompt], extractor: Extractor | None = None, layer: int = 2, batch_size: int = 8
) -> Extractor:
    """Each row is that of its prompt alone; what extracted them."""
    extractor = extractor or Extractor(model, sites_of(model, [layer]), batch_size=batch_size)
    rows = rows_by_prompt(extractor(prompts))
    for number, prompt in enumerate(prompts):
        (expected,) = tiny.hidden_states(model, prompt.input_ids)[layer][list(prompt.positions)]
        torch.testing.assert_close(rows[layer, number], expected, atol=2e-5, rtol=1e-4)
    return extractor


class TestWhatGoesWrongLater:
    def test_a_window_by_columns_is_noticed_after_packs_that_it_did_not_touch(self) -> None:
        """GPT-Neo's own mask counts columns, which in a pack aren't the tokens' indices."""
        model = tiny.build("gpt_neo", window_size=24)
        extractor = Extractor(model, sites_of(model, [2]), batch_size=64)
        easy = [[*range(11, 60)], [*range(11, 59), 7], [*range(11, 59), 8]]  # beyond the window, nearly a chain
        hard = [[*range(100, 110), n, n + 1, n + 2] for n in range(30, 60)]
        check_rows(model, last(easy), extractor)
        check_rows(model, last(hard), extractor)

    @pytest.mark.parametrize("lengths", [(9, 14), (14, 9, 9), (3, 20, 11, 30)], ids=str)
    def test_a_model_that_takes_padding_in_is_run_one_prompt_at_a_time(self, lengths: tuple[int, ...]) -> None:
        model = tiny.build("llama")

        def takes_padding_in(_module: nn.Module, _args: Any, output: Any) -> Any:
            state = output if isinstance(output, Tensor) else output[0]
            state = state + state.shape[0] - 1
            return state if isinstance(output, Tensor) else (state, *output[1:])

        tiny.blocks(model)[0].register_forward_hook(takes_padding_in)
        prompts = [[n + 7 * length for n in range(length)] for length in lengths]
        extractor = check_rows(model, last(prompts))
        assert isinstance(extractor._ways[0], OneAtATime)

    def test_a_model_whose_batches_are_otherwise_is_run_one_prompt_at_a_time(self) -> None:
        model = tiny.build("mamba")

        def noisy(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output * (1 + 0.01 * (output.shape[0] - 1))

        tiny.blocks(model)[1].register_forward_hook(noisy)
        assert isinstance(check_rows(model, last(SHARING))._ways[0], OneAtATime)

    @pytest.mark.parametrize("columns", [slice(0, 3), slice(3, None), slice(20, 22)], ids=str)
    def test_what_a_hook_does_by_column_is_what_it_does_to_each_prompt_alone(self, columns: slice) -> None:
        model = tiny.build("llama")

        def add(_module: nn.Module, _args: Any, output: Any) -> Any:
            state = (output if isinstance(output, Tensor) else output[0]).clone()
            state[:, columns] += 1
            return state if isinstance(output, Tensor) else (state, *output[1:])

        tiny.blocks(model)[2].register_forward_hook(add)
        check_rows(model, last(SHARING))

    def test_what_a_hook_does_to_the_last_column_is_refused(self) -> None:
        model = tiny.build("llama")

        def add(_module: nn.Module, _args: Any, output: Any) -> Any:
            state = (output if isinstance(output, Tensor) else output[0]).clone()
            state[:, -1] += 1
            return state if isinstance(output, Tensor) else (state, *output[1:])

        tiny.blocks(model)[0].register_forward_hook(add)
        with pytest.raises(ValueError, match="an activation changes with the tokens that follow it"):
            check_rows(model, last(SHARING))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_activations_that_are_not_finite_are_told_as_such(self, dtype: torch.dtype) -> None:
        model: Any = tiny.build("llama").to(dtype)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
        message = rf"LlamaForCausalLM has NaN or infinite activations at layer 2: .*{dtype}"
        with pytest.raises(ValueError, match=message):
            list(Extractor(model, sites_of(model, [2]), batch_size=1)(last(SHARING)))


class TestThreads:
    def test_two_may_read_and_a_third_may_run_the_model(self) -> None:
        model = tiny.build("llama").train()
        expected = rows_by_prompt(Extractor(model, sites_of(model), batch_size=1)(last(SHARING)))
        ids = torch.tensor([SHARING[0]])
        plain = tiny.hidden_states(model.eval(), SHARING[0])[2]
        model.train()
        errors: list[BaseException] = []

        def guarded(work: Callable[[], None]) -> None:
            try:
                for _ in range(15):
                    work()
            except BaseException as error:
                errors.append(error)

        def read() -> None:
            rows = rows_by_prompt(Extractor(model, sites_of(model), batch_size=1)(last(SHARING)))
            assert all(torch.allclose(row, expected[key], atol=1e-5) for key, row in rows.items())

        def run() -> None:
            with torch.no_grad():
                assert torch.allclose(model(ids, output_hidden_states=True).hidden_states[-2], plain, atol=9.0)

        threads = [threading.Thread(target=guarded, args=(work,)) for work in (read, read, run)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert errors == []
        assert all(module.training for module in model.modules())
        compiled: list[Any] = []
        torch.compile(lambda x: x + 1, backend=lambda graph, _inputs: compiled.append(graph) or graph)(torch.ones(1))
        assert compiled  # PyTorch compiles again


def tokens_run(model: Any, prompts: list[ReadPrompt], batch_size: int) -> int:
    """How many tokens the model ran for the prompts, those that were compared left out."""
    extractor = check_rows(model, prompts, batch_size=batch_size)
    counted: list[int] = []
    read_pass = read_model.read_pass  # a hook on the model would be looked at, and the model run otherwise

    def counting(modules: Any, layers: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs["attention_mask"]
        if modules[0] is model:  # a prompt alone, to compare
            return read_pass(modules, layers, inputs, *args, **kwargs)
        counted.append(inputs["input_ids"].numel() - (len(mask) if mask.ndim == 4 else 0))  # without the last column
        return read_pass(modules, layers, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(read_model, "read_pass", counting)
        list(extractor(prompts))
    return sum(counted)


class TestLongBeginnings:
    @pytest.mark.parametrize("stem", [200, 500, 600, 1200])
    def test_are_hardly_repeated(self, stem: int) -> None:
        model = tiny.build("llama", max_position_embeddings=2048)
        begin = [n % 290 + 10 for n in range(stem)]
        prompts = last([[*begin, *(10 + (7 * n + k) % 290 for k in range(10))] for n in range(64)])
        distinct = distinct_prefixes([prompt.input_ids for prompt in prompts])
        assert tokens_run(model, prompts, batch_size=4) <= 1.6 * distinct

    def test_are_run_once_for_equal_and_nested_prompts(self) -> None:
        model = tiny.build("llama", max_position_embeddings=2048)
        long = [n % 290 + 10 for n in range(600)]
        nested = [ReadPrompt(long[:length], [length - 1]) for length in (600, 600, 590, 300, 600)]
        short = last([[7, 8, 9, n] for n in range(10, 40)])
        assert tokens_run(model, nested, batch_size=4) == 600
        assert tokens_run(model, [*nested, *short], batch_size=4) <= 2 * (600 + 33)


class TestRopeThatDependsOnLength:
    @pytest.mark.parametrize("kind", ["longrope", "dynamic"])
    def test_a_position_inside_is_what_the_whole_prompt_gives(self, kind: str) -> None:
        prompts = [ReadPrompt([*range(11, 51)], [3]), ReadPrompt([*range(11, 51)], [30]), ReadPrompt([5, 6, 7], [1])]
        model = tiny.scaled_rope(kind)
        rows = rows_by_prompt(Extractor(model, sites_of(model, [1]), batch_size=8)(prompts))
        for number, prompt in enumerate(prompts):
            (position,) = prompt.positions
            expected = tiny.hidden_states(tiny.scaled_rope(kind), prompt.input_ids)[1][position]
            torch.testing.assert_close(rows[1, number], expected, atol=2e-5, rtol=1e-4)

    def test_frequencies_that_the_model_keeps_are_as_before_and_move_no_later_window(self) -> None:
        model = tiny.scaled_rope("dynamic")
        before = tiny.hidden_states(tiny.scaled_rope("dynamic"), [*range(11, 31)])
        extractor = Extractor(model, sites_of(model), batch_size=8)
        for _window in range(2):
            rows = rows_by_prompt(extractor(last([[*range(11, 31)], [*range(11, 71)]])))
            torch.testing.assert_close(rows[2, 0], before[2][-1], atol=2e-5, rtol=1e-4)
        for layer, state in enumerate(tiny.hidden_states(model, [*range(11, 31)])):
            assert torch.equal(state, before[layer])

    @pytest.mark.parametrize("kind", ["longrope", "dynamic"])
    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_rows_are_what_each_prompt_alone_gives(self, kind: str, batch_size: int) -> None:
        model = tiny.scaled_rope(kind)
        prompts = [*SHARING, [*range(11, 60)], [*range(11, 60), 7], [*range(80, 100)]]
        rows = rows_by_prompt(Extractor(model, sites_of(model), batch_size=batch_size)(last(prompts)))
        for number, prompt in enumerate(prompts):
            expected = tiny.hidden_states(tiny.scaled_rope(kind), prompt)
            for layer in range(tiny.LAYERS):
                torch.testing.assert_close(rows[layer, number], expected[layer][-1], atol=2e-5, rtol=1e-4)


def varied_prompts(count: int) -> list[list[int]]:
    """Prompts of many lengths under two common beginnings."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist()

    beginnings = [ids(12), ids(5)]
    return [beginnings[number % 2] + ids(3 + number % 7) for number in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_decoders_pass_under_autocast_and_have_the_rows_of_each_prompt_alone(
    architecture: str, dtype: torch.dtype
) -> None:
    model, prompts = tiny.shared(architecture), varied_prompts(12)
    with torch.autocast("cpu", dtype):
        rows = rows_by_prompt(extract_rows(model, sites_of(model, [1]), last(prompts), rows_per_pass=8))
        for number, prompt in enumerate(prompts):
            alone = states_of(model, prompt)[1][-1]
            assert (rows[1, number] - alone).norm() <= 5e-2 * alone.norm()


class TestMixturesOfExperts:
    """Their routers make a jump of what rounding does: which experts a token is sent to."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rows_in_half_precision_are_bit_for_bit_those_of_each_prompt_alone(self, dtype: torch.dtype) -> None:
        model, prompts = tiny.build("mixtral").to(dtype), varied_prompts(12)
        rows = rows_by_prompt(extract_rows(model, sites_of(model, [0, 1]), last(prompts), rows_per_pass=8))
        for number, prompt in enumerate(prompts):
            states = states_of(model, prompt)
            for layer in (0, 1):
                assert torch.equal(rows[layer, number], states[layer][-1])

    def test_rows_under_autocast_are_those_of_each_prompt_alone_there(self) -> None:
        model, prompts = tiny.build("mixtral"), varied_prompts(12)
        with torch.autocast("cpu", torch.bfloat16):
            rows = rows_by_prompt(extract_rows(model, sites_of(model, [1]), last(prompts), rows_per_pass=8))
            for number, prompt in enumerate(prompts):
                assert torch.equal(rows[1, number], states_of(model, prompt)[1][-1])

    @pytest.mark.parametrize(
        ("architecture", "dtype", "is_alone"),
        [
            ("mixtral", torch.bfloat16, True),
            ("mixtral", torch.float32, False),
            ("llama", torch.bfloat16, False),
        ],
    )
    def test_only_where_both_meet_does_each_prompt_run_alone(
        self, architecture: str, dtype: torch.dtype, is_alone: bool
    ) -> None:
        model = tiny.build(architecture).to(dtype)
        extractor = Extractor(model, sites_of(model, [1]), batch_size=4)
        assert isinstance(extractor._ways[0], OneAtATime) is is_alone

    def test_a_token_that_is_sent_to_another_expert_is_not_taken_for_one_that_sees_what_follows(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = tiny.build("mixtral").bfloat16()
        alone = read_model.ReadModel.alone

        def rerouted(self: Any, input_ids: Any, positions: Any, **kwargs: Any) -> dict[int, Tensor]:
            rows = alone(self, input_ids, positions, **kwargs)
            rows[1][-1] += rows[1][-1].flip(0) * (len(input_ids) > 3)
            return rows

        monkeypatch.setattr(read_model.ReadModel, "alone", rerouted)
        check_causal(model, sites_of(model, [1]), PROMPTS[0])
        with pytest.raises(ValueError, match="is not a decoder-only"):
            check_causal(model.float(), sites_of(model, [1]), PROMPTS[0])

    @pytest.mark.skipif(tiny.ON_TRANSFORMERS_4, reason="its masks are made otherwise")
    @pytest.mark.parametrize("length", [2, 3, 12])
    def test_one_whose_tokens_see_what_follows_is_refused(self, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny.build("mixtral", attn_implementation="eager").bfloat16()
        for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
            monkeypatch.setattr(transformers.models.mixtral.modeling_mixtral, name, lambda **_kwargs: None)
        with pytest.raises(ValueError, match="is not a decoder-only"):
            check_causal(model, sites_of(model, [1]), PROMPTS[1][:length])

    def test_a_model_that_is_cast_on_the_way_is_looked_at_again(self) -> None:
        model, prompts = tiny.build("mixtral"), varied_prompts(4)
        extractor = Extractor(model, sites_of(model, [1]), batch_size=4)
        list(extractor(last(prompts)))
        model.bfloat16()
        rows = rows_by_prompt(extractor(last(prompts)))
        for number, prompt in enumerate(prompts):
            assert torch.equal(rows[1, number], states_of(model, prompt)[1][-1])
