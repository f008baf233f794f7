"""Colours and fonts of the pictures, in the two themes of the pages."""

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# All pictures are this wide, in points: a column of text on a phone shows them at nearly their size.
WIDTH = 302.0
MONOSPACED = "DejaVu Sans Mono"


@dataclass(frozen=True)
class Theme:
    """A set of colours for one theme of the pages. ``background`` is the pages', since pictures are transparent.

    ``colours`` can be told apart without seeing red or green; they are those of Okabe and Ito, made darker or lighter.
    ``below`` and ``above`` are the ends of a scale whose middle is ``middle``.
    """

    name: str
    background: str
    ink: str
    muted: str
    faint: str
    colours: tuple[str, str, str]
    on_colours: str
    below: str
    middle: str
    above: str

    def settings(self) -> dict[str, Any]:
        """Return the settings of matplotlib with which a picture fits the theme."""
        inked = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor")
        lines = ("axes.edgecolor", "xtick.color", "ytick.color")
        return {
            **dict.fromkeys(inked, self.ink),
            **dict.fromkeys(lines, self.muted),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "savefig.transparent": True,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.labelsize": 9,
            "axes.titlesize": 9,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "svg.fonttype": "path",
        }


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1a1a1a",
    muted="#6b6f76",
    faint="#e3e4e8",
    colours=("#0072b2", "#c25200", "#00805c"),
    on_colours="#ffffff",
    below="#c25200",
    middle="#f4f4f4",
    above="#0072b2",
)
DARK = Theme(
    name="dark",
    background="#131416",
    ink="#dcdcdc",
    muted="#9ca0a5",
    faint="#33373b",
    colours=("#56b4e9", "#f5a04c", "#3fc79a"),
    on_colours="#101112",
    below="#f5a04c",
    middle="#2a2d31",
    above="#56b4e9",
)
THEMES = (LIGHT, DARK)


def figure(height: float) -> Figure:
    """Return an empty figure of the pictures' width and the height, in points."""
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def canvas(height: float) -> tuple[Figure, Axes]:
    """Return a figure and its one axes, whose units are points from the upper left corner."""
    drawn = Figure(figsize=(WIDTH / 72, height / 72))
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    return drawn, axes
