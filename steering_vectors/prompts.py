"""Token ids of prompts and of their answers, as training reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steering_vectors._arguments import with_hints
from steering_vectors._extraction import Prompt, PromptTokenizer, answered

__all__ = ["answer_ids", "prompt_ids"]


@with_hints(missing="the arguments are tokenizer, prompt")
def prompt_ids(tokenizer: Any, prompt: Prompt, *, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Return the token ids of a prompt as :func:`train_steering_vector` reads it.

    Args:
        tokenizer: The model's tokenizer, or a processor that has one. It is not changed.
        prompt: A text, a list of chat messages, or token ids.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Raises:
        TypeError: If ``prompt`` is nothing of this.
        ValueError: If the prompt is empty, or a chat that can't be rendered.

    >>> prompt_ids(tokenizer, "Hi")
    [44, 77]
    """
    return PromptTokenizer(tokenizer, chat_template_kwargs)(prompt).input_ids


@with_hints(missing="the arguments are tokenizer, prompt, answer")
def answer_ids(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    answer: str,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt, and those of the answer that follows it.

    The answer to a text follows it without a space, so it should begin with one if it needs one. A
    token that holds the end of the text and the beginning of the answer belongs to the answer. The
    answer to a chat is the assistant's next turn, without what the template writes after it; a chat
    that ends with a turn of the assistant is continued in it.

    Args:
        tokenizer: The model's tokenizer, or a processor that has one. It is not changed.
        prompt: A text or a list of chat messages.
        answer: A text.
        chat_template_kwargs: Arguments for the tokenizer's chat template.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the prompt or the answer is empty or has no tokens, or if a chat can't be
            rendered.

    >>> answer_ids(tokenizer, "Hi", "!")
    ([44, 77], [5])
    """
    return answered(PromptTokenizer(tokenizer, chat_template_kwargs), prompt, answer)
