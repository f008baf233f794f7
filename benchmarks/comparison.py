"""Compare this library with steering-vectors 0.12.2, repeng and nnsight, by facts that plain hooks decide.

    make comparison [MODEL=FOLDER]
    python benchmarks/comparison.py --library NAME [--model FOLDER] [--no-times]

With ``--library`` it runs one library, in an environment that has it, and prints a line of JSON. Without, it runs each
one in its environment, ``.venv-others/NAME``, and prints one table.

Each fact is a count over tiny random models of many architectures; after the first fact, over those for which that one
holds. A plain forward hook is right by definition, in passes without a cache and without padding; for beam search, in
``generate``. "no such choice" means that no argument asks for it, though an operator that the user writes might do it.
In nnsight users write all of the steering, and name the block and the tokens: there the facts show that such code
works. A model that nnsight wraps stays wrapped; outside traces it computes the same as before.

Training is timed over all layers on one thread, as a share of the time of a plain loop which runs one prompt at a time
with hooks. Each library has the better of its default batch size and 16.
"""

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from compared_libraries import (
    ARCHITECTURES,
    HIDDEN,
    LAYER,
    LIBRARIES,
    WORDS,
    Architecture,
    Called,
    Change,
    Inputs,
    Library,
    NNsight,
    NotOfferedError,
    Pairs,
    Runner,
    hooked,
    word_tokenizer,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
PROMPTS = [[11, 62, 33, 90, 15, 47], [71, 18, 55], [24, 83, 39, 101, 66]]


class NotPossibleError(Exception):
    """A model can't do it, whatever steers it."""


# Prompts, and the right answers


def prompt_of(*rows: list[int]) -> Inputs:
    """Return the rows padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def change(**choices: Any) -> Change:
    return Change(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)), **choices)


def right_steps(kind: Architecture, asked: Change, row: list[int], steps: int) -> Tensor:
    """Return the logits of greedy steps after one prompt, ``(steps, vocabulary)``, each from a pass without a cache."""
    found, ids = [], torch.tensor([row])
    with hooked(kind.build(), kind, asked) as runner:
        for _ in range(steps):
            logits = runner.model(input_ids=ids, use_cache=False).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
            found.append(logits)
    return torch.stack(found)


def right_rows(model: Any, blocks: list[Any], tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the last token's activations after blocks, each text alone: ``(texts, blocks, hidden)``."""
    rows: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        rows.append((output if isinstance(output, Tensor) else output[0])[0, -1].clone())

    handles = [block.register_forward_hook(keep) for block in blocks]
    for text in texts:
        model(**tokenizer(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return torch.stack(rows).unflatten(0, (len(texts), len(blocks)))


# The facts: each returns "yes", "no", or another outcome in words


def same(found: Tensor, right: Tensor) -> bool:
    """Compare to a thousandth of the largest number, far above float32's rounding and far below a missing change."""
    return found.shape == right.shape and bool((found - right).abs().max() <= 1e-3 * right.abs().max())


def answer(holds: bool) -> str:
    return "yes" if holds else "no"


def steps_of(runner: Runner, inputs: Inputs, **options: Any) -> Tensor:
    """Return the logits of greedy generation, ``(batch, steps, vocabulary)``."""
    asked = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(runner.generate(inputs, **asked, **options).logits, dim=1)


def all_tokens(library: Library, kind: Architecture) -> str:
    asked, inputs = change(), prompt_of(PROMPTS[0])
    with hooked(kind.build(), kind, asked) as runner:
        right = runner.logits(inputs)
    with library.steered(kind.build(), kind, asked) as steered:
        return answer(same(steered.logits(inputs), right))


def answer_alone(library: Library, kind: Architecture, use_cache: bool) -> str:
    inputs = prompt_of(PROMPTS[0])
    asked = change(answer_to=inputs)
    with library.steered(kind.build(), kind, asked) as steered:
        found = steps_of(steered, inputs, use_cache=use_cache)[0]
    return answer(same(found, right_steps(kind, asked, PROMPTS[0], 4)))


def left_padding(library: Library, kind: Architecture) -> str:
    asked = change()
    with library.steered(kind.build(), kind, asked) as steered:
        found = steps_of(steered, prompt_of(*PROMPTS))
    return answer(same(found, torch.stack([right_steps(kind, asked, row, 4) for row in PROMPTS])))


def strength_by_row(library: Library, kind: Architecture) -> str:
    strengths, rows = torch.tensor([1.0, -0.5, 0.0]), [row[:3] for row in PROMPTS]
    with library.steered(kind.build(), kind, change(strengths=strengths)) as steered:
        found = steps_of(steered, prompt_of(*rows))
    alone = [change(strengths=strengths[number : number + 1]) for number in range(len(rows))]
    right = [right_steps(kind, asked, row, 4) for asked, row in zip(alone, rows, strict=True)]
    return answer(same(found, torch.stack(right)))


def beams(library: Library, kind: Architecture) -> str:
    asked, inputs = change(), prompt_of(*PROMPTS)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False}
    scored = {**options, "output_scores": True, "return_dict_in_generate": True}
    with hooked(kind.build(), kind, asked) as runner:
        right = runner.generate(inputs, **scored)
    with library.steered(kind.build(), kind, asked) as steered:
        found = steered.generate(inputs, **scored)
    return answer(found.sequences.equal(right.sequences) and same(found.sequences_scores, right.sequences_scores))


def compiled(library: Library, kind: Architecture) -> str:
    asked, inputs, model = change(), prompt_of(PROMPTS[0]), kind.build()
    with hooked(kind.build(), kind, asked) as runner:
        right = runner.logits(inputs)
    model.compile(backend="eager")  # Dynamo decides by its guards, before any backend
    try:
        plain = Called(model).logits(inputs)
    except Exception as error:  # transformers 4 can't compile Mamba with the newest PyTorch
        raise NotPossibleError from error
    with library.steered(model, kind, asked) as steered:
        found = steered.logits(inputs)
    return "silently not" if same(found, plain) else answer(same(found, right))


def trained(library: Library, kind: Architecture, side: str) -> str:
    tokenizer = word_tokenizer([f"w{n}" for n in range(WORDS - 3)], pad_token="<pad>", padding_side=side)
    draw, model = random.Random(0), kind.build()
    texts = [" ".join(f"w{draw.randrange(100)}" for _ in range(2 + number)) for number in range(10)]  # no tie of signs
    rows = right_rows(model, [model.get_submodule(f"{kind.blocks}.{LAYER}")], tokenizer, texts)[:, 0]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    found = library.train(model, tokenizer, pairs, layers=[LAYER], batch_size=4)[LAYER]
    return answer(same(found, library.aggregate(rows[::2], rows[1::2])))


def state(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the parts that a library may change, by name."""
    modules = dict(model.named_modules())
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values()],
        "forward methods": [name for name, module in modules.items() if "forward" in vars(module)],
        "pad token": tokenizer.pad_token,
        "padding side": tokenizer.padding_side,
    }


def as_before(library: Library, kind: Architecture) -> str:
    """Train, steer and leave, and name what differs from before."""
    special = {"pad_token": "<pad>"} if library.sets_pad_token else {}
    tokenizer = word_tokenizer([f"w{n}" for n in range(WORDS - 3)], **special)
    if isinstance(library, NNsight):
        library.tokenizer = tokenizer
    model = kind.build()
    model(**prompt_of(PROMPTS[0]), output_hidden_states=True)  # transformers 5 leaves hooks behind
    before = state(model, tokenizer)
    with suppress(NotOfferedError):
        library.train(model, tokenizer, [("w1 w2", "w3"), ("w4", "w5 w6 w7")], layers=[LAYER], batch_size=2)
    with library.steered(model, kind, change()) as steered:
        steered.logits(prompt_of(PROMPTS[0]))
    after = state(model, tokenizer)
    changed = ", ".join(key for key in before if before[key] != after[key])
    return f"changed: {changed}" if changed else "yes"


FACTS: dict[str, Callable[[Library, Architecture], str]] = {
    "a direction at a middle block": all_tokens,
    "the answer's tokens alone, with a cache": lambda library, kind: answer_alone(library, kind, True),
    "the answer's tokens alone, without a cache": lambda library, kind: answer_alone(library, kind, False),
    "prompts in a batch padded on the left": left_padding,
    "a strength for each row of a batch": strength_by_row,
    "beam search": beams,
    "a model compiled before": compiled,
    "training in batches padded on the right": lambda library, kind: trained(library, kind, "right"),
    "training in batches padded on the left": lambda library, kind: trained(library, kind, "left"),
    "model and tokenizer as before, after leaving": as_before,
}


def outcome(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except NotOfferedError:
        return "no such choice"
    except NotPossibleError:
        return "not possible"
    except Exception as error:
        return f"error: {type(error).__name__}: {str(error).strip().splitlines()[-1][:100]}"


def summary(outcomes: list[str]) -> str:
    """Return how many are right among those that are possible, and how many of the others are more than wrong."""
    counts = Counter("errors" if outcome.startswith("error: ") else outcome for outcome in outcomes)
    counts.pop("not possible", None)
    total, right = counts.total(), counts.pop("yes", 0)
    if len(counts) == 1 and not right and "no" not in counts:
        return next(iter(counts))
    rest = ", ".join(f"{number} {name}" for name, number in counts.most_common() if name != "no")
    return f"{right} of {total}" + (f" ({rest})" if rest else "")


# Times


@dataclass(frozen=True)
class Timed:
    """A model to time training on: the one in a folder, or a random Llama of 110 million weights."""

    model: Any
    tokenizer: Any

    @classmethod
    def load(cls, folder: str | None) -> "Timed":
        if folder is not None:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # as transformers 4 can, too
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            return cls(AutoModelForCausalLM.from_pretrained(folder).float().eval(), tokenizer)
        torch.manual_seed(0)
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
        config = transformers.LlamaConfig(vocab_size=16000, **sizes)
        tokenizer = word_tokenizer([*SYLLABLES, "A", "B"], pad_token="<pad>")
        return cls(transformers.LlamaForCausalLM(config).eval(), tokenizer)


SYLLABLES = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in "lmnrst"]


def drawn_pairs(one_question: bool, count: int = 12) -> Pairs:
    """Draw pairs of texts of 30 to 60 words, which share all but the last word or no more than chance does."""
    draw = random.Random(0)
    pairs = []
    for _ in range(count):
        first, second = (" ".join(draw.choices(SYLLABLES, k=draw.randint(30, 60))) for _ in range(2))
        pairs.append((f"{first} A", f"{first if one_question else second} B"))
    return pairs


def time_of(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def training_time(library: Library, timed: Timed, pairs: Pairs, rounds: int) -> str:
    """Return the time of training on all layers as a share of a plain loop's, the median over rounds."""
    blocks, texts = list(timed.model.model.layers), [text for pair in pairs for text in pair]
    library.train(timed.model, timed.tokenizer, pairs[:2])  # no time for a library that trains nothing
    calls: list[Callable[[], Any]] = [
        lambda: right_rows(timed.model, blocks, timed.tokenizer, texts),
        lambda: library.train(timed.model, timed.tokenizer, pairs),
        lambda: library.train(timed.model, timed.tokenizer, pairs, batch_size=16),
    ]
    _warm, *taken = ([time_of(call) for call in calls] for _ in range(rounds + 1))
    return f"{min(statistics.median(row[number] / row[0] for row in taken) for number in (1, 2)):.2f}"


TIMES = {
    "time of training, pairs with one question": drawn_pairs(one_question=True),
    "time of training, pairs that share nothing": drawn_pairs(one_question=False),
}


# One library, or all


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what one library does, in its environment."""
    library = LIBRARIES[name]()
    outcomes: dict[str, dict[str, str]] = {}
    labels = list(ARCHITECTURES)
    for fact, found in FACTS.items():
        outcomes[fact] = {label: outcome(partial(found, library, ARCHITECTURES[label])) for label in labels}
        if found is all_tokens:
            labels = [label for label in labels if outcomes[fact][label] == "yes"]
    facts = {fact: summary(list(found.values())) for fact, found in outcomes.items()}
    if not options.no_times:
        torch.set_num_threads(1)
        timed = Timed.load(options.model)
        for fact, pairs in TIMES.items():
            facts[fact] = outcome(partial(training_time, library, timed, pairs, options.rounds))
    title = "this library" if name == "ours" else f"{name} {version(library.package)}"
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"title": title, "facts": {**versions, **facts}, "outcomes": outcomes}


def run(name: str, passed_on: list[str]) -> dict[str, Any]:
    """Measure one library in its environment."""
    python = ROOT / ".venv-others" / name / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python} isn't there: make comparison installs it")
    print(f"{name} ...", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if name == "ours" else ""}
    command = [str(python), __file__, "--library", name, *passed_on]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def list_table(found: list[dict[str, Any]]) -> str:
    """Return the table in reStructuredText, with a column for each library."""
    rows = [["", *(one["title"] for one in found)]]
    rows += [[fact, *(one["facts"][fact] for one in found)] for fact in found[0]["facts"]]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for first, *rest in rows:
        lines += [f"   * - {first}".rstrip(), *(f"     - {cell}" for cell in rest)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--model", help="a folder with a model like Llama and its tokenizer, to time training on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-times", action="store_true")
    options = parser.parse_args()
    if options.library is None:
        print(list_table([run(name, sys.argv[1:]) for name in LIBRARIES]))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with torch.no_grad():
        print(json.dumps(measure(options.library, options)))


if __name__ == "__main__":
    main()
