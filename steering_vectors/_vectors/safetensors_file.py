"""Save named tensors and string metadata to one safetensors file atomically, and load untrusted ones safely."""

import json
import os
from collections.abc import Mapping

import safetensors
import safetensors.torch
from torch import Tensor

from steering_vectors._whole_files import whole_file

# A vector for all layers of the largest models takes only a few megabytes.
LARGEST_FILE = 2**30
_MOST_TENSORS = 10_000
# The first bytes of other kinds of files, to name the kind in the error.
_OTHER_FORMATS = {
    **{bytes([0x80, protocol]): "a Python pickle" for protocol in range(2, 6)},
    b"PK\x03\x04": "a pickle of torch.save",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a numpy array",
}


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all: after a crash, the old file is still there, or none.

    Raises FileNotFoundError if the folder doesn't exist, IsADirectoryError if ``path`` is a folder, and OSError if it
    exists but is not a regular file.
    """
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = _sorted(safetensors.torch.save(copies, dict(metadata)))
    with whole_file(path, or_folder=", or use save_pretrained(folder)") as temporary:
        temporary.write_bytes(content)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the tensors of a safetensors file, on the CPU, and its metadata. Nothing in the file is executed.

    Raises FileNotFoundError if there is no such file. Raises ValueError for a file that is too large, cut off, or not a
    safetensors file; the error says so if it is a pickle, a GGUF file or a numpy array.
    """
    if not os.path.isfile(path):
        if os.path.isdir(path):
            raise FileNotFoundError(f"{path} is a folder: load it with SteeringVector.from_pretrained")
        raise FileNotFoundError(f"there is no file {path}; for a repository, use SteeringVector.from_pretrained")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # of the file that is open: another may take its name meanwhile
        if size > LARGEST_FILE:
            raise ValueError(f"{path} has {size} bytes; a steering vector has at most {LARGEST_FILE}")
        content = file.read(size)
    _check_beginning(path, content)
    try:
        tensors = safetensors.torch.load(content)
        metadata = _metadata_of(content)
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {type(error).__name__}: {error}") from error
    return tensors, metadata


def _check_beginning(path: str | os.PathLike[str], content: bytes) -> None:
    if content.count(b'"dtype"') > _MOST_TENSORS:
        raise ValueError(f"{path} has more than {_MOST_TENSORS} tensors; a steering vector has one for each layer")
    for beginning, kind in _OTHER_FORMATS.items():
        if content.startswith(beginning) and content[8:9] != b"{":
            advice = ""
            if "pickle" in kind:
                advice = (
                    ". Loading a pickle may run code: if you trust its source, load it with "
                    "torch.load(path, weights_only=True) and pass the result to interop.from_tensors"
                )
            raise ValueError(f"{path} is {kind}, not a safetensors file{advice}")
    if not _has_header(content):
        raise ValueError(f"{path} is not a complete safetensors file: its {len(content)} bytes have no valid header")


def _sorted(content: bytes) -> bytes:
    """Return the same file with its header sorted: safetensors writes metadata in any order."""
    length = _header_length(content)
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _header_length(content: bytes) -> int:
    return int.from_bytes(content[:8], "little")


def _has_header(content: bytes) -> bool:
    return len(content) >= 8 and 2 <= _header_length(content) <= len(content) - 8 and content[8:9] == b"{"


def _metadata_of(content: bytes) -> dict[str, str]:
    header = json.loads(content[8 : 8 + _header_length(content)])
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata must map strings to strings")
    return metadata
