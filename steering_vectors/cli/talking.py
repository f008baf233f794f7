"""Generate at several multipliers, and talk with a steered model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from steering_vectors._arguments import finite_number
from steering_vectors.cli.batches import batch, padding
from steering_vectors.cli.loading import load_model, load_vector, model_and_rest, short_names
from steering_vectors.cli.screen import console, note, print_on
from steering_vectors.cli.usage import BadParameter, UsageError

OfModel = tuple[str | None, str | None, str | None]
_DEFAULT = (-1.0, 0.0, 1.0)
_HELP = (
    "/m NUMBER sets the strength, and /m NAME NUMBER that of one vector;\n"
    "/off stops steering, and /trace shows what was steered"
)


def steered_tokens(name: str) -> Any:
    """Return the tokens to steer by their name, as a function of the prompts or, for all, None."""
    from steering_vectors import generated, prompted

    values = {"generated": generated, "all": None, "prompt": prompted}
    if name not in values:
        raise BadParameter(f"{name!r} is not one of {', '.join(values)}", param_hint="--tokens")
    return values[name]


def generate(
    arguments: Sequence[str],
    multipliers: Sequence[float] | None,
    chat: bool,
    tokens: str,
    layers: str | None,
    max_new_tokens: int,
    of_model: OfModel,
) -> None:
    """Print what the model writes after each prompt, at each multiplier."""
    name, (vector_name, *prompts) = model_and_rest(arguments, least=2, usage="[MODEL] VECTOR PROMPT...")
    selection, vector = steered_tokens(tokens), load_vector(vector_name, layers)
    gguf_file, dtype, device = of_model
    model, tokenizer = load_model(name, gguf_file=gguf_file, dtype=dtype, device=device)
    at = list(multipliers or _DEFAULT)
    from steering_vectors import prompt_ids

    for prompt in prompts:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}] if chat else prompt)
        inputs = batch(ids, len(at), model)
        steering = vector.apply(model, multiplier=at, tokens=None if selection is None else selection(inputs))
        print(prompt, flush=True)
        with _Lines(tokenizer, at) as lines, steering:
            model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=lines,
                pad_token_id=padding(tokenizer),
            )
        print()


class _Lines:
    """The answers of a batch, one a row: written as they grow on a terminal, and at the end elsewhere."""

    def __init__(self, tokenizer: Any, multipliers: Sequence[float]) -> None:
        from rich.live import Live

        self._tokenizer, self._multipliers = tokenizer, multipliers
        self._ids: list[list[int]] = [[] for _ in multipliers]
        self._is_prompt = True
        self._console = console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> _Lines:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif error[0] is None:
            print_on(self._console, self._table())

    def put(self, value: Any) -> None:
        """Take the next token of each row; the first call brings the prompts."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for row, token in zip(self._ids, value.flatten().tolist(), strict=True):
            row.append(token)
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def end(self) -> None:
        """Do nothing: the context's end writes what is left."""

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        for multiplier, ids in zip(self._multipliers, self._ids, strict=True):
            text = " ".join(self._tokenizer.decode(ids, skip_special_tokens=True).split())
            table.add_row(f"{multiplier:+g}" if multiplier else "0", text)
        return table


def chat(
    arguments: Sequence[str],
    multipliers: Sequence[float] | None,
    tokens: str,
    layers: str | None,
    max_new_tokens: int,
    of_model: OfModel,
) -> None:
    """Talk until the input ends."""
    name, names = model_and_rest(arguments, least=1, usage="[MODEL] VECTOR...")
    given = list(multipliers or [1.0])
    if len(given) not in (1, len(names)):
        raise UsageError(f"expected one multiplier, or one for each of the {len(names)} vectors")
    selection, vectors = steered_tokens(tokens), [load_vector(one, layers) for one in names]
    gguf_file, dtype, device = of_model
    model, tokenizer = load_model(name, gguf_file=gguf_file, dtype=dtype, device=device)
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use generate, which completes texts")
    strengths = dict(zip(short_names(names), given * (len(names) if len(given) == 1 else 1), strict=True))
    talk = _Talk(model, tokenizer, dict(zip(strengths, vectors, strict=True)), strengths, selection, max_new_tokens)
    note(_HELP)
    while (line := _asked()) is not None:
        if line.startswith("/"):
            talk.command(line)
        elif line:
            try:
                talk.answer(line)
            except ValueError as error:  # such as a strength beyond the model's dtype: the talk goes on
                note(f"error: {error}")


def _asked() -> str | None:
    """Return a line of the user's, or None at the end of the input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line and sys.stdin.isatty():  # Ctrl-D: the shell's next prompt has a line of its own
        print(file=sys.stderr)
    return line.strip() if line else None


class _Talk:
    """A conversation with a steered model."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        vectors: dict[str, Any],
        strengths: dict[str, float],
        selection: Any,
        max_new_tokens: int,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._vectors, self._strengths = vectors, strengths
        self._selection, self._max_new_tokens = selection, max_new_tokens
        self._messages: list[dict[str, str]] = []
        self._trace: Any = None

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        word, *rest = line[1:].split() or [""]
        if word == "off":
            self._strengths = dict.fromkeys(self._strengths, 0.0)
        elif word == "m" and rest:
            *words, _ = rest
            names = [" ".join(words)] if words else list(self._strengths)
            try:
                strength = finite_number(float(rest[-1]), "the strength")
            except ValueError:
                note(f"{rest[-1]!r} is no number; {_HELP}")
                return
            if unknown := [name for name in names if name not in self._strengths]:
                note(f"there is no vector {unknown[0]}, only {', '.join(self._strengths)}; {_HELP}")
                return
            self._strengths.update(dict.fromkeys(names, strength))
        elif word == "trace":
            if self._trace is None or not self._trace.summary():
                note("nothing was steered yet" if self._trace is None else "the last answer was not steered")
            else:
                self._trace.show(self._tokenizer)
            return
        else:
            note(_HELP)
            return
        note(", ".join(f"{name} {strength:g}" for name, strength in self._strengths.items()))

    def answer(self, line: str) -> None:
        """Answer a message, steered by all vectors."""
        from transformers import TextStreamer

        from steering_vectors import prompt_ids, trace_steering

        asked = {"role": "user", "content": line}
        ids = prompt_ids(self._tokenizer, [*self._messages, asked])
        inputs = batch(ids, 1, self._model)
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ExitStack() as stack:
            self._trace = stack.enter_context(trace_steering(self._model))
            for name, vector in self._vectors.items():
                if self._strengths[name]:
                    tokens = None if self._selection is None else self._selection(inputs)
                    stack.enter_context(vector.apply(self._model, multiplier=self._strengths[name], tokens=tokens))
            output = self._model.generate(
                **inputs,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                streamer=streamer,
                pad_token_id=padding(self._tokenizer),
            )
        text = self._tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        self._messages += [asked, {"role": "assistant", "content": text}]
