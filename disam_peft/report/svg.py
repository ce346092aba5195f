"""How figures look, and how they become SVG text."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names are no formulas, whatever dollars they hold
}


def svg(figure: Figure) -> str:
    """The ``<svg>`` element alone, the same bytes from the same figure."""
    buffer = io.StringIO()
    # no date, and ids from a fixed salt: the same records give the same bytes
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "disam_peft"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
