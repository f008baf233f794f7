"""The models of the pictures: SmolLM2 where it is installed, and a tiny random Llama."""

from functools import cache
from typing import Any

import local_hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny


class NoModelError(Exception):
    """An error for pictures of SmolLM2 where it isn't installed."""


@cache
def smollm2() -> tuple[Any, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer. Raises NoModelError if they aren't there."""
    if not local_hub.FOLDER.exists():
        raise NoModelError(f"{local_hub.NAME} is not in {local_hub.FOLDER}")
    model = AutoModelForCausalLM.from_pretrained(local_hub.FOLDER)
    return model, AutoTokenizer.from_pretrained(local_hub.FOLDER)


def tiny_llama() -> Any:
    """Return a random Llama of three blocks."""
    return tiny.shared("llama")
