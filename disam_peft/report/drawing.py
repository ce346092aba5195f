"""Turns a plot into an SVG for wide screens, one for narrow screens, and a PNG for papers.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; text is dark on white.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from disam_peft.common.files import write_atomically
from disam_peft.errors import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
METHOD_COLOURS = {
    "zero-shot": "#999999",
    "ERM": "#0072B2",
    "SAM": "#E69F00",
    "DISAM": "#D55E00",
    "GSAM": "#009E73",
    "DISAM + GSAM": "#CC79A7",
    "SAGM": "#56B4E9",
    "DISAM + SAGM": "#000000",
}
INK = "#1c2330"
WIDE, NARROW = 7.6, 3.7
"""Inches: of a page, and of a phone. The font is 9 pt in both, so neither is shrunk until it cannot be read."""
_LETTER, _HANDLE = 0.075, 0.55  # inches: of a letter in 9 pt, and of a line in a legend with the space around it
_LINE = 0.16  # inches: of a line of a title or a legend
_MOST_LINES = 6  # of a title
_FREE_LINES = 2  # which the height of a figure without long titles has place for
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    # no date, and ids from a fixed salt: the same records give the same bytes
    "svg.hashsalt": "disam_peft",
}


@dataclass(frozen=True)
class Drawing:
    """A figure in every form that it is shown in."""

    name: str
    """Of its files, without suffix."""
    alt: str
    """What is to be seen, for those who cannot."""
    wide: str
    narrow: str
    """SVG."""
    png: bytes

    @property
    def wide_uri(self) -> str:
        return _uri(self.wide)

    @property
    def narrow_uri(self) -> str:
        return _uri(self.narrow)

    def save(self, folder: Path) -> None:
        """Write ``name.svg`` and ``name.png``."""
        write_atomically(folder / f"{self.name}.svg", self.wide)
        write_atomically(folder / f"{self.name}.png", self.png)


def draw(name: str, alt: str, plot: Callable[[float], Figure]) -> Drawing:
    """``plot(width)`` makes the figure for a width in inches; it is called for both.

    Raises:
        UserError: numbers that no axis can hold, such as a loss of 1e308.
    """
    with matplotlib.rc_context(STYLE):
        try:
            wide, narrow = plot(WIDE), plot(NARROW)
            buffer = io.BytesIO()
            wide.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
            return Drawing(re.sub(r"[^\w.-]+", "_", name), alt, svg(wide), svg(narrow), buffer.getvalue())
        except (ValueError, OverflowError, FloatingPointError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"the figure {name!r} ({alt}) cannot be drawn ({error}): a record of these runs holds a number that no "
                "axis can hold; look for it in metrics.jsonl, or leave the run out"
            ) from error


def grid(count: int, width: float, panel: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` panels, at least ``panel`` inches wide each, in as many columns as fit; shared axes."""
    columns = max(1, min(count, int(width / panel)))
    rows = -(-count // columns)
    figure = Figure(figsize=(width, rows * height), layout="constrained")
    axes: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    for above in axes.flat[max(0, count - columns) : count]:
        above.tick_params(labelbottom=True)  # nothing stands below it
    return figure, list(axes.flat[:count])


def columns_of(panels: list[Any]) -> int:
    """In how many columns ``grid`` has put the panels."""
    return int(panels[0].get_subplotspec().get_gridspec().ncols)


def edges(panels: list[Any]) -> tuple[list[Any], list[Any]]:
    """The panels of the first column, and the lowest of each column: where labels belong."""
    places = [panel.get_subplotspec() for panel in panels]
    columns = columns_of(panels)
    left = [panel for panel, place in zip(panels, places, strict=True) if place.colspan.start == 0]
    return left, panels[-columns:]


def panel_title(title: str, width: float) -> str:
    """A title with its settings, which stand in brackets, in lines of their own that fit into ``width`` inches; of more
    than a few lines the first ones."""
    method, bracket, settings = title.partition(" (")
    if not bracket:
        return title
    return f"{method}\n{wrapped(f'({settings}', width, _MOST_LINES - 1)}"


def wrapped(text: str, width: float, most: int) -> str:
    """The text in at most ``most`` lines that fit into ``width`` inches; what has no place is left out."""
    letters = max(12, int(width / _LETTER))
    lines = textwrap.wrap(text, letters, break_long_words=False, max_lines=most, placeholder=" …")
    return "\n".join(line if len(line) <= letters else f"{line[: letters - 1]}…" for line in lines)


def make_room_for_titles(figure: Figure, panels: Sequence[Any]) -> None:
    """A taller figure where titles of panels have many lines, so that the panels keep their height."""
    lines = max(panel.get_title().count("\n") + 1 for panel in panels)
    rows = -(-len(panels) // columns_of(list(panels)))
    figure.set_figheight(figure.get_figheight() + rows * _LINE * max(0, lines - _FREE_LINES))


def legend_above(figure: Figure, handles: Sequence[Any], titles: Sequence[str]) -> None:
    """A legend above the panels, in as many columns as fit, and a taller figure where it has many lines."""
    width = figure.get_figwidth()
    told = [wrapped(title, width - _HANDLE, _MOST_LINES) or title for title in titles]
    columns = legend_columns([line for title in told for line in title.split("\n")], width)
    columns = min(columns, len(told)) or 1
    rows = -(-len(told) // columns)  # a legend is filled by columns
    lines = sum(max(title.count("\n") + 1 for title in told[row::rows]) for row in range(rows))
    figure.set_figheight(figure.get_figheight() + _LINE * max(0, lines - _FREE_LINES))
    figure.legend(handles, told, loc="outside upper center", ncols=columns, frameon=False, columnspacing=1.2)


def legend_columns(titles: Sequence[str], width: float) -> int:
    """How many columns of a legend with these titles fit into ``width`` inches, at most six."""
    longest = max(map(len, titles), default=0)
    return max(1, min(6, len(titles), int(width / (_HANDLE + _LETTER * longest))))


def svg(figure: Figure) -> str:
    """The ``<svg>`` element alone; within STYLE the same bytes from the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
