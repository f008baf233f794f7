"""Tokenize texts and chat messages, also with images, and find the beginning of the completion."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor, nn

from steering_vectors._extraction.images import (
    SOURCES,
    check_takes_images,
    has_images,
    inputs_with_images,
    place_among_images,
)
from steering_vectors._extraction.packs import shared_prefix
from steering_vectors._extraction.token_ids import given_token_ids
from steering_vectors._locks import computed_once

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | Tensor | Mapping[str, Any]

# No text contains it and no template splits it. A space after it shows whether the template strips the text.
_MARK = "\ue000steering-vectors\ue001"
_TEMPLATE_ARGUMENTS = ("tokenize", "add_generation_prompt", "continue_final_message", "conversation")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt's token ids, its text, and the index of the completion's first token, if that is known.

    ``left_out`` are the special tokens with which ``tokenizer(text)`` begins before the tokens of ``input_ids``.

    A prompt with images has ``inputs``, all that the model gets. In ``written`` an image is what the text has of it; in
    ``input_ids`` it has a token for each of its features.
    """

    input_ids: list[int]
    text: str
    completion_start: int | None = None
    left_out: Sequence[int] = ()
    inputs: Mapping[str, Any] | None = None
    written: Sequence[int] = ()

    def place_of(self, index: int) -> int:
        """Return the place in ``input_ids`` of a token of ``tokenizer(text)``; negative numbers count from the end.

        Raises ValueError for a special token that the prompt doesn't have, and for one that stands between images.
        """
        place = self._without_left_out(index)
        return place if self.inputs is None else place_among_images(place, self.written, self.input_ids)

    def with_images(self, inputs: Mapping[str, Any]) -> "TokenizedPrompt":
        """Return the prompt with the processor's ``inputs``, in which images have taken their tokens."""
        ids, start = inputs["input_ids"][0].tolist(), self.completion_start
        place = None if start is None else place_among_images(start, self.input_ids, ids)
        return replace(self, input_ids=ids, completion_start=place, inputs=inputs, written=self.input_ids)

    def _without_left_out(self, index: int) -> int:
        count = len(self.left_out)
        if index >= count:
            return index - count
        if index >= 0 and self.input_ids[:count] != list(self.left_out):
            raise ValueError(
                f"token {index} of tokenizer(text) is a special token that the tokenizer adds to texts but not to "
                f"rendered chats: choose another token, from {count} on"
            )
        return index


class PromptTokenizer:
    """Tokenizes prompts with a Hugging Face tokenizer, or with a processor's; never changes it.

    Raises TypeError if ``tokenizer`` is neither. Raises ValueError for template arguments that the library itself sets.
    """

    def __init__(self, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        if isinstance(tokenizer, (str, nn.Module)) or not callable(tokenizer):
            raise TypeError(f"tokenizer must be a Hugging Face tokenizer or processor, got {type(tokenizer).__name__}")
        self._template_owner = self._processor = tokenizer
        inner = getattr(tokenizer, "tokenizer", None)  # a processor's tokenizer, unless it is another library's object
        self._tokenizer = inner if callable(inner) and hasattr(inner, "bos_token_id") else tokenizer
        self._template_kwargs = dict(chat_template_kwargs or {})
        taken = [name for name in _TEMPLATE_ARGUMENTS if name in self._template_kwargs]
        if taken:
            raise ValueError(f"chat_template_kwargs can't hold {taken}: the library sets them from the samples")
        if not getattr(tokenizer, "chat_template", None):
            self._template_owner = self._tokenizer

    @computed_once
    def _prefix(self) -> list[int]:
        """The special tokens that the tokenizer puts before each text."""
        return _before(self._ids("a", add_special_tokens=False), self._ids("a"))

    @computed_once
    def _processor_tokenizes(self) -> bool:
        """True for a processor that tokenizes chats itself. Those of transformers 4.46 leave that to the tokenizer."""
        if self._template_owner is self._tokenizer:
            return False
        return "return_dict" in inspect.signature(self._template_owner.apply_chat_template).parameters

    def __call__(self, prompt: Prompt, *, find_completion: bool = False) -> TokenizedPrompt:
        """Tokenize a prompt; with ``find_completion``, find the beginning of a chat's last assistant turn too.

        Raises TypeError unless ``prompt`` is a text, chat messages or token ids. Raises ValueError for an empty prompt
        and for chat messages that are malformed or can't be rendered.
        """
        if isinstance(prompt, str) and not prompt:  # some tokenizers would still put a token before it
            raise ValueError("the prompt is empty: it has no text")
        if isinstance(prompt, str):
            encoded = self._text(prompt)
        elif (ids := given_token_ids(prompt)) is not None:
            encoded = TokenizedPrompt(ids, "")
        elif is_chat(prompt):
            encoded = self._chat(prompt, find_completion)
        else:
            one = ": put the message in a list" if isinstance(prompt, Mapping) and "role" in prompt else ""
            raise TypeError(f"expected a text, a list of chat messages or token ids, got {type(prompt).__name__}{one}")
        if not encoded.input_ids:
            raise ValueError("the prompt is empty: it has no tokens")
        return encoded

    def _ids(self, text: str, **kwargs: bool) -> list[int]:
        return list(self._tokenizer(text, **kwargs)["input_ids"])

    def _text(self, text: str) -> TokenizedPrompt:
        """Tokenize a text. If it begins with the special tokens that the tokenizer adds, they stand there once."""
        ids, count = self._ids(text), len(self._prefix)
        if count and ids[: 2 * count] == 2 * self._prefix:
            return TokenizedPrompt(ids[count:], text, left_out=self._prefix)
        return TokenizedPrompt(ids, text)

    def _chat(self, messages: Sequence[Message], find_completion: bool) -> TokenizedPrompt:
        _check_messages(messages)
        images = has_images(messages)
        if images:
            check_takes_images(self._processor, self._tokenizer)
        if not getattr(self._template_owner, "chat_template", None):
            kind = "tokenizer" if self._processor is self._tokenizer else "processor"
            raise ValueError(
                f"the {kind} has no chat template, so chat messages can't be rendered: give texts, or set "
                f"{kind}.chat_template to the template that the model was trained with"
            )
        encoded = self._without_images(messages, find_completion)
        if not images:
            return encoded
        bos = self._tokenizer.bos_token
        return encoded.with_images(inputs_with_images(self._processor, messages, encoded.text, bos=bos))

    def _without_images(self, messages: Sequence[Message], find_completion: bool) -> TokenizedPrompt:
        """Tokenize a chat, in which an image is what the template writes of it."""
        last, images = messages[-1], has_images(messages)
        if last["role"] != "assistant":
            encoded = self._rendered(self._render(messages, add_generation_prompt=True), by_processor=images)
            return replace(encoded, completion_start=len(encoded.input_ids))
        if last.get("tool_calls") and not last.get("content"):
            raise ValueError("the last message calls a tool and has no text: end the chat with the tool's message")
        text = self._render_unfinished(messages)
        encoded = self._rendered(text, by_processor=images)
        if not find_completion:
            return encoded
        start = self._first_token_from(self._completion_character(messages, text), encoded)
        return replace(encoded, completion_start=start)

    def _render(self, messages: Sequence[Message], **template_kwargs: Any) -> str:
        """Render messages with the chat template. Raises ValueError with the template's message if it fails."""
        kwargs = {"add_generation_prompt": False, **self._template_kwargs, **template_kwargs}
        in_parts = [message["content"] for message in messages if isinstance(message.get("content"), (list, tuple))]
        try:
            text = str(self._template_owner.apply_chat_template(list(messages), tokenize=False, **kwargs))
        except Exception as error:  # templates raise errors of any kind
            hint = f"; {_ONE_TEXT}" if in_parts else ""
            raise ValueError(f"the chat template failed on these messages: {error}{hint}") from error
        if any(content and str(content) in text for content in in_parts):
            raise ValueError(f"the chat template writes a message's parts as Python code; {_ONE_TEXT}")
        return text

    def _render_unfinished(self, messages: Sequence[Message]) -> str:
        """Render a chat up to the end of the last message's text, without the template's trailer.

        This is what ``continue_final_message=True`` does in transformers 5. The one of transformers 4 searches for the
        text itself: it may find that in the trailer, or not at all if the template rewrites it.
        """
        rendered = self._render([*messages[:-1], _with_text_appended(messages[-1], f"{_MARK} ")])
        before, mark, after = rendered.rpartition(_MARK)
        text = before if after.startswith(" ") else before.rstrip()
        if not mark or self._is_dropped(messages, text.rstrip()):
            raise ValueError(
                "the chat template's output lacks the text of the last assistant message, as it may leave out finished "
                "thoughts: give the rendered text instead of the messages, or token ids"
            )
        return text

    def _is_dropped(self, messages: Sequence[Message], text: str) -> bool:
        """Return True if the last message has a text, and yet is rendered as if it had none."""
        *history, last = messages
        if text.endswith(_text_of(last).strip()):
            return False
        return text == self._render_unfinished([*history, _with_text(last, "")]).rstrip()

    def _completion_character(self, messages: Sequence[Message], text: str) -> int:
        """Return the index in ``text`` at which the last turn's text, or its thinking, begins after the role header."""
        *history, last = messages
        turn = shared_prefix(text, self._render(history)) if history else 0
        asked = history or [{"role": "user", "content": "."}]
        start = shared_prefix(text, self._render_unfinished([*history, _with_text(last, "")]))
        if history:
            start = max(start, shared_prefix(text, self._render(asked, add_generation_prompt=True)))
        before = text[turn:start]  # the role header, perhaps with a thinking block that the template writes
        if not before.strip():
            return turn  # spaces may belong to the header or to the answer
        headers = [header for header in self._role_headers(asked, last, before) if header in before]
        ends = [before.find(header) + len(header) for header in headers]
        return turn + min(ends, default=len(before))

    def _role_headers(self, asked: Sequence[Message], answer: Message, before: str) -> Iterator[str]:
        """Yield candidates for an answer's role header: the generation prompt, then what precedes an earlier answer."""
        for thinking in ({}, {"enable_thinking": True}):  # with thinking off, templates add an empty thought
            bare = self._render(asked, **thinking)
            header = self._render(asked, add_generation_prompt=True, **thinking)[len(bare) :]
            if header.strip():
                yield header
        try:
            earlier = self._render([*asked, _with_text(answer, _MARK), {"role": "user", "content": "."}])
        except ValueError:  # the template rejects these turns
            return
        written = earlier.partition(_MARK)[0]
        yield from (before[:end] for end in range(len(before), 0, -1) if written.endswith(before[:end]))

    def _rendered(self, text: str, *, by_processor: bool) -> TokenizedPrompt:
        """Tokenize a rendered chat as ``apply_chat_template`` does.

        A tokenizer adds no special tokens to those of the template. A processor adds them unless BOS is among those.
        """
        bos = self._tokenizer.bos_token
        if (by_processor or self._processor_tokenizes) and not (bos is not None and text.startswith(str(bos))):
            return TokenizedPrompt(self._ids(text), text)
        return TokenizedPrompt(self._ids(text, add_special_tokens=False), text, left_out=self._prefix)

    def _first_token_from(self, character: int, encoded: TokenizedPrompt) -> int:
        """Return the index of the first token with text from ``character`` on, or the number of tokens."""
        is_fast = bool(getattr(self._tokenizer, "is_fast", False))
        bare = self._tokenizer(encoded.text, add_special_tokens=False, return_offsets_mapping=is_fast)
        ids = list(bare["input_ids"])
        added = len(_before(ids, encoded.input_ids))
        if not is_fast:
            before = self._ids(encoded.text[:character], add_special_tokens=False)
            return added + shared_prefix(before, ids)
        spans = bare["offset_mapping"]
        starts = [start for start, _ in spans[1:]] + [len(encoded.text)]
        reached = 0
        for n, (start, end) in enumerate(spans):
            # Tokenizers up to 0.20.0 give some words no length: they end where the next token begins.
            reached = starts[n] if start == end == reached else end
            if reached > character:
                return added + n
        return added + len(spans)


_ONE_TEXT = (
    'if it takes no content in parts, give each message its text alone, as in {"role": "user", "content": "…"}, '
    'instead of [{"type": "text", "text": "…"}]'
)


def chat_template_of(tokenizer: Any) -> object:
    """Return the chat template of a tokenizer, of a processor, or of the processor's tokenizer, or None."""
    inner = getattr(tokenizer, "tokenizer", None)
    return getattr(tokenizer, "chat_template", None) or getattr(inner, "chat_template", None)


def is_chat(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Return True if ``prompt`` is a sequence of messages."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(m, Mapping) for m in prompt)


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("the prompt is empty: it has no messages")
    for message in messages:
        content = message.get("content")
        if "role" not in message or (content is None and not message.get("tool_calls")):
            empty = ", with content None" if "content" in message else ""
            raise ValueError(f"a chat message must have a role and a content, got the keys {sorted(message)}{empty}")
        parts = [] if content is None or isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError(f"a chat message's content must be a text or a list of parts, got {content!r}")
        kinds = sorted({str(part.get("type")) for part in parts} - {"text", "image"})
        if kinds:
            raise ValueError(f"chat messages may hold only text and images, got a part of type {', '.join(kinds)}")
        if any(part["type"] == "image" and all(part.get(name) is None for name in SOURCES) for part in parts):
            raise ValueError(
                f"an image part of a chat message's content needs an 'image', a 'url' or a 'path', got {content!r}"
            )
        if not all(isinstance(part.get("text"), str) for part in parts if part["type"] == "text"):
            raise ValueError(f"a text part of a chat message's content must have a 'text' string, got {content!r}")


def _with_text(message: Message, text: str) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": text if isinstance(content, str) else [{"type": "text", "text": text}]}


def _with_text_appended(message: Message, addition: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + addition}
    if not content or content[-1]["type"] != "text":
        return {**message, "content": [*content, {"type": "text", "text": addition}]}
    *others, last = content
    return {**message, "content": [*others, {**last, "text": last["text"] + addition}]}


def _text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def _before(part: list[int], whole: list[int]) -> list[int]:
    """Return what stands before ``part`` in ``whole``."""
    places = (n for n in range(len(whole)) if whole[n : n + len(part)] == part)
    return whole[: next(places, 0)]
