"""Read and write JSON files; a file is written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file. A file that exists is replaced once the new one is complete."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder: name a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} doesn't exist: make it first")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(source: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Return the object in a JSON text or file. Raises ValueError if it is none."""
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON of {what}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"this is not JSON of {what}: it has no keys")
    return found


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
