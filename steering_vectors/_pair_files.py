"""Read rows, such as pairs of contrasting prompts, from files of programs' users."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SIDES = ("positive", "negative")


def read_pairs(path: Path) -> list[tuple[Any, Any]]:
    """Return the pairs of a CSV file with the columns positive and negative, or of JSON Lines with these keys.

    Raises ValueError, with the line's number, for a file that has other contents or none.
    """
    return [(row["positive"], row["negative"]) for row in read_rows_of(path, SIDES, what="pairs")]


def read_rows_of(path: Path, names: Sequence[str], *, what: str = "rows") -> list[dict[str, Any]]:
    """Return the rows of a CSV file with the columns ``names``, or of JSON Lines with these keys.

    Raises ValueError, with the line's number, for a file that has other contents or none.
    """
    text = path.read_text(encoding="utf-8-sig")
    rows = _rows_of_csv(path, text, names) if path.suffix == ".csv" else _rows_of_json(path, text)
    found = []
    for line, row in rows:
        missing = [name for name in names if not isinstance(row, dict) or not row.get(name)]
        if missing:
            others = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) and path.suffix != ".csv" else ""
            raise ValueError(f"{path}, line {line}: there is no {' and no '.join(missing)}{others}")
        found.append({name: row[name] for name in names})
    if not found:
        raise ValueError(f"{path} has no {what}")
    return found


def _rows_of_csv(path: Path, text: str, names: Sequence[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    columns = list(reader.fieldnames or [])
    if not set(names) <= set(columns):
        needed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(f"{path} has the columns {', '.join(columns) or 'none'}; it needs {needed}")
    for row in reader:
        yield reader.line_num, row


def _rows_of_json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON, column {error.colno}: {error.msg}") from error
