"""The table of cases at the end of a run."""

from collections.abc import Callable
from typing import Any

import pytest

ShowCase = Callable[[str, float, float], None]


@pytest.fixture
def show(request: pytest.FixtureRequest) -> ShowCase:
    """Put a case into the table: its name, its distance from Hugging Face, and its effect."""

    def note(case: str, off: float, effect: float) -> None:
        request.node.user_properties.append(("case", (case, off, effect)))

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows = [value for report in reports for name, value in getattr(report, "user_properties", ()) if name == "case"]
    if not rows:
        return
    terminalreporter.section("differences of log-probability, top 20")
    terminalreporter.write_line(f"{'case':<60} {'from Hugging Face':>18} {'by steering':>12}")
    for case, off, effect in dict.fromkeys(map(tuple, rows)):
        shown = f"{effect:>12.2f}" if effect < float("inf") else f"{'–':>12}"
        terminalreporter.write_line(f"{case:<60} {off:>18.1e} {shown}")
