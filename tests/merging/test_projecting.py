"""An ablation merged into weights, against the same ablation by hooks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_vectors import SteeringVector, ablate_everywhere
from steering_vectors.ablation import stream_writers
from steering_vectors.merging import merge_ablation
from tests import tiny, tiny_vision
from tests.merging.cases import ABLATED, DIRECTION, SEVERAL, VECTOR, there
from tests.merging.fresh import IDS, lively, logits

pytestmark = [
    pytest.mark.xdist_group("merging"),
    # those of old versions of transformers
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"),
]


def ablated(model: nn.Module, direction: Tensor) -> Tensor:
    with ablate_everywhere(model, direction):
        return logits(model)


@pytest.mark.parametrize("name", there(ABLATED))
class TestEachFamily:
    def test_computes_what_the_ablated_model_does(self, merged: Any, name: str) -> None:
        architecture, settings = ABLATED[name]
        model = lively(architecture, **settings)
        expected, (made, _) = ablated(model, DIRECTION), merged["ablated", name]
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-5)
        assert (expected - logits(model)).abs().max() > 0.05

    def test_saved_and_loaded_in_a_fresh_process_computes_the_same(self, merged: Any, name: str) -> None:
        made, fresh = merged["ablated", name]
        assert torch.equal(made, fresh)


class TestTheCopy:
    @pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
    def test_of_several_directions_lacks_their_span(self, name: str) -> None:
        if not tiny.is_there(name):
            pytest.skip("not in this version of transformers")
        model = lively(name)
        dependent = torch.stack([SEVERAL[0], SEVERAL[1] * 1e-9, SEVERAL[0] - 2 * SEVERAL[2], SEVERAL[2] * 1e6])
        expected = ablated(model, SEVERAL)
        for rows in (SEVERAL, dependent):
            torch.testing.assert_close(logits(merge_ablation(model, rows)), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("name", ["llama", "mixtral", "phi"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_keeps_the_dtype_and_agrees_to_its_rounding(self, name: str, dtype: torch.dtype) -> None:
        model = tiny.build(name).to(dtype)
        made = merge_ablation(model, DIRECTION)
        assert {parameter.dtype for parameter in made.parameters()} == {dtype}
        apart = (logits(made) - ablated(model, DIRECTION)).abs().amax(dim=-1).median()
        assert apart < (0.1 if dtype is torch.bfloat16 else 0.02)

    def test_leaves_the_given_model_as_it_was(self) -> None:
        model = tiny.build("gpt2").train()
        state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
        made: Any = merge_ablation(model, DIRECTION)
        assert model.training
        assert not made.training
        assert model.config.to_dict() == config
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert model.lm_head.weight is model.transformer.wte.weight
        assert made.lm_head.weight is not made.transformer.wte.weight

    def test_has_what_it_writes_at_right_angles_to_the_direction(self) -> None:
        made: Any = merge_ablation(lively("qwen3_moe" if tiny.is_there("qwen3_moe") else "llama"), DIRECTION)
        unit = DIRECTION / DIRECTION.norm()
        names = {name for parts in stream_writers(made).values() for name in parts}
        assert names == {f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn", "mlp")}
        assert (made.model.embed_tokens.weight @ unit).abs().max() < 1e-5
        assert (unit @ made.model.layers[1].self_attn.o_proj.weight).abs().max() < 1e-5

    def test_of_a_vector_of_one_layer_lacks_its_direction(self) -> None:
        model = lively("llama")
        expected = logits(merge_ablation(model, DIRECTION))
        assert torch.equal(logits(merge_ablation(model, SteeringVector({1: DIRECTION}))), expected)

    @pytest.mark.parametrize("size", [1e-20, 1e-40, 1e30])
    def test_does_not_depend_on_the_direction_s_size(self, size: float) -> None:
        model, direction = lively("llama"), DIRECTION.double()
        expected = logits(merge_ablation(model, direction))
        assert torch.equal(logits(merge_ablation(model, size * direction)), expected)
        small = torch.full((tiny.HIDDEN,), 1e-30)  # the square of its norm is zero in float32
        expected = logits(merge_ablation(model, torch.ones(tiny.HIDDEN)))
        torch.testing.assert_close(logits(merge_ablation(model, small)), expected)

    def test_says_that_it_unties_the_embeddings(self) -> None:
        with pytest.warns(UserWarning, match="the embeddings are no longer tied to the head") as caught:
            made: Any = merge_ablation(tiny.build("gpt2"), DIRECTION)
        assert caught[0].filename == __file__
        assert made.config.tie_word_embeddings is False

    def test_of_an_untied_model_says_nothing(self, recwarn: pytest.WarningsRecorder) -> None:
        merge_ablation(tiny.build("llama"), DIRECTION)
        assert not recwarn.list

    def test_generates_what_the_ablated_model_does(self) -> None:
        model: Any = lively("llama")
        made: Any = merge_ablation(model, DIRECTION)
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        with ablate_everywhere(model, DIRECTION):
            expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert torch.equal(made.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "gemma2": ("gemma2", DIRECTION, {}, ValueError, "model.layers.0.post_attention_layernorm, a Gemma2RMSNorm, is not "
        "computed by a linear layer alone: a norm, .*Use ablate_everywhere"),
    "gemma3": ("gemma3", DIRECTION, {}, ValueError, "a Gemma3RMSNorm, is not computed by a linear layer alone"),
    "olmo2": ("olmo2", DIRECTION, {}, ValueError, "a Olmo2RMSNorm, is not computed by a linear layer alone"),
    "bloom": ("bloom", DIRECTION, {}, ValueError, "the input of the first block is not computed by a linear layer"),
    "xglm": ("xglm", DIRECTION, {}, ValueError, "the input of the first block is not computed by a linear layer"),
    "rwkv": ("rwkv", DIRECTION, {}, ValueError, "rwkv.blocks.0, a RwkvBlock, isn't the sum of its input"),
    "zeros": ("llama", torch.zeros(32), {}, ValueError, "the direction is all zeros"),
    "NaN": ("llama", torch.full((32,), torch.nan), {}, ValueError, "NaN or infinite"),
    "a width": ("llama", torch.ones(31), {}, ValueError, "31 numbers"),
    "the whole width": ("llama", torch.randn(40, 32), {}, ValueError, "the directions span all 32 dimensions of the residual "
        "stream, so weights without them would write nothing: ablate fewer"),
    "layers": ("llama", VECTOR, {}, ValueError, "removes one direction, but the vector has those of layers"),
    "a mapping": ("llama", {1: DIRECTION}, {}, TypeError, "direction must be a tensor .*can't remove other directions"),
    "tokens": ("llama", DIRECTION, {"tokens": [1]}, TypeError, "write at every token and layer alike"),
    "a strength": ("llama", DIRECTION, {"strength": 0.5}, TypeError, "write at every token and layer alike"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_exact_is_refused_in_words(case: str) -> None:
    name, direction, arguments, error, message = REFUSED[case]
    if not tiny.is_there(name):
        pytest.skip("not in this version of transformers")
    with pytest.raises(error, match=message):
        merge_ablation(lively(name), direction, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", tiny_vision.FAMILIES)
def test_models_that_read_images_are_refused(family: str) -> None:
    """What the projector of images writes to the stream is not seen in a pass of text."""
    model, _ = tiny_vision.made(family)
    width = model.config.get_text_config().hidden_size
    with pytest.raises(ValueError, match="would leave out what images or sounds write to the stream"):
        merge_ablation(model, torch.ones(width))


def test_a_forgotten_weight_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from steering_vectors.merging import projecting

    found = projecting.writing_weights
    for forgotten in ("embed_tokens", "layers.1.mlp.down_proj"):
        monkeypatch.setattr(
            projecting,
            "writing_weights",
            lambda *args, forgotten=forgotten: {n: a for n, a in found(*args).items() if forgotten not in n},
        )
        with pytest.raises(ValueError, match="is not computed by a linear layer alone"):
            merge_ablation(lively("llama"), DIRECTION)
        monkeypatch.setattr(projecting, "check_complete", lambda *args: None)
        with pytest.raises(ValueError, match="the merged model would compute something else"):
            merge_ablation(lively("llama"), DIRECTION)
        monkeypatch.undo()
