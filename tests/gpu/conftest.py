"""What runs on the device that DEVICE names, and a table of what was found there."""

import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from tests.gpu.promises import DEVICE


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = [
        (report.outcome, *cells)
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        for name, cells in getattr(report, "user_properties", [])
        if name == "gpu"
    ]
    if not found:
        return
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine()
    terminalreporter.section(f"torch {torch.__version__}, transformers {transformers.__version__}, {DEVICE}: {device}")
    rows: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for outcome, check, kind, value, limit in found:
        rows.setdefault((check, kind), []).append((value, limit, outcome))
    terminalreporter.write_line(f"{'check':44}{'dtype or way':28}{'worst':>12}{'limit':>12}  cases")
    for (check, kind), cells in rows.items():
        worst, limit = max(value for value, _, _ in cells), cells[0][1]
        failed = sum(outcome == "failed" for _, _, outcome in cells)
        state = f"{len(cells)}" + (f", {failed} FAILED" if failed else "")
        terminalreporter.write_line(f"{check:44}{kind:28}{worst:12.2g}{limit:12.2g}  {state}")


@pytest.fixture
def at_most(request: pytest.FixtureRequest) -> Callable[[str, str, float, float], None]:
    """Puts a row into the table, and fails where the value is over the limit: ``at_most(check, kind, value, limit)``."""

    def check(name: str, kind: str, value: float, limit: float) -> None:
        request.node.user_properties.append(("gpu", (name, kind, value, limit)))
        assert value <= limit, f"{name}, {kind}: {value} is over {limit}"

    return check
