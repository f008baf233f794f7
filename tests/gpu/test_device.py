"""The core of the laws on a device, ``DEVICE`` (cuda), in each dtype, for each cache and attention; see promises.py."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

from benchmarks import steering as benchmark
from steering_vectors import SteeringVector, generated, record_activations, train_steering_vector
from tests import families, tiny
from tests.gpu.promises import (
    DEVICE,
    DIRECTIONS,
    DTYPES,
    LOGITS,
    STEPS,
    distance,
    gap,
    generate,
    last_tokens,
    logits_by_hand,
    on_device,
    padded,
)
from tests.wrapped.promises import unchanged

AtMost = Callable[[str, str, float, float], None]
PROMPTS = [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27, 28], [31, 32, 33]]
WIDTH = max(map(len, PROMPTS))
# name → what is given as tokens=, and the first column that it selects
SELECTIONS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], int]] = {
    "all": (lambda inputs: None, 0),
    "generated(inputs)": (generated, WIDTH - 1),
    "generated()": (lambda inputs: generated(), WIDTH - 1),
}
LAYERS = (0, 2)

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_selection = pytest.mark.parametrize("selection", SELECTIONS)
on_gpus = pytest.mark.skipif(DEVICE != "cuda", reason="a GPU's own")


def vector_for(model: Any, *layers: int, scale: float = 1.0) -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    return SteeringVector({n: scale * torch.randn(model.config.hidden_size, generator=generator) for n in layers})


@cache
def model_in(dtype: str, architecture: str = "llama") -> Any:
    return on_device(architecture, dtype)


def worst_gap(model: Any, selection: str, inputs: dict[str, Tensor], **options: Any) -> float:
    """The gap of steered generation from passes that are steered by hand; it is no steering that leaves no gap."""
    vector, (select, first) = vector_for(model, *LAYERS), SELECTIONS[selection]
    first = min(first, inputs["input_ids"].shape[1] - 1)
    blocks = tiny.blocks(model)
    with vector.apply(model, tokens=select(inputs)):
        rows, logits = generate(model, inputs, **options)
    expected = logits_by_hand(model, blocks, inputs, rows, vector.layer_activations, first)
    assert gap(logits_by_hand(model, blocks, inputs, rows, {}, 0), expected) > 1
    return gap(logits, expected)


class TestLaws:
    @pytest.mark.parametrize("operator", families.OPERATORS)
    @each_dtype
    def test_reads_where_it_writes(self, dtype: str, operator: str, at_most: AtMost) -> None:
        model, inputs, case = model_in(dtype), padded(*PROMPTS), families.OPERATORS[operator]
        vector = vector_for(model, 1)
        runs = []
        for tokens in (None, generated(inputs)):
            steered = nullcontext() if tokens is None else vector.apply(model, operator=case.make(), tokens=tokens)
            with steered, record_activations(model, layers=[0, 1]) as records, torch.no_grad():
                model(**inputs)
            runs.append([records[n][0] for n in (0, 1)])
        (below, before), (same, after) = runs
        assert after.dtype is DTYPES[dtype]
        assert after.device == before.device
        assert torch.equal(same, below)
        assert torch.equal(after[:, :-1], before[:, :-1])
        expected = case.by_hand(before[:, -1].double().cpu(), vector.layer_activations[1].double())
        error = (after[:, -1].double().cpu() - expected).abs().max() / expected.abs().max()
        at_most("recorded = recorded outside + delta", dtype, float(error), 4 * torch.finfo(DTYPES[dtype]).eps)

    @pytest.mark.parametrize("use_cache", [True, False])
    @each_selection
    @each_dtype
    def test_cached_and_uncached_are_as_by_hand(
        self, dtype: str, selection: str, use_cache: bool, at_most: AtMost
    ) -> None:
        if selection == "generated()" and not use_cache:
            pytest.skip("without a cache it raises")
        model = model_in(dtype)
        worst = worst_gap(model, selection, padded(*PROMPTS), use_cache=use_cache)
        at_most(f"{'cached' if use_cache else 'uncached'} = by hand", dtype, worst, LOGITS[dtype])

    @each_dtype
    def test_rows_have_multipliers_of_their_own(self, dtype: str, at_most: AtMost) -> None:
        model, inputs, multipliers = model_in(dtype), padded(*PROMPTS), torch.tensor([1.5, 0.0, -2.0])
        vector = vector_for(model, *LAYERS)
        with vector.apply(model, multiplier=multipliers.tolist(), tokens=generated(inputs)):
            rows, logits = generate(model, inputs)
        moves = {n: multipliers[:, None, None] * d for n, d in vector.layer_activations.items()}
        expected = logits_by_hand(model, tiny.blocks(model), inputs, rows, moves, WIDTH - 1)
        at_most("multipliers by row = by hand", dtype, gap(logits, expected), LOGITS[dtype])

    @each_dtype
    def test_leaves_nothing_behind_and_multiplier_0_is_no_steering(self, dtype: str) -> None:
        model, inputs = model_in(dtype), padded(*PROMPTS)
        with unchanged(model):
            rows, plain = generate(model, inputs)
            with vector_for(model, *LAYERS).apply(model, multiplier=0, tokens=generated(inputs)):
                same_rows, same = generate(model, inputs)
            with pytest.raises(RuntimeError, match="by the test"), vector_for(model, *LAYERS).apply(model):
                raise RuntimeError("by the test")
            after_rows, after = generate(model, inputs)
        for got, logits in ((same_rows, same), (after_rows, after)):
            assert torch.equal(got, rows)
            assert torch.equal(logits, plain)

    def test_gradients_reach_a_direction_on_the_cpu(self, at_most: AtMost) -> None:
        gradients = []
        for device in ("cpu", DEVICE):
            model = tiny.build("llama").to(device)
            direction = torch.ones(tiny.HIDDEN, requires_grad=True)
            ids = torch.tensor([PROMPTS[1]], device=device)
            with SteeringVector({1: direction}).apply(model):
                loss = model(ids).logits.logsumexp(dim=-1).sum()
            gradients += torch.autograd.grad(loss, direction)
        assert gradients[1].device.type == "cpu"
        at_most("gradient = the CPU's", "float32", distance(gradients[1], gradients[0]), 1e-3)


class TestCaches:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize(
        ("architecture", "dtype", "selection"),
        [
            *(("llama", "float32", selection) for selection in SELECTIONS),
            ("llama", "bfloat16", "generated(inputs)"),
            ("gemma3", "bfloat16", "generated(inputs)"),
        ],
    )
    def test_a_static_cache_that_generate_compiles_by_itself(
        self, architecture: str, dtype: str, selection: str, at_most: AtMost
    ) -> None:
        model, inputs = on_device(architecture, dtype), padded(*PROMPTS)
        options: dict[str, Any] = {"cache_implementation": "static", **compiled()}
        for run in ("first", "second"):  # the second finds the first one's cache and code
            worst = worst_gap(model, selection, inputs, **options)
            assert torch._dynamo.utils.counters["frames"]["ok"] > 0
            at_most(f"static cache, compiled, {run} run", f"{architecture} {dtype}", worst, LOGITS[dtype])
        rows, logits = generate(model, inputs, **options)
        plain = logits_by_hand(model, tiny.blocks(model), inputs, rows, {}, 0)
        at_most("static cache, compiled, unsteered after", f"{architecture} {dtype}", gap(logits, plain), LOGITS[dtype])

    @on_gpus
    @each_selection
    @pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
    def test_an_offloaded_cache(self, implementation: str, selection: str, at_most: AtMost) -> None:
        model = on_device("llama", "bfloat16")
        worst = worst_gap(model, selection, padded(*PROMPTS), cache_implementation=implementation)
        at_most("offloaded cache", implementation, worst, LOGITS["bfloat16"])

    @pytest.mark.parametrize("selection", ["all", "generated(inputs)"])
    @each_dtype
    def test_a_prompt_in_chunks(self, dtype: str, selection: str, at_most: AtMost) -> None:
        worst = worst_gap(model_in(dtype), selection, padded(*PROMPTS), prefill_chunk_size=3)
        at_most("prompt in chunks", dtype, worst, LOGITS[dtype])


def compiled() -> dict[str, Any]:
    """On a GPU generate compiles by itself; a CPU must be told to, and has perhaps no compiler."""
    if DEVICE == "cuda":
        return {}
    config = transformers.CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}


class TestAttention:
    @pytest.mark.parametrize("selection", ["all", "generated(inputs)"])
    @pytest.mark.parametrize("way", ["eager", "sdpa", "flash kernel of sdpa", "flash_attention_2"])
    def test_of_each_kind(self, way: str, selection: str, at_most: AtMost) -> None:
        if way == "flash_attention_2" and not (DEVICE == "cuda" and is_flash_attn_2_available()):
            pytest.skip("flash-attn is not installed")
        model = on_device("llama", "bfloat16")
        model.set_attn_implementation(way if way in ("eager", "flash_attention_2") else "sdpa")
        inputs = padded(PROMPTS[1])  # a mask keeps the flash kernel out
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if "kernel" in way else nullcontext():
            worst = worst_gap(model, selection, inputs)
        at_most("attention", way, worst, LOGITS["bfloat16"])
        error = training_error(model)
        at_most("training under each attention", way, error, DIRECTIONS["bfloat16"])


class TestSplitModels:
    """Some layers are on the device; the others are loaded there when they run, or run on the CPU."""

    @pytest.fixture(params=["offloaded", "split"])
    def model(self, request: pytest.FixtureRequest, tmp_path: Path) -> Any:
        accelerate = pytest.importorskip("accelerate")
        model = tiny.build("llama")
        if request.param == "split":
            model.to(DEVICE)
            last = model.model.layers[2].to("cpu")
            hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
            accelerate.hooks.add_hook_to_module(last, hook)
            return model
        away = "cpu" if DEVICE == "cuda" else "disk"
        places = {"model.embed_tokens": DEVICE, "model.rotary_emb": DEVICE, "model.norm": DEVICE, "lm_head": DEVICE}
        places |= {"model.layers.0": DEVICE, "model.layers.1": away, "model.layers.2": away}
        return accelerate.dispatch_model(model, places, main_device=DEVICE, offload_dir=tmp_path)

    @each_selection
    def test_are_steered_as_by_hand(self, model: Any, selection: str, at_most: AtMost) -> None:
        at_most("split model, steered", "float32", worst_gap(model, selection, padded(*PROMPTS)), LOGITS["float32"])

    def test_are_trained_on(self, model: Any, at_most: AtMost) -> None:
        at_most("split model, trained on", "float32", training_error(model), DIRECTIONS["float32"])


PAIRS = [([5, 6, 7, *range(20, 30 + n), 100 + n, 8], [5, 6, 7, *range(20, 30 + n), 200 - n, 9]) for n in range(24)]


def no_tokenizer(_text: str) -> Any:
    raise AssertionError("token ids need none")


def training_error(model: Any, batch_size: int = 4) -> float:
    """The largest distance of a trained direction from that of a loop over single prompts, over the layers."""
    with unchanged(model):
        vector = train_steering_vector(model, no_tokenizer, PAIRS, batch_size=batch_size)
    blocks = tiny.blocks(model)
    positive, negative = (last_tokens(model, blocks, [pair[side] for pair in PAIRS]) for side in (0, 1))
    expected = (positive - negative).mean(dim=0)  # (layers, hidden)
    return max(distance(vector.layer_activations[n], expected[n]) for n in range(len(blocks)))


class TestTraining:
    @pytest.mark.parametrize("batch_size", [1, 16])
    @each_dtype
    def test_in_packs_is_that_of_single_prompts(self, dtype: str, batch_size: int, at_most: AtMost) -> None:
        error = training_error(model_in(dtype), batch_size)
        at_most("training = single prompts", dtype, error, DIRECTIONS[dtype])

    @each_dtype
    def test_runs_shared_beginnings_once(self, dtype: str, at_most: AtMost, monkeypatch: pytest.MonkeyPatch) -> None:
        model, tokens = model_in(dtype), 0
        norm = type(model.model.norm)
        forward = norm.forward

        def counting(self: Any, hidden: Tensor) -> Any:  # no hook, under which prompts don't run together
            nonlocal tokens
            tokens += hidden.shape[0] * hidden.shape[1] if self is model.model.layers[0].input_layernorm else 0
            return forward(self, hidden)

        monkeypatch.setattr(norm, "forward", counting)
        train_steering_vector(model, no_tokenizer, PAIRS, batch_size=4)
        at_most("tokens run of tokens given", dtype, tokens / sum(len(p) for pair in PAIRS for p in pair), 0.5)


class TestLargeModel:
    """A random Llama of a billion weights in bfloat16 on a GPU; a small one on a CPU."""

    @pytest.fixture(scope="class")
    def model(self) -> Any:
        model = benchmark.billion() if DEVICE == "cuda" else benchmark.tiny().bfloat16()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model

    def test_generates_steered_as_by_hand(self, model: Any, at_most: AtMost) -> None:
        inputs = padded(*PROMPTS)
        # Not much longer than the stream, which would vanish beside it in the last norm.
        vector = vector_for(model, *LAYERS, scale=0.2)
        with vector.apply(model, tokens=generated(inputs)):
            rows, logits = generate(model, inputs)
        expected = logits_by_hand(model, tiny.blocks(model), inputs, rows, vector.layer_activations, WIDTH - 1)
        assert gap(logits_by_hand(model, tiny.blocks(model), inputs, rows, {}, 0), expected) > 1
        # More layers and more logits, so a larger worst one.
        at_most("large model, cached = by hand", "bfloat16", gap(logits, expected), 2 * LOGITS["bfloat16"])

    def test_is_trained_on(self, model: Any, at_most: AtMost) -> None:
        at_most("large model, training = single prompts", "bfloat16", training_error(model), DIRECTIONS["bfloat16"])


@on_gpus
class TestTransfers:
    """Copies between host and device, and waits, beyond those of the unsteered model."""

    @pytest.mark.parametrize(
        ("selection", "in_prefill"), [("all", 0), ("generated(inputs)", 2)]
    )  # one read: a copy and the wait for it
    def test_none_in_a_step_and_few_in_a_prefill(self, selection: str, in_prefill: int, at_most: AtMost) -> None:
        model = on_device("llama", "bfloat16")
        inputs = padded(PROMPTS[1])
        vector, (select, _) = vector_for(model, *LAYERS), SELECTIONS[selection]
        prefill, steps = counted(model, inputs)
        with vector.apply(model, tokens=select(inputs)):
            benchmark.time_steps(model, model, inputs, STEPS)  # the directions are brought to the device
            steered_prefill, steered_steps = counted(model, inputs)
        at_most("transfers and waits in a prefill", selection, steered_prefill - prefill, in_prefill)
        at_most("transfers and waits in the steps", selection, steered_steps - steps, 0)


def counted(model: Any, inputs: dict[str, Tensor]) -> tuple[int, int]:
    """Transfers and waits in a prefill, and in the steps after one."""
    prefill = benchmark.transfers(lambda: benchmark.time_prefill(model, model, inputs))
    return prefill, benchmark.transfers(lambda: benchmark.time_steps(model, model, inputs, STEPS)) - prefill
