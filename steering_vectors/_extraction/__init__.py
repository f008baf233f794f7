"""Turn prompts into rows of activations.

Texts and chats become token ids, a request becomes the tokens to read, and prompts that begin alike are run together.
Each row is what its prompt alone gives, which is verified against the model and not assumed.
Directions are made of the rows elsewhere.
"""

from steering_vectors._extraction.answers import answered
from steering_vectors._extraction.extractor import Extractor, LayerRows
from steering_vectors._extraction.packs import shared_prefix
from steering_vectors._extraction.read_model import ReadPrompt
from steering_vectors._extraction.reading import WINDOW, Reading, ReadTokenIndex, extractor_for
from steering_vectors._extraction.samples import MISSING, SIDES, are_pairs, check_sides, sides_of
from steering_vectors._extraction.tokenizing import Prompt, PromptTokenizer, chat_template_of
from steering_vectors._extraction.walk import by_side, in_windows, rows_of_samples

__all__ = [
    "MISSING",
    "SIDES",
    "WINDOW",
    "Extractor",
    "LayerRows",
    "Prompt",
    "PromptTokenizer",
    "ReadPrompt",
    "ReadTokenIndex",
    "Reading",
    "answered",
    "are_pairs",
    "by_side",
    "chat_template_of",
    "check_sides",
    "extractor_for",
    "in_windows",
    "rows_of_samples",
    "shared_prefix",
    "sides_of",
]
