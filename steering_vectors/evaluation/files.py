"""Read and write JSON files; a file is written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from steering_vectors._whole_files import whole_file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all; one that exists is replaced."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(found: object, path: str | os.PathLike[str] | None) -> str:
    """Return values as JSON, and write it to a file if a path is given, whole or not at all."""
    text = json.dumps(found, indent=1, ensure_ascii=False)
    if path is not None:
        write_text(path, text)
    return text


def read_json(source: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Return the object in a JSON text or file. Raises ValueError if it is none."""
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    named = "this" if is_text else os.fspath(source)
    try:
        found = json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
    except ValueError as error:  # also for bytes that are no UTF-8
        raise ValueError(f"{named} is not JSON of {what}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{named} is not JSON of {what}: it has no keys")
    return found
