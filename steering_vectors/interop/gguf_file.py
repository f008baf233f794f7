"""GGUF files of one-dimensional tensors, read without trust.

The reader of the gguf package is made for files that one trusts: it allocates, and loops over, as much as a file's
counts say. Here all counts are compared with the bytes that are there.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LARGEST_FILE = 2**30
_MOST_ENTRIES = 10_000  # of metadata, and of tensors
_LONGEST_NAME = 65_535  # of the format
_VERSIONS = (2, 3)
_F32 = 0
_KINDS = {1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
# By the number of a value's type.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass
class _Bytes:
    """A file's content and the place up to which it was read."""

    content: bytes
    place: int = 0

    def skip(self, size: int) -> int:
        """Move on by a number of bytes and return where they begin. Raises ValueError if they aren't all there."""
        begin = self.place
        if size > len(self.content) - begin:
            raise ValueError(f"it ends at byte {len(self.content)}, in the middle of an entry")
        self.place += size
        return begin

    def number(self, form: str) -> Any:
        return struct.unpack_from(form, self.content, self.skip(struct.calcsize(form)))[0]

    def text(self, longest: int) -> str:
        size = self.number("<Q")
        if size > longest:
            raise ValueError(f"one of its names has {size} bytes, expected at most {longest}")
        begin = self.skip(size)
        try:
            return self.content[begin : self.place].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"a text at byte {begin} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """Return a value of metadata; None for an array, which is skipped."""
        if kind == _STRING:
            return self.text(len(self.content))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value has the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING and count <= len(self.content) // 8:
            for _ in range(count):
                self.skip(self.number("<Q"))
        else:
            raise ValueError(f"it has an array of {count} values of type {inner}, which can't be read")
        return None


def load_gguf(path: str | os.PathLike[str], architecture: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a GGUF file. Nothing in the file is executed.

    Tensors are of one dimension and of float32.

    Raises FileNotFoundError if there is no such file. Raises ValueError if the file is too large, cut off, or anything
    but a GGUF file of this architecture with such tensors.
    """
    if not os.path.isfile(path):
        is_folder = os.path.isdir(path)
        raise FileNotFoundError(f"{path} is a folder, not a file" if is_folder else f"there is no file {path}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise ValueError(f"{path} has {size} bytes; a control vector has at most {LARGEST_FILE}")
        content = file.read(size)
    if not content.startswith(b"GGUF"):
        raise ValueError(f"{path} is not a GGUF file: it begins with {content[:4]!r}")
    try:
        return _parsed(_Bytes(content, place=4), architecture)
    except ValueError as error:
        raise ValueError(f"{path} can't be read as a GGUF file of a control vector: {error}") from error


def _parsed(file: _Bytes, architecture: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    version, tensors, entries = file.number("<I"), file.number("<Q"), file.number("<Q")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, expected one of {_VERSIONS}, in little-endian order")
    if max(tensors, entries) > _MOST_ENTRIES:
        raise ValueError(
            f"it says that it has {tensors} tensors and {entries} metadata, at most {_MOST_ENTRIES} are read"
        )
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = _new(file.text(_LONGEST_NAME), metadata)
        metadata[name] = file.value(file.number("<I"))
    found = metadata.get("general.architecture")
    if found != architecture:
        raise ValueError(f"its general.architecture is {_short(found)}, expected {architecture!r}")
    places: dict[str, tuple[int, int]] = {}
    for _ in range(tensors):
        name = _new(file.text(_LONGEST_NAME), places)
        places[name] = _place_of_tensor(file, name)
    return _tensors(file, places, metadata.get("general.alignment", 32)), metadata


def _place_of_tensor(file: _Bytes, name: str) -> tuple[int, int]:
    """Return a tensor's place among the data, and its size in numbers."""
    dimensions = file.number("<I")
    if dimensions > 4:
        raise ValueError(f"its tensor {name!r} has {dimensions} dimensions")
    sizes = [file.number("<Q") for _ in range(dimensions)]
    kind, place = file.number("<I"), file.number("<Q")
    while len(sizes) > 1 and sizes[-1] == 1:  # as llama.cpp counts dimensions
        sizes.pop()
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"its tensor {name!r} has the shape {tuple(reversed(sizes))}, expected (hidden,)")
    if kind != _F32:
        raise ValueError(f"its tensor {name!r} is of type {_KINDS.get(kind, kind)}, expected F32")
    return place, sizes[0]


def _tensors(file: _Bytes, places: dict[str, tuple[int, int]], alignment: Any) -> dict[str, Tensor]:
    is_valid = isinstance(alignment, int) and 0 < alignment < 2**20 and alignment & (alignment - 1) == 0
    if not is_valid:
        raise ValueError(f"its general.alignment is {_short(alignment)}, expected a power of two")
    data = file.place + -file.place % alignment
    room = len(file.content) - data
    if 4 * sum(size for _, size in places.values()) > max(room, 0):
        raise ValueError(f"its tensors have more numbers than the {max(room, 0)} bytes after its header")
    found = {}
    for name, (place, size) in places.items():
        if place + 4 * size > room:
            raise ValueError(f"its tensor {name!r} lies beyond the file's end")
        numbers = bytearray(file.content[data + place : data + place + 4 * size])
        found[name] = torch.frombuffer(numbers, dtype=torch.float32)
    return found


def _new(name: str, names: dict[str, Any]) -> str:
    if name in names:
        raise ValueError(f"it has two entries named {_short(name)}")
    return name


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"
