"""Answer a prompt without and with steering, in one batch, one request after another."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from steering_vectors import SteeringVector, monitor, prompt_ids
from steering_vectors.cli.batches import batch, padding
from steering_vectors.cli.talking import steered_tokens

MOST_PROMPT_TOKENS = 4096
_BETWEEN_COLOURS = 0.5  # seconds: to colour tokens takes longer than to write one

# A text of one token, and its projection on a vector.
Token = tuple[str, float]


@dataclass(frozen=True)
class Asked:
    """A request: a prompt, the vectors' strengths, and the tokens to steer, ``generated``, ``all`` or ``prompt``."""

    prompt: str
    strengths: Mapping[str, float]
    is_chat: bool = False
    tokens: str = "generated"
    max_new_tokens: int = 80


@dataclass(frozen=True)
class Answers:
    """The unsteered and the steered answer as far as they are written.

    By each vector's name, ``tokens`` has the tokens of both sequences, with the prompt, as far as the model has read
    them.
    """

    texts: tuple[str, str] = ("", "")
    tokens: Mapping[str, Sequence[Sequence[Token]]] = field(default_factory=dict)


class Speaker:
    """A model that answers many visitors, one at a time.

    Nothing of a request is kept, and nothing of it reaches another's answers.
    """

    def __init__(
        self, model: Any, tokenizer: Any, vectors: Mapping[str, SteeringVector], *, most_new_tokens: int = 400
    ) -> None:
        self.model, self.tokenizer, self.vectors = model, tokenizer, dict(vectors)
        self.most_new_tokens = most_new_tokens
        self._turn = Lock()

    @property
    def can_chat(self) -> bool:
        """True if the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def answers(self, asked: Asked) -> Generator[Answers]:
        """Yield both answers as they grow. To close the iterator stops the model after the token that it is at.

        Raises:
            ValueError: If the prompt is empty or too long, or if a strength isn't finite.
        """
        ids = self._ids(asked)
        steps: SimpleQueue[Answers | BaseException | None] = SimpleQueue()
        stop = Event()
        # The steering holds in the thread that generates; a server runs each step of an iterator in any thread.
        Thread(target=self._run, args=(asked, ids, steps, stop), daemon=True).start()
        try:
            while (step := steps.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                yield step
        finally:
            stop.set()

    def _ids(self, asked: Asked) -> list[int]:
        if not asked.prompt.strip():
            raise ValueError("write a prompt first")
        ids = prompt_ids(self.tokenizer, [{"role": "user", "content": asked.prompt}] if asked.is_chat else asked.prompt)
        config = self.model.config.get_text_config()
        most = min(MOST_PROMPT_TOKENS, getattr(config, "max_position_embeddings", None) or MOST_PROMPT_TOKENS)
        if len(ids) + self._length(asked) > most:
            raise ValueError(f"the prompt has {len(ids)} tokens: at most {most - self._length(asked)} leave room")
        return ids

    def _length(self, asked: Asked) -> int:
        return max(1, min(int(asked.max_new_tokens), self.most_new_tokens))

    def _run(self, asked: Asked, ids: Sequence[int], steps: SimpleQueue[Any], stop: Event) -> None:
        """Generate when it is this request's turn, and put each step, an error, and at last None into ``steps``."""
        try:
            with self._turn:
                self._generate(asked, ids, steps, stop)
        except BaseException as error:  # it is raised again where the steps are read
            steps.put(error)
        steps.put(None)

    def _generate(self, asked: Asked, ids: Sequence[int], steps: SimpleQueue[Any], stop: Event) -> None:
        import torch

        inputs, selection = batch(ids, 2, self.model), steered_tokens(asked.tokens)
        with ExitStack() as stack:
            for name, vector in self.vectors.items():
                steering = vector.apply(
                    self.model,
                    multiplier=[0.0, asked.strengths.get(name, 0.0)],
                    tokens=None if selection is None else selection(inputs),
                    this_thread_only=True,
                )
                stack.enter_context(steering)
            watched = {name: stack.enter_context(monitor(self.model, vector)) for name, vector in self.vectors.items()}
            writing = _Writing(self, watched, len(ids), steps)
            self.model.generate(
                **inputs,
                max_new_tokens=self._length(asked),
                do_sample=False,
                streamer=writing,
                stopping_criteria=[lambda rows, _scores: torch.full(rows.shape[:1], stop.is_set(), device=rows.device)],
                pad_token_id=padding(self.tokenizer),
            )
            writing.finish()


class _Writing:
    """Both rows of a batch while they are generated, in the form of a streamer."""

    def __init__(self, speaker: Speaker, watched: Mapping[str, Any], prompt: int, steps: SimpleQueue[Any]) -> None:
        self._speaker, self._watched, self._prompt, self._steps = speaker, watched, prompt, steps
        self._rows: tuple[list[int], list[int]] = ([], [])
        self._has_ended = [False, False]
        self._last: Answers | None = None
        self._coloured_at = time.monotonic()
        ends = speaker.model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])

    def put(self, value: Any) -> None:
        """Take the next token of each row; the first call brings the prompts."""
        if self._last is None:
            self._last = Answers()
            return
        for number, token in enumerate(value.flatten().tolist()):
            if not self._has_ended[number]:  # what follows is padding
                self._rows[number].append(token)
                self._has_ended[number] = token in self._ends
        now = time.monotonic()
        if now - self._coloured_at >= _BETWEEN_COLOURS:
            self._yield(self._tokens())
            self._coloured_at = time.monotonic()
        else:
            self._yield(self._last.tokens)

    def end(self) -> None:
        """Do nothing: ``finish`` has the last word."""

    def finish(self) -> None:
        """Yield the whole answers, with all tokens."""
        self._yield(self._tokens())

    def _yield(self, tokens: Mapping[str, Sequence[Sequence[Token]]]) -> None:
        decode = self._speaker.tokenizer.decode
        first, second = (decode(row, skip_special_tokens=True).rstrip("\ufffd") for row in self._rows)
        self._last = Answers((first, second), tokens)
        self._steps.put(self._last)

    def _tokens(self) -> dict[str, list[list[Token]]]:
        found = {}
        for name, watched in self._watched.items():
            along = watched.by_sequence()[watched.layers[-1]]
            rows = zip(watched.token_texts(self._speaker.tokenizer), along, self._rows, strict=True)
            found[name] = [
                list(zip(texts, values.tolist(), strict=True))[: self._prompt + len(row)] for texts, values, row in rows
            ]
        return found
