"""What is known of how a vector was made: strings by name, which no computation depends on."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from torch import nn

from steering_vectors._model_structure import configured, decoder_blocks, text_config
from steering_vectors._version import __version__


class Metadata(Mapping[str, str]):
    """A read-only mapping of strings."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        """Raises TypeError for anything but strings."""
        if not isinstance(entries, Mapping):
            raise TypeError(f"metadata must be a mapping of strings, got {type(entries).__name__}")
        wrong = next((f"{name!r}: {value!r}" for name, value in entries.items() if not _are_strings(name, value)), None)
        if wrong is not None:
            raise TypeError(f"metadata must map strings to strings, got {wrong}")
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self._entries)


class TrainingRecord:
    """What is noted of the samples while they pass by."""

    def __init__(self) -> None:
        self._samples = 0
        self._hash = sha256()

    def add(self, prompts: Sequence[Sequence[int]]) -> None:
        """The token ids of some samples: of each the positive and the negative prompt."""
        self._samples += len(prompts) // 2
        self._hash.update(repr([list(ids) for ids in prompts]).encode())

    def entries(self) -> dict[str, str]:
        return {"samples": str(self._samples), "samples_hash": self._hash.hexdigest()}


def of_model(model: nn.Module) -> dict[str, str]:
    """What tells a model: its type and size, its name and revision, and what its activations' last digits depend on."""
    config: Any = getattr(configured(model), "config", None)
    text: Any = text_config(model)
    name = str(getattr(config, "_name_or_path", None) or "")
    found: dict[str, Any] = {
        "base_model": os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
        "base_model_revision": getattr(config, "_commit_hash", None),
        "attention_implementation": getattr(text, "_attn_implementation", None),
        **type_and_depth(model),
    }
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    found["dtype"] = ", ".join(sorted(dtypes))
    return {name: str(value) for name, value in found.items() if value}


def type_and_depth(model: nn.Module) -> dict[str, str]:
    """The text decoder's model type and its number of blocks, as far as they can be told."""
    found = {"model_type": getattr(text_config(model), "model_type", None)}
    with suppress(ValueError):  # then layer_config says where they are
        found["layers_of_model"] = str(len(decoder_blocks(model)[1]))
    return {name: value for name, value in found.items() if value}


def of_tokenizer(tokenizer: Any, template_kwargs: Mapping[str, Any] | None) -> dict[str, str]:
    """A hash of the chat template, and the arguments that it got."""
    template = getattr(tokenizer, "chat_template", None)
    found = {} if not template else {"chat_template_hash": sha256(str(template).encode()).hexdigest()}
    return found if not template_kwargs else {**found, "chat_template_kwargs": repr(dict(template_kwargs))}


def of_libraries() -> dict[str, str]:
    """The versions of this library, and of those that decide what a model computes."""
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return {"versions": f"steering-vectors {__version__}, {others}"}


def without_addresses(shown: str) -> str:
    """A repr that is the same in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", shown)


def derived(operation: str, *sources: Mapping[str, str]) -> Metadata:
    """The metadata of what an operation made of vectors: what they agree in, and where it came from.

    ``operation`` has a ``{}`` for each of the vectors.
    """
    first, *others = sources
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    common.pop("derivation", None)
    return Metadata({**common, "derivation": operation.format(*map(_told, sources))})


def _told(metadata: Mapping[str, str]) -> str:
    """A vector in few words."""
    if "derivation" in metadata:
        return f"({metadata['derivation']})"
    if "method" not in metadata:
        return "a vector"
    return f"[{metadata['method']} of {metadata.get('samples', '?')} samples {metadata.get('samples_hash', '')[:8]}]"


def _are_strings(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)
