"""Time of evaluations and sweeps against a plain loop, and of a diagnosis against the training alone.

    python benchmarks/evaluation.py [--model FOLDER] [--rounds 3] [--sample 24]

``--model`` is a folder with a causal language model and its tokenizer; without it, a random Llama of SmolLM2's size
takes its place, whose tokens are words. There are 16 items, 8 texts of 24 words, three random vectors as controls, five
multipliers, and in the sweep five layers. Items are ``chats``, with prompts of 44 words, which a short question has in
SmolLM2's template, and answers of 8; or ``choices``, with prompts of 100 words and answers of 2.

The plain loop runs one item or text at one multiplier with one answer in a pass, without a cache. Of its passes a
sample is timed, before and after each of our calls, and the time of all of them is reckoned from it. Ratios are medians
over the rounds.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from compared_libraries import word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from steering_vectors import SteeringVector, generated, train_steering_vector
from steering_vectors.evaluation import Controls, diagnose, evaluate, sweep

MULTIPLIERS = (-2, -1, 0, 1, 2)
ITEMS, TEXTS, RANDOM, PAIRS = 16, 8, 3, 16
KINDS = {"chats": (44, 8), "choices": (100, 2)}  # words of prompts and of answers
TEXT = 24
WORDS = [
    *("people", "who", "read", "old", "books", "about", "ships", "often", "say", "so", "in", "the", "town", "when")
]
WORDS += [*("it", "rains", "and", "nobody", "else", "is", "there", "to", "hear", "them", "while", "we", "wait", "for")]

Item = tuple[str, str, str]


def random_model() -> tuple[Any, Any]:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49_152, num_key_value_heads=3, tie_word_embeddings=True, **sizes))
    return model.eval(), word_tokenizer(sorted(set(WORDS)))


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def answers(draw: random.Random, words: int) -> list[str]:
    """Two answers that differ in their first words."""
    return [" ".join(["", first, *draw.choices(WORDS, k=words - 1)]) for first in draw.sample(WORDS, 2)]


def seconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class PlainLoop:
    """One pass for each item or text, multiplier and answer, under a vector."""

    def __init__(self, model: Any, tokenizer: Any, vector: SteeringVector, items: list[Item], texts: list[str]) -> None:
        self.model, self.tokenizer, self.vector = model, tokenizer, vector
        self.items, self.texts = items, texts

    @torch.no_grad()
    def log_probabilities(self, ids: torch.Tensor, start: int, multiplier: float) -> torch.Tensor:
        with self.vector.apply(self.model, multiplier=multiplier, tokens=generated(start)):
            return self.model(ids).logits[0, start - 1 : -1].float().log_softmax(dim=-1)

    def score(self, prompt: str, answer: str, multiplier: float) -> float:
        start = len(self.tokenizer(prompt)["input_ids"])
        ids = self.tokenizer(f"{prompt} {answer}", return_tensors="pt")["input_ids"]
        found = self.log_probabilities(ids, start, multiplier)
        return found.gather(-1, ids[0, start:, None]).mean().item()

    def cost(self, text: str, multiplier: float, before: torch.Tensor | None = None) -> torch.Tensor:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        after = self.log_probabilities(ids, 2, multiplier)
        before = after if before is None else before
        return (before.exp() * (before - after)).sum(dim=-1)

    def seconds_of(self, answers: int, costs: int, sample: int) -> float:
        """The seconds of so many passes of each kind, from a sample of both."""
        draw = random.Random(0)
        begin = time.perf_counter()
        for n, (prompt, *both) in enumerate(draw.choices(self.items, k=sample)):
            self.score(prompt, both[n % 2], draw.choice(MULTIPLIERS))
        middle = time.perf_counter()
        for text in draw.choices(self.texts, k=sample):
            self.cost(text, draw.choice(MULTIPLIERS))
        return answers * (middle - begin) / sample + costs * (time.perf_counter() - middle) / sample


def report(name: str, ours: Callable[[], Any], plain: PlainLoop, answers: int, costs: int, options: Any) -> None:
    found, ratios = [], []
    for _ in range(options.rounds):
        before = plain.seconds_of(answers, costs, options.sample)
        found.append(seconds(ours))
        ratios.append((before + plain.seconds_of(answers, costs, options.sample)) / 2 / found[-1])
    one, ratio = statistics.median(found), statistics.median(ratios)
    print(
        f"{name:<9} {one:8.1f} {one * ratio:12.1f} {ratio:8.1f}   {answers} over items, {costs} over texts", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=24)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model:
        model: Any = AutoModelForCausalLM.from_pretrained(options.model)
        tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer = random_model()
    draw = random.Random(0)
    texts = [sentence(draw, TEXT) for _ in range(TEXTS)]
    pairs = [(sentence(draw, 32), sentence(draw, 32)) for _ in range(PAIRS)]
    depth = model.config.get_text_config().num_hidden_layers
    layers = [round(depth * (n + 1) / 6) for n in range(5)]
    vector = train_steering_vector(model, tokenizer, pairs, layers=layers).normalized()

    print(f"{'seconds':<18} {'ours':>8} {'plain loop':>12} {'ratio':>8}   passes of the plain loop")
    for kind, (prompt, answer) in KINDS.items():
        items = [(sentence(draw, prompt), *answers(draw, answer)) for _ in range(ITEMS)]
        measure(kind, model, tokenizer, vector, items, texts, options)

    ratios = []
    for _ in range(2 * options.rounds + 1):
        alone = seconds(lambda: train_steering_vector(model, tokenizer, pairs))
        ratios.append(seconds(lambda: diagnose(model, tokenizer, pairs)) / alone)
    print(f"\ndiagnose takes {statistics.median(ratios):.2f} of the training alone, which takes {alone:.2f} s")


def measure(
    kind: str, model: Any, tokenizer: Any, vector: SteeringVector, items: list[Item], texts: list[str], options: Any
) -> None:
    layers, many = vector.layers, len(MULTIPLIERS)
    one = vector[layers[len(layers) // 2]]
    plain = PlainLoop(model, tokenizer, one, items, texts)
    given = {"multipliers": MULTIPLIERS, "texts": texts, "controls": Controls(random=RANDOM)}
    report(
        f"evaluate, {kind}",
        lambda: evaluate(model, tokenizer, one, items, **given),
        plain,
        (1 + RANDOM) * many * ITEMS * 2,
        (1 + RANDOM) * many * TEXTS + TEXTS,
        options,
    )
    report(
        f"sweep, {kind}",
        lambda: sweep(model, tokenizer, vector, items, **given),
        plain,
        len(layers) * many * ITEMS * 2 + RANDOM * 2 * (ITEMS // 2) * 2,
        len(layers) * many * TEXTS + TEXTS,
        options,
    )


if __name__ == "__main__":
    main()
