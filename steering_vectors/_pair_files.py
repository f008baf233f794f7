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
    text = read_text(path)
    rows = _rows_of_csv(path, text, names) if path.suffix == ".csv" else _rows_of_json(path, text)
    found = []
    for line, row in rows:
        missing = [name for name in names if not isinstance(row, dict) or not row.get(name)]
        if missing:
            others = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) and path.suffix != ".csv" else ""
            raise ValueError(f"{path}, line {line}: there is no {' and no '.join(missing)}{others}")
        for name in names:
            if not _is_prompt(row[name]):
                raise ValueError(f"{path}, line {line}: {name} is {row[name]!r}, not a text or a list of chat messages")
        found.append({name: row[name] for name in names})
    if not found:
        raise ValueError(f"{path} has no {what}")
    return found


def read_text(path: Path) -> str:
    """Return a file's text. Raises OSError for a path that is no file, and ValueError for bytes that aren't UTF-8."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    try:
        return found.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = found.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8: save the file in that encoding") from None


def _is_prompt(value: Any) -> bool:
    """Return True for a text, and for a list of what may be messages."""
    is_chat = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    return isinstance(value, str) or is_chat


def _rows_of_csv(path: Path, text: str, names: Sequence[str]) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    columns = list(reader.fieldnames or [])
    if not set(names) <= set(columns):
        needed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(f"{path} has the columns {', '.join(columns) or 'none'}; it needs {needed}")
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more columns than the {len(columns)} of the first line: put "
                    f'texts with commas in "quotes"'
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _rows_of_json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON, column {error.colno}: {error.msg}") from error
