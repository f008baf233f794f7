"""Split a prompt with its answer into the token ids of both."""

from collections.abc import Sequence
from typing import Any

from steering_vectors._extraction.packs import shared_prefix
from steering_vectors._extraction.tokenizing import Message, PromptTokenizer, is_chat


def answered(tokenize: PromptTokenizer, prompt: str | Sequence[Message], answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a text or a chat, and those of the answer that follows it.

    A token that holds the end of a text and the beginning of its answer is the answer's.

    Raises TypeError if ``prompt`` is neither text nor chat messages, or ``answer`` isn't a text. Raises ValueError if
    one of them is empty, or has no tokens.
    """
    if not isinstance(answer, str):
        raise TypeError(f"the answer must be a text, got {type(answer).__name__}")
    if not answer:
        raise ValueError("the answer is empty: it has no text")
    if isinstance(prompt, str):
        ids, start = _together(tokenize, prompt, prompt + answer)
    elif is_chat(prompt) and prompt and prompt[-1].get("role") == "assistant":
        ids, start = _together(tokenize, prompt, [*prompt[:-1], _continued(prompt[-1], answer)])
    elif is_chat(prompt):
        encoded = tokenize([*prompt, {"role": "assistant", "content": answer}], find_completion=True)
        ids, start = encoded.input_ids, encoded.completion_start or 0
        # The prompt may end after empty thoughts, with which the answer would begin otherwise.
        asked = tokenize(prompt).input_ids
        if ids[: len(asked)] == asked:
            start = max(start, len(asked))
    else:
        raise TypeError(f"the prompt must be a text or a list of chat messages, got {type(prompt).__name__}")
    if start == len(ids):
        raise ValueError(f"the answer {answer!r} has no tokens after the prompt")
    if start == 0:
        raise ValueError(f"the prompt {prompt!r} has no token of its own before the answer: give a longer one")
    return ids[:start], ids[start:]


def _together(tokenize: PromptTokenizer, prompt: Any, whole: Any) -> tuple[list[int], int]:
    ids = tokenize(whole).input_ids
    return ids, shared_prefix(tokenize(prompt).input_ids, ids)


def _continued(message: Message, answer: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + answer}
    *others, last = content
    return {**message, "content": [*others, {**last, "text": last["text"] + answer}]}
