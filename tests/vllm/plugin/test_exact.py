"""vLLM with the plugin computes what Hugging Face computes with ``vec.apply``, from the same files.

``make test-vllm`` runs this in an environment of its own.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.vllm.plugin.comparison import SIZES, Request, Served, compared, ids, prepared, run
from tests.vllm.plugin.conftest import ShowCase

pytest.importorskip("vllm")

EXACT = 5e-4
# Seven requests: without steering, three of one vector, a sum, and two that leave the prompt alone.
SEVEN: list[Request] = [
    (ids(1, 20), None, 6),
    (ids(1, 20), "first:1.0", 6),
    (ids(2, 9), "middle:-1.5", 6),
    (ids(3, 14), "both:0.75", 6),
    (ids(2, 9), "first:0.5,both:1.0", 6),
    (ids(1, 20), "middle:-1.5@generated", 6),
    (ids(4, 1), "middle:1,first:-1@generated", 6),
]


def llama(folder: Path) -> Served:
    return prepared(folder, tiny.build("llama", **SIZES))


def check(show: ShowCase, case: str, served: Served, batches: list[list[Request]], **options: Any) -> dict[str, Any]:
    made = run(served, batches, **options)
    off, effect = compared(served, [request for batch in batches for request in batch], made["answers"])
    show(case, off, effect)
    assert off < EXACT
    assert effect > 100 * EXACT
    return made


def test_a_real_model(smollm2: Any, tmp_path: Path, show: ShowCase) -> None:
    served = prepared(tmp_path, smollm2[0], Path(smollm2[0].name_or_path))
    check(show, "SmolLM2-135M, seven requests in a batch", served, [SEVEN])


def test_a_compiled_model_beside_the_same_compiled_unsteered(tmp_path: Path, show: ShowCase) -> None:
    """What was compiled for the one is not taken for the other: each has its place in the cache of compiled graphs."""
    served = llama(tmp_path)
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    unsteered = [request for request in SEVEN if request[1] is None]
    first = run(served, [unsteered], environment={**cache, "STEERING_VECTORS_DIR": ""}, enforce_eager=False)
    assert compared(served, unsteered, first["answers"])[0] < EXACT
    made = check(show, "compiled", served, [SEVEN], environment=cache, enforce_eager=False)
    assert "Warming up model for the compilation" in made["log"]
    assert len(list((tmp_path / "cache/torch_compile_cache/torch_aot_compile").iterdir())) == 2


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_a_compiled_model_on_two_processes(tmp_path: Path, show: ShowCase, kind: str) -> None:
    served = prepared(tmp_path, tiny.build("llama", **{**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 4}))
    options = {f"{kind}_parallel_size": 2, "distributed_executor_backend": "mp"}
    check(show, f"{kind} parallel 2, compiled", served, [SEVEN], enforce_eager=False, **options)


def test_prompts_in_chunks(tmp_path: Path, show: ShowCase) -> None:
    """Steps of 48 tokens: the prompts' last tokens are inside chunks, beside tokens of other requests."""
    served = llama(tmp_path)
    batch: list[Request] = [
        (ids(n, length), steering, 6)
        for n, (length, steering) in enumerate(
            [
                (70, "middle:1@generated"),
                (61, "first:1"),
                (70, None),
                (50, "both:1,first:-1@generated"),
                (31, "middle:2"),
            ]
        )
    ]
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 8, "enable_chunked_prefill": True}
    check(show, "prompts of up to 70 tokens in chunks of 48", served, [batch], **options)


def test_preempted_requests(tmp_path: Path, show: ShowCase) -> None:
    served = llama(tmp_path)
    batch: list[Request] = [(ids(n, 20), steering, 40) for n, (_, steering, _) in enumerate(SEVEN)]
    made = check(show, "preemption, six blocks", served, [batch], num_gpu_blocks_override=6, block_size=32)
    assert made["counters"]["vllm:num_preemptions"] > 0


def test_accepted_drafts(tmp_path: Path, show: ShowCase) -> None:
    served = llama(tmp_path)
    lookup = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    batch: list[Request] = [(ids(n, 6) * 3, steering, 40) for n, (_, steering, _) in enumerate(SEVEN)]
    made = check(show, "drafts of n-grams", served, [batch], speculative_config=lookup)
    assert made["counters"]["vllm:spec_decode_num_accepted_tokens"] > 20


def test_the_prefix_cache_keeps_steered_and_unsteered_tokens_apart(tmp_path: Path, show: ShowCase) -> None:
    served = llama(tmp_path)
    prompt = ids(7, 104)
    asked = [None, "both:1", "both:1@generated", "both:2@generated", "middle:1", None, "both:1", "both:1@generated"]
    made = check(
        show, "prefix cache", served, [[(prompt, steering, 6)] for steering in asked], block_size=32, max_model_len=128
    )
    # Three blocks of 32 are full; the steering of generated tokens begins in the fourth.
    assert [answer["cached"] for answer in made["answers"]] == [0, 0, 96, 96, 0, 96, 96, 96]


def test_a_second_turn_that_holds_a_steered_answer(tmp_path: Path, show: ShowCase) -> None:
    served = llama(tmp_path)
    steering = "both:1@generated"
    prompt = ids(8, 40)
    (first,) = run(served, [[(prompt, steering, 30)]], block_size=32, max_model_len=128)["answers"]
    second = [*prompt, *first["tokens"], *ids(9, 5)]
    batches = [[(prompt, steering, 30)], [(second, steering, 6)], [(second, "both:1", 6)], [(second, None, 6)]]
    made = check(show, "second turn after a steered answer", served, batches, block_size=32, max_model_len=128)
    # Only the first block was unsteered in the first turn.
    assert [answer["cached"] for answer in made["answers"]][:2] == [0, 32]


def test_a_lora_beside_steering(tmp_path: Path, show: ShowCase) -> None:
    """With and without an adapter, in the same batches, by turns through the same prefix cache."""
    peft = pytest.importorskip("peft")
    served = llama(tmp_path)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, lora_alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    tuned = peft.get_peft_model(copy.deepcopy(served.model), config)
    tuned.save_pretrained(tmp_path / "adapter")
    adapted = Served(tuned.merge_and_unload(), served.path, served.vectors)
    prompt = ids(7, 104)
    batches: list[list[Request]] = [
        [(prompt, steering, 6)] * 2 for steering in (None, "both:1", "both:1@generated", "middle:1", None)
    ]
    batches.append([request for request in SEVEN for _ in range(2)])
    # On a CPU one place for adapters must stay free.
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "block_size": 32, "max_model_len": 128}
    answers = run(served, batches, adapter=tmp_path / "adapter", **options)["answers"]
    requests = [request for batch in batches for request in batch]
    assert [answer["cached"] for answer in answers[:10]] == [0, 0, 0, 0, 96, 96, 0, 0, 96, 96]
    for name, reference, first in (("without", served, 0), ("with", adapted, 1)):
        off, effect = compared(reference, requests[first::2], answers[first::2])
        show(f"{name} a LoRA, in the same batches", off, effect)
        assert off < EXACT
        assert effect > 100 * EXACT
    assert compared(served, requests[1::2], answers[1::2])[0] > 100 * EXACT


FAMILIES = {
    "gemma2": {"attn_implementation": "eager"},
    "gemma3": {},
    "gpt2": {"n_embd": 64, "n_head": 2},
    "gpt_neox": {"hidden_size": 64, "num_attention_heads": 2},
    "granite": {},
    "mistral": {},
    "olmo2": {},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 2},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(tmp_path: Path, show: ShowCase, family: str) -> None:
    sizes = {
        name: value
        for name, value in SIZES.items()
        if name != "head_dim" or family.startswith(("g", "mistral", "qwen3"))
    }
    settings = FAMILIES[family] if family.startswith(("gpt", "opt")) else {**sizes, **FAMILIES[family]}
    served = prepared(tmp_path, tiny.build(family, **settings))
    check(show, f"{family}", served, [SEVEN])


@pytest.mark.parametrize(
    ("fault", "again"), [("no key", None), ("salt without the length", "both:1@generated"), ("not armed", None)]
)
def test_a_fault_is_noticed(tmp_path: Path, show: ShowCase, fault: str, again: str | None) -> None:
    """Without the key of blocks, with a salt that lacks where steering begins, and with blocks that add nothing."""
    served = llama(tmp_path)
    prompt, steering = ids(8, 40), "both:1@generated"
    batches = [[(prompt, steering, 30)]]
    (first,) = run(served, batches, block_size=32, max_model_len=128)["answers"]
    second = [*prompt, *first["tokens"], *ids(9, 5)]
    batches += [[(second, again, 6)]]
    made = run(served, batches, block_size=32, max_model_len=128, fault=fault)
    off, effect = compared(served, [request for batch in batches for request in batch], made["answers"])
    show(f"with a fault: {fault}", off, effect)
    assert off > 100 * EXACT
