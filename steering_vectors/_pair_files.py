"""Read pairs of contrasting prompts from files of programs' users."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SIDES = ("positive", "negative")


def read_pairs(path: Path) -> list[tuple[Any, Any]]:
    """Return the pairs of a CSV file with the columns positive and negative, or of JSON Lines with these keys.

    Raises ValueError, with the line's number, for a file that has other contents or none.
    """
    text = path.read_text(encoding="utf-8-sig")
    rows = _rows_of_csv(path, text) if path.suffix == ".csv" else _rows_of_json(path, text)
    pairs = []
    for line, row in rows:
        missing = [side for side in _SIDES if not isinstance(row, dict) or not row.get(side)]
        if missing:
            raise ValueError(f"{path}, line {line}: there is no {' and no '.join(missing)}")
        pairs.append((row["positive"], row["negative"]))
    if not pairs:
        raise ValueError(f"{path} has no pairs")
    return pairs


def _rows_of_csv(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    columns = list(reader.fieldnames or [])
    if not set(_SIDES) <= set(columns):
        raise ValueError(f"{path} has the columns {', '.join(columns) or 'none'}; it needs positive and negative")
    for row in reader:
        yield reader.line_num, row


def _rows_of_json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON, column {error.colno}: {error.msg}") from error
