"""The documentation's pictures: functions that draw what the library computes, and need no Sphinx.

``PICTURES`` maps the name of each picture to the function that draws it in a :class:`Theme`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from drawings import blocks, evaluations, operators, projections, selections, strengths
from drawings.models import NoModelError
from drawings.themes import DARK, LIGHT, THEMES, Theme
from drawings.traces import steered_text

__all__ = ["DARK", "LIGHT", "PICTURES", "THEMES", "NoModelError", "Theme", "steered_text", "write"]

PICTURES: Mapping[str, Callable[[Theme], Figure]] = {
    "block": blocks.draw,
    "curves": evaluations.draw_curves,
    "diagnosis": evaluations.draw_diagnosis,
    "operators": operators.draw,
    "projections": projections.draw,
    "selections": selections.draw,
    "strengths": strengths.draw,
    "sweep": evaluations.draw_sweep,
    "watched": evaluations.draw_watched,
}


def write(name: str, folder: Path) -> dict[str, Path]:
    """Draw a picture in each theme, and return the paths of the SVG files in ``folder`` by the theme's name.

    Raises KeyError if no picture has that name, and NoModelError if its model isn't there.
    """
    draw = PICTURES[name]
    folder.mkdir(parents=True, exist_ok=True)
    paths = {theme.name: folder / f"{name}-{theme.name}.svg" for theme in THEMES}
    for theme in THEMES:
        settings: Any = {**theme.settings(), "svg.hashsalt": name}
        with matplotlib.rc_context(settings):
            draw(theme).savefig(paths[theme.name], metadata={"Date": None})
    return paths
