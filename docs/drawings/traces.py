"""A traced text, with the steered tokens marked, as HTML."""

import html
import io
from contextlib import redirect_stdout
from functools import cache

from drawings.models import smollm2
from steering_vectors import from_index, generated, trace_steering, train_steering_vector

# The pairs and the prompt of the page that shows the text.
PAIRS = [
    ("I love this.", "I hate this."),
    ("A wonderful day!", "A terrible day!"),
    ("The food was delicious.", "The food was disgusting."),
    ("She is a kind and generous friend.", "She is a cruel and selfish friend."),
    ("What a brilliant idea.", "What a stupid idea."),
    ("The room was clean and bright.", "The room was dirty and dark."),
]
PROMPT = "I think the hotel was"


class _Terminal(io.StringIO):
    """A terminal that keeps what is printed, so that a trace marks tokens by colour."""

    def isatty(self) -> bool:
        """Return True."""
        return True


@cache
def steered_text() -> str:
    """Return what a trace of SmolLM2 prints, with ``<mark>`` in place of a terminal's colours.

    Raises NoModelError if the model isn't there.
    """
    model, tokenizer = smollm2()
    vector = train_steering_vector(model, tokenizer, PAIRS, layers=[16, 17], tokens=from_index(1), batch_size=6)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with vector.apply(model, tokens=generated(inputs)), trace_steering(model) as trace:
        model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with redirect_stdout(_Terminal()) as terminal:
        trace.show(tokenizer)
    printed = html.escape(terminal.getvalue().rstrip("\n"))
    return printed.replace("\x1b[7m", "<mark>").replace("\x1b[0m", "</mark>")
