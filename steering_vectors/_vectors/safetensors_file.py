"""Named tensors and string metadata ⇄ one safetensors file, written atomically and read without trust."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

# A vector for all layers of the largest models has some megabytes.
LARGEST_FILE = 2**30
_MOST_TENSORS = 10_000
# What other files begin with, and what they are.
_OTHER_FORMATS = {
    **{bytes([0x80, protocol]): "a Python pickle" for protocol in range(2, 6)},
    b"PK\x03\x04": "a pickle of torch.save",
    b"GGUF": "a GGUF file",
    b"\x93NUMPY": "a numpy array",
}


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file as a whole or not at all: a crash leaves the old one, or none.

    Raises FileNotFoundError if the folder isn't there, IsADirectoryError if ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))  # where a link points
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it, or use save_pretrained(folder)")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to save in")
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is there, and no file")
    content = _sorted(safetensors.torch.save(own, dict(metadata)))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata. Executes nothing.

    Raises FileNotFoundError if there is none, and ValueError for a file that is too large, cut off, or no safetensors
    file: pickles are told by name.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
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
        raise ValueError(f"{path} is no whole safetensors file: {type(error).__name__}: {error}") from error
    return tensors, metadata


def _check_beginning(path: str | os.PathLike[str], content: bytes) -> None:
    if content.count(b'"dtype"') > _MOST_TENSORS:
        raise ValueError(f"{path} has more than {_MOST_TENSORS} tensors; a steering vector has one for each layer")
    for beginning, kind in _OTHER_FORMATS.items():
        if content.startswith(beginning) and content[8:9] != b"{":
            advice = ""
            if "pickle" in kind:
                advice = (
                    ", which may run code when it is read: if you trust where it comes from, read it by "
                    "torch.load(path, weights_only=True), and give what it holds to interop.from_tensors"
                )
            raise ValueError(f"{path} is {kind}, not a safetensors file{advice}")
    if not _has_header(content):
        raise ValueError(f"{path} is no whole safetensors file: its {len(content)} bytes hold no header")


def _sorted(content: bytes) -> bytes:
    """The same file with its header in order: safetensors writes metadata in any."""
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
        raise ValueError("its metadata are no strings")
    return metadata
