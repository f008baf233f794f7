"""Metadata of vectors: strings by name that record how a vector was made.

Only the entry ``layer_config`` has an effect: it names the modules that a vector was trained at, if they are others
than the model's layers of the vector's type.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from steering_vectors._models import Anatomy
from steering_vectors._vectors.strength import of_mean_norms, without_norms
from steering_vectors._version import __version__


class Metadata(Mapping[str, str]):
    """A read-only mapping of strings."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        """Copy the entries. Raises TypeError for anything but strings."""
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


# Entries that describe the directions in a file: they are computed anew for each file.
COMPUTED = ("format", "format_version", "layer_type", "layer_convention", "hidden_size", "norms")
_LONGEST_DERIVATION = 400


class TrainingRecord:
    """A record of the training samples: their number, and hashes of them.

    ``samples_hash`` is the SHA-256 of the token ids, prompt after prompt, each written as Python writes a list. The
    positive prompt of a sample comes before the negative one. Sample n of two sets is prompt n of each, if there is
    one. A prompt with images is followed by the SHA-256 of its inputs. ``read_hash`` is the same for the positions to
    read.
    """

    def __init__(self, *, paired: bool) -> None:
        self.paired = paired
        self._prompts = {"positive": 0, "negative": 0}
        self._ids, self._positions = sha256(), sha256()

    def add(self, side: str, input_ids: Sequence[int], positions: Sequence[int], images: str = "") -> None:
        """Add the next prompt; ``images`` is a hash of its inputs if it has any."""
        self._prompts[side] += 1
        self._ids.update(f"{list(input_ids)}{images}".encode())
        self._positions.update(repr(list(positions)).encode())

    def entries(self) -> dict[str, str]:
        """Return the metadata entries for the prompts added so far."""
        hashes = {"samples_hash": self._ids.hexdigest(), "read_hash": self._positions.hexdigest()}
        positive, negative = self._prompts.values()
        return {"samples": str(positive) if self.paired else f"{positive} + {negative}", **hashes}


def of_model(anatomy: Anatomy) -> dict[str, str]:
    """Identify a model: its type, depth, name and revision, and the settings that affect rounding."""
    model, config = anatomy.model, anatomy.config
    quantization: Any = getattr(config, "quantization_config", None)
    found: dict[str, Any] = {
        "base_model": _without_folders(str(getattr(config, "_name_or_path", None) or "")),
        "quantization": getattr(quantization, "quant_method", None),
        "adapters": ", ".join(f"{name}: {adapter}" for name, adapter in getattr(model, "peft_config", {}).items()),
        "base_model_revision": getattr(config, "_commit_hash", None),
        "attention_implementation": getattr(anatomy.text_config, "_attn_implementation", None),
        **type_and_depth(anatomy),
    }
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    found["dtype"] = ", ".join(sorted(dtypes))
    return {name: str(value) for name, value in found.items() if value}


def _without_folders(name: str) -> str:
    """Return a model's name, reduced to the last part if it is a path: folder names are private."""
    is_path = "\\" in name or os.path.isabs(name) or name.startswith((".", "~")) or os.path.exists(name)
    return os.path.basename(os.path.normpath(name.replace("\\", "/"))) if is_path or name.count("/") > 1 else name


def type_and_depth(anatomy: Anatomy) -> dict[str, str]:
    """Return the text decoder's model type and its number of blocks, as far as they are known."""
    found = {"model_type": getattr(anatomy.text_config, "model_type", None)}
    with suppress(ValueError):  # the blocks are not found: layer_config names the layers instead
        found["layers_of_model"] = str(len(anatomy.blocks))
    return {name: value for name, value in found.items() if value}


def of_template(template: object, template_kwargs: Mapping[str, Any] | None) -> dict[str, str]:
    """Return a hash of the chat template, and the arguments passed to it."""
    found = {} if not template else {"chat_template_hash": sha256(str(template).encode()).hexdigest()}
    return found if not template_kwargs else {**found, "chat_template_kwargs": repr(dict(template_kwargs))}


def of_libraries() -> dict[str, str]:
    """Return the versions of this library and of the libraries that run the model."""
    others = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return {"versions": f"steering-vectors {__version__}, {others}"}


def without_addresses(shown: str) -> str:
    """Remove memory addresses from a repr, so that it is the same in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", shown)


def derived(operation: str, *sources: Mapping[str, str]) -> Metadata:
    """Return the metadata for the result of an operation on vectors.

    They are the entries on which the vectors agree, and the derivation. ``operation`` has a ``{}`` for each vector.
    """
    first, *others = sources
    common = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    kept = {**without_norms(inherited(common)), **of_mean_norms(sources)}
    return Metadata({**kept, "derivation": operation.format(*map(_summary, sources))})


def inherited(metadata: Mapping[str, str]) -> Metadata:
    """Return the entries that also hold for other directions made in the same way."""
    return Metadata({name: value for name, value in metadata.items() if name not in COMPUTED})


def _summary(metadata: Mapping[str, str]) -> str:
    """Describe a vector in a few words."""
    derivation = metadata.get("derivation", "")
    if derivation:
        return f"({derivation})" if len(derivation) <= _LONGEST_DERIVATION else f"({derivation[:_LONGEST_DERIVATION]}…)"
    if "method" not in metadata:
        return "a vector"
    return f"[{metadata['method']} of {metadata.get('samples', '?')} samples {metadata.get('samples_hash', '')[:8]}]"


def _are_strings(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)
