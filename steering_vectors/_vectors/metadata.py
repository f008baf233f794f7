"""What is known of how a vector was made: strings by name, which no computation depends on."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from steering_vectors._models import Anatomy
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


# What files tell of their own directions: it is computed anew for each.
COMPUTED = ("format", "format_version", "layer_type", "layer_convention", "hidden_size", "norms")
_LONGEST_DERIVATION = 400


class TrainingRecord:
    """What is noted of the samples while they pass by.

    ``samples_hash`` is the SHA-256 of the token ids, written as Python writes a list, prompt after prompt: of each
    sample the positive one and then the negative one. ``read_hash`` is that of the positions that are read, in the same
    way.
    """

    def __init__(self) -> None:
        self._prompts = 0
        self._ids, self._positions = sha256(), sha256()

    def add(self, input_ids: Sequence[int], positions: Sequence[int]) -> None:
        """The next prompt."""
        self._prompts += 1
        self._ids.update(repr(list(input_ids)).encode())
        self._positions.update(repr(list(positions)).encode())

    def entries(self) -> dict[str, str]:
        hashes = {"samples_hash": self._ids.hexdigest(), "read_hash": self._positions.hexdigest()}
        return {"samples": str(self._prompts // 2), **hashes}


def of_model(anatomy: Anatomy) -> dict[str, str]:
    """What tells a model: its type and size, its name and revision, and what its activations' last digits depend on."""
    model, config = anatomy.model, anatomy.config
    quantization: Any = getattr(config, "quantization_config", None)
    found: dict[str, Any] = {
        "base_model": _without_folders(str(getattr(config, "_name_or_path", None) or "")),
        "quantization": getattr(quantization, "quant_method", None),
        "adapters": ", ".join(f"{name}: {own}" for name, own in getattr(model, "peft_config", {}).items()),
        "base_model_revision": getattr(config, "_commit_hash", None),
        "attention_implementation": getattr(anatomy.text_config, "_attn_implementation", None),
        **type_and_depth(anatomy),
    }
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    found["dtype"] = ", ".join(sorted(dtypes))
    return {name: str(value) for name, value in found.items() if value}


def _without_folders(name: str) -> str:
    """A model's name, of a path its last part alone: what it stands in is nobody's business."""
    is_path = "\\" in name or os.path.isabs(name) or name.startswith((".", "~")) or os.path.exists(name)
    return os.path.basename(os.path.normpath(name.replace("\\", "/"))) if is_path or name.count("/") > 1 else name


def type_and_depth(anatomy: Anatomy) -> dict[str, str]:
    """The text decoder's model type and its number of blocks, as far as they can be told."""
    found = {"model_type": getattr(anatomy.text_config, "model_type", None)}
    with suppress(ValueError):  # then layer_config says where they are
        found["layers_of_model"] = str(len(anatomy.blocks))
    return {name: value for name, value in found.items() if value}


def of_template(template: object, template_kwargs: Mapping[str, Any] | None) -> dict[str, str]:
    """A hash of the chat template, and the arguments that it got."""
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
    return Metadata({**of_another(common), "derivation": operation.format(*map(_told, sources))})


def of_another(metadata: Mapping[str, str]) -> Metadata:
    """What holds of other directions that were made in the same way too."""
    return Metadata({name: value for name, value in metadata.items() if name not in COMPUTED})


def _told(metadata: Mapping[str, str]) -> str:
    """A vector in few words."""
    derivation = metadata.get("derivation", "")
    if derivation:
        return f"({derivation})" if len(derivation) <= _LONGEST_DERIVATION else f"({derivation[:_LONGEST_DERIVATION]}…)"
    if "method" not in metadata:
        return "a vector"
    return f"[{metadata['method']} of {metadata.get('samples', '?')} samples {metadata.get('samples_hash', '')[:8]}]"


def _are_strings(*values: object) -> bool:
    return all(isinstance(value, str) for value in values)
