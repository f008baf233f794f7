"""Time and memory of training against the number of pairs and against the prompts' length, on a tiny model.

    python benchmarks/scaling.py [--most 100000]

Prompts are token ids. The two of a pair differ in their last token, and all share a stem of half their length.
Training's cost is that of the distinct prefixes: the last two columns should stay about what they are.
"""

import argparse
import random
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steering_vectors import train_steering_vector
from steering_vectors._extraction.packs import pack_prompts

Pairs = list[tuple[list[int], list[int]]]


def pairs_of(count: int, length: int) -> Pairs:
    draw = random.Random(0)
    stem = [draw.randrange(3, 1000) for _ in range(length // 2)]
    pairs: Pairs = []
    for _ in range(count):
        own = [draw.randrange(3, 1000) for _ in range(length - len(stem) - 1)]
        pairs.append(([*stem, *own, 1], [*stem, *own, 2]))
    return pairs


def no_tokenizer(_text: str) -> Any:
    raise AssertionError("token ids need none")


def measure(model: Any, count: int, length: int) -> None:
    pairs = pairs_of(count, length)
    prompts = [prompt for pair in pairs for prompt in pair]
    start = time.perf_counter()
    packs = list(pack_prompts(prompts, [[length - 1]] * len(prompts), range(len(prompts))))
    packing = time.perf_counter() - start
    tokens = sum(map(len, packs))
    del packs, prompts
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    start = time.perf_counter()
    train_steering_vector(model, no_tokenizer, pairs, batch_size=16)
    seconds = time.perf_counter() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    megabytes = (int(peak.split()[1]) * 1024 - before) / 1e6
    print(
        f"{count:8}{length:8}{2 * count * length:12}{tokens:12}{packing:10.2f}{seconds:10.2f}{megabytes:8.0f}"
        f"{1e6 * seconds / tokens:14.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=100_000, help="the largest number of pairs")
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    measured = (("pairs", 8), ("length", 8), ("tokens", 12), ("packed", 12), ("packing s", 10), ("s", 10))
    print("".join(f"{name:>{width}}" for name, width in measured) + f"{'MB':>8}{'us a packed':>14}")
    with torch.inference_mode():
        train_steering_vector(model, no_tokenizer, pairs_of(10, 20))
    for count in (count for count in (100, 1_000, 10_000, 100_000) if count <= options.most):
        measure(model, count, 24)
    for length in (50, 100, 200, 400):
        measure(model, 500, length)


if __name__ == "__main__":
    main()
