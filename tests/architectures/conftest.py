"""Prints what was found for each architecture, as a table."""

from collections import defaultdict
from typing import Any

import pytest

COLUMNS = (
    "layers",
    "adds",
    "generates",
    "loops",
    "text layers",
    "images",
    "reads",
    "ablates",
    "parts",
    "heads",
    "neurons",
)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "architecture":
                    architecture, column, text = value
                    rows[architecture][column] = text if outcome != "failed" else "FAILED"
    if not rows:
        return
    terminalreporter.section("architectures")
    terminalreporter.write_line(f"{'model type':28}" + "".join(f"{column:24}" for column in COLUMNS))
    for architecture in sorted(rows):
        cells = "".join(f"{rows[architecture].get(column, ''):24}" for column in COLUMNS)
        terminalreporter.write_line(f"{architecture:28}{cells}".rstrip())
    for column in COLUMNS:
        texts = [row[column] for row in rows.values() if column in row]
        counts = {text: texts.count(text) for text in sorted(set(texts))}
        terminalreporter.write_line(f"{column}: {counts}")


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Any:
    """Puts a cell into the table: ``note(architecture, column, text)``."""

    def put(architecture: str, column: str, text: str) -> None:
        request.node.user_properties.append(("architecture", (architecture, column, text)))

    return put
