"""The copies in which merged models are made: their precision, their dtypes, and what they don't hold."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steering_vectors import SteeringVector, ablate_everywhere, monitor, record_activations, steer
from steering_vectors.merging import biases, merge, merge_ablation, projecting
from tests import tiny
from tests.merging.cases import DIRECTION, VECTOR
from tests.merging.fresh import IDS, lively, logits

pytestmark = [
    pytest.mark.xdist_group("merging"),
    # those of old versions of transformers
    pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"),
]

MERGES: dict[str, Callable[[Any], Any]] = {
    "added": lambda model: merge(VECTOR, model, multiplier=0.5),
    "ablated": lambda model: merge_ablation(model, DIRECTION),
}


def steered(kind: str, model: Any) -> Tensor:
    with VECTOR.apply(model, multiplier=0.5) if kind == "added" else ablate_everywhere(model, DIRECTION):
        return logits(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
class TestAWayThatIsWrongByTwoPercent:
    """Less than what half precision rounds away."""

    def test_is_noticed_in_a_bias(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        add = biases._add
        monkeypatch.setattr(biases, "_add", lambda bias, direction, factor: add(bias, direction, 1.02 * factor))
        with pytest.raises(ValueError, match="the merged model would compute something else than the steered model"):
            merge(VECTOR, lively("llama").to(dtype))

    def test_is_noticed_in_an_ablation(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        def project(weight: Tensor, units: Tensor, axis: int) -> None:
            moved = weight.data.movedim(axis, -1)
            moved -= 0.98 * (moved @ units.to(moved).T) @ units.to(moved)

        monkeypatch.setattr(projecting, "project", project)
        with pytest.raises(ValueError, match="the merged model would compute something else"):
            merge_ablation(lively("llama").to(dtype), DIRECTION)


@pytest.mark.parametrize("kind", MERGES)
class TestWeightsOfSeveralDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_are_merged_and_keep_them(self, kind: str, dtype: torch.dtype) -> None:
        model: Any = lively("llama")
        expected = steered(kind, model)
        model.lm_head.to(dtype)
        model.model.layers[0].mlp.to(dtype)
        made = MERGES[kind](model)
        for name, weight in made.named_parameters():
            assert weight.dtype == (dtype if name.startswith(("lm_head", "model.layers.0.mlp")) else torch.float32)
        torch.testing.assert_close(logits(made.float()), expected, atol=0.05, rtol=0)


def test_weights_of_several_dtypes_are_refused_where_the_model_becomes_a_llama_model() -> None:
    model: Any = tiny.build("qwen2")
    model.lm_head.bfloat16()
    with pytest.raises(ValueError, match="but its weights have several dtypes"):
        merge(VECTOR, model)


@pytest.mark.parametrize("kind", MERGES)
def test_flash_attention_which_needs_half_precision_is_kept_for_the_result(kind: str) -> None:
    model: Any = lively("llama").bfloat16()
    expected = steered(kind, model)
    model.config._attn_implementation = "flash_attention_2"
    made = MERGES[kind](model)
    assert made.config._attn_implementation == "flash_attention_2"
    made.config._attn_implementation = "eager"
    torch.testing.assert_close(logits(made), expected, atol=0.15, rtol=0)


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_of_the_caller_rounds_nothing(kind: str, dtype: torch.dtype) -> None:
    model = lively("llama").to(dtype)
    expected = MERGES[kind](model).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        found = MERGES[kind](model).state_dict()
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


PRECISION_BY_BACKEND = """
import torch
from tests.merging.test_copies import MERGES, lively
torch.backends.cuda.matmul.fp32_precision = "tf32"
for merged in MERGES.values():
    merged(lively("llama"))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_that_the_caller_allows_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kind: str, precision: Any
) -> None:
    seen = []
    for module in (biases, projecting):
        compare = module.check_equal

        def noting(*args: Any, compare: Any = compare) -> None:
            seen.append(torch.get_float32_matmul_precision())
            compare(*args)

        monkeypatch.setattr(module, "check_equal", noting)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        MERGES[kind](lively("llama"))
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch before 2.9")
def test_precision_that_was_set_by_backend_stays() -> None:
    """In a process of its own, since PyTorch reads the old setting no more."""
    run = subprocess.run([sys.executable, "-c", PRECISION_BY_BACKEND], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_sum_too_large_for_the_dtype_is_refused() -> None:
    model: Any = lively("gpt2").half()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[0] = 4e4
    vector = SteeringVector({1: torch.full((tiny.HIDDEN,), 4e4)})
    with pytest.raises(ValueError, match="c_proj.bias has numbers too large for the model's torch.float16: choose a"):
        merge(vector, model)


def doubled(_module: nn.Module, _args: Any, output: Any) -> Any:
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def doubled_input(_module: nn.Module, args: Any) -> Any:
    return (2 * args[0], *args[1:])


@pytest.mark.parametrize("kind", MERGES)
class TestHooks:
    @pytest.mark.parametrize("before", [False, True])
    def test_of_other_code_are_refused(self, kind: str, before: bool) -> None:
        model: Any = tiny.build("llama")
        part = model.model.layers[1].mlp
        part.register_forward_pre_hook(doubled_input) if before else part.register_forward_hook(doubled)
        with pytest.raises(ValueError, match=r"model.layers.1.mlp has a forward hook, doubled\w* of tests.merging"):
            MERGES[kind](model)

    def test_of_accelerate_are_refused_if_other_code_wrote_them(self, kind: str) -> None:
        hooks = pytest.importorskip("accelerate.hooks")

        class Doubled(hooks.ModelHook):  # type: ignore[misc, name-defined]
            def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
                return 2 * output

        model: Any = tiny.build("llama")
        expected = steered(kind, model)
        hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu"))
        torch.testing.assert_close(logits(MERGES[kind](model)), expected, atol=1e-4, rtol=1e-4)
        hooks.add_hook_to_module(model.model.layers[1].mlp, Doubled())
        hooks.add_hook_to_module(model.model.layers[1].mlp, hooks.AlignDevicesHook(execution_device="cpu"), append=True)
        with pytest.raises(ValueError, match=r"model.layers.1.mlp has a forward hook, .*Doubled of tests.merging"):
            MERGES[kind](model)

    def test_that_replace_forward_are_refused(self, kind: str) -> None:
        model: Any = tiny.build("llama")
        part = model.model.layers[1].mlp
        forward = part.forward
        part.forward = lambda *args: 2 * forward(*args)
        with pytest.raises(ValueError, match=r"model.layers.1.mlp has a forward hook, .*lambda.* of tests.merging"):
            MERGES[kind](model)

    @pytest.mark.parametrize("within", [lambda model: monitor(model, VECTOR), record_activations])
    def test_of_this_library_that_read_are_refused(self, kind: str, within: Any) -> None:
        model: Any = tiny.build("llama")
        with within(model), pytest.raises(ValueError, match="has a forward hook.*or leave the block that has set it"):
            MERGES[kind](model)
        MERGES[kind](model)

    @pytest.mark.parametrize(
        "within",
        [
            VECTOR.apply,
            lambda model: ablate_everywhere(model, DIRECTION),
            lambda model: steer(model, torch.ones_like, layers=1),
        ],
    )
    def test_that_steer_are_refused(self, kind: str, within: Any) -> None:
        model: Any = tiny.build("llama")
        with within(model), pytest.raises(ValueError, match="the model is being steered: leave that block"):
            MERGES[kind](model)

    def test_of_transformers_are_none(self, kind: str) -> None:
        model: Any = tiny.build("llama")
        expected = steered(kind, model)
        model.enable_input_require_grads()
        with torch.no_grad():
            model(IDS, output_hidden_states=True)
        torch.testing.assert_close(logits(MERGES[kind](model)), expected, atol=1e-4, rtol=1e-4)
