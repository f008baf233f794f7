"""Rounding in mixtures of experts: how far rows of packs and of padded passes are from those of each prompt alone.

    python benchmarks/experts.py [--prompts 96] [--dtypes float32 bfloat16 float16]

The models are tiny and random, and prompts are token ids that share beginnings. Distances are shares of the norm of the
row that a prompt has alone, in the same dtype. The lines "alone, float32" measure rows alone against rows alone of the
same weights in float32, which is what the dtype itself costs. Where a router's scores are close, rounding decides which
expert a token is sent to.

Columns: the median, the 99th percentile and the largest distance; the share of rows that are off by more than 5 %, the
rounding that is allowed in bfloat16; the distance of the vector trained on these rows, as a share of its norm; and the
time of the passes as a share of that of each prompt alone.
"""

import argparse
import random
import time
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from steering_vectors._extraction.conditions import Steered
from steering_vectors._extraction.memory import Memory
from steering_vectors._extraction.read_model import ReadModel, ReadPrompt
from steering_vectors._extraction.ways import OneAtATime, Packed, Rows, Way, find_ways
from steering_vectors._models import anatomy_of

LAYERS, VOCABULARY = 8, 1000
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 64}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama (dense)": ("LlamaConfig", {}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "Qwen2-MoE": ("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 128}),
    "Qwen3-MoE": ("Qwen3MoeConfig", EXPERTS),
    "OLMoE": ("OlmoeConfig", EXPERTS),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
    ),
}
WAYS = {"packs": Packed, "padded": Rows, "alone": OneAtATime}


def built(name: str) -> Any:
    kind, settings = CONFIGS[name]
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or name != "DeepSeek-V3"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**sizes, **settings})).float()
    for parameter in model.parameters():
        if parameter.ndim > 1:  # activations keep their size from layer to layer
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


def prompts_of(count: int) -> list[ReadPrompt]:
    """Pairs that differ in their last words, under one of a few common beginnings."""
    draw = random.Random(0)

    def words(most: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(most // 3, most))]

    stems = [words(40) for _ in range(max(1, count // 16))]
    found = []
    for _ in range(count // 2):
        question = [*draw.choice(stems), *words(20)]
        found += [[*question, *words(6)], [*question, *words(6)]]
    return [ReadPrompt(ids, [len(ids) - 1]) for ids in found]


def rows_of(model: Any, prompts: list[ReadPrompt], kind: type[Way]) -> tuple[Tensor, float]:
    """Return the rows ``(prompts, layers, hidden)`` in float32, and the seconds that they took."""
    anatomy = anatomy_of(model)
    source = ReadModel(anatomy, dict(enumerate(anatomy.blocks)))
    way = next(way for way in find_ways(source, Steered()) if isinstance(way, kind))
    way._due = lambda packs: []  # type: ignore[method-assign]  # the way itself is measured, not its verification
    memory, rows = Memory(), torch.zeros(len(prompts), LAYERS, 128)
    as_run, began = way.as_run(prompts), time.perf_counter()
    for packs in way.passes(as_run, range(len(prompts)), 4, memory):
        numbers, found = way.run(packs, as_run)
        for layer, part in found.items():
            rows[numbers, layer] = part.float()
    return rows, time.perf_counter() - began


def compared(label: str, rows: Tensor, alone: Tensor, seconds: float) -> None:
    apart = ((rows - alone).norm(dim=-1) / alone.norm(dim=-1)).flatten()
    some, others = (found[::2].mean(0) - found[1::2].mean(0) for found in (rows, alone))
    vector = float(((some - others).norm(dim=-1) / others.norm(dim=-1)).max())
    numbers = [float(apart.median()), float(apart.quantile(0.99)), float(apart.max())]
    shown = " ".join(f"{number:9.2g}" for number in numbers)
    print(f"{label:40} {shown} {float((apart > 0.05).float().mean()):9.2%} {vector:9.2g} {seconds:6.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    prompts = prompts_of(options.prompts)
    print(f"{'':40} {'median':>9} {'99 %':>9} {'largest':>9} {'over 5 %':>9} {'vector':>9} {'time':>6}")
    for name in CONFIGS:
        for dtype in options.dtypes:
            model = built(name).to(options.device, getattr(torch, dtype))
            rows = {way: rows_of(model, prompts, kind) for way, kind in WAYS.items()}
            alone, seconds = rows["alone"]
            for way in ("packs", "padded"):
                compared(f"{name}, {dtype}, {way}", rows[way][0], alone, rows[way][1] / seconds)
            exact, _ = rows_of(model.float(), prompts, OneAtATime)
            compared(f"{name}, {dtype}, alone, float32", alone, exact, 1.0)


if __name__ == "__main__":
    main()
