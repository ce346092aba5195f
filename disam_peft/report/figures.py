"""Figures as SVG text. Colours are those of Okabe and Ito, which colour-blind readers can tell apart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from disam_peft.report.runs import RunRecord
from disam_peft.report.tables import METHOD_TITLES, ComparisonTable

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
METHOD_COLOURS = {"zero-shot": "#999999", "ERM": "#0072B2", "SAM": "#E69F00", "DISAM": "#D55E00"}
_STYLE: Any = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def accuracy_bars(table: ComparisonTable) -> str:
    """A group of bars per held-out domain, a bar per method; the deviation over seeds as a whisker."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(table.columns)
        for number, method in enumerate(table.columns):
            cells = [cells[number] for _, cells in table.lines]
            places = [i + (number + 0.5) * width - 0.4 for i in range(len(cells))]
            heights = [table.scale * cell.mean if cell is not None else 0.0 for cell in cells]
            spread = [table.scale * cell.deviation if cell is not None and cell.deviation else 0.0 for cell in cells]
            axes.bar(
                places, heights, width, color=METHOD_COLOURS[method], label=method, yerr=spread if any(spread) else None
            )
        axes.set_xticks(range(len(table.lines)), [name for name, _ in table.lines])
        axes.set_ylabel("accuracy (%)" if table.scale == 100 else "")
        figure.legend(loc="outside upper center", ncols=len(table.columns), frameon=False)
        return _svg(figure)


def domain_curves(runs: Sequence[RunRecord], field: str, label: str) -> str:
    """``domain_loss`` or ``domain_weight`` of every source domain over the steps, a panel per run."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(2.4 * max(2, len(runs)) + 0.8, 2.8), layout="constrained")
        panels: Any = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        domains = sorted({name for run in runs for step in run.steps for name in step[field]})
        for axes, run in zip(panels, runs, strict=True):
            _curves(axes, run, field, domains)
            axes.set_title(METHOD_TITLES[run.trained.method], fontsize=9)
            axes.set_xlabel("step")
        panels[0].set_ylabel(label)
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(6, len(domains)),
            frameon=False,
        )
        return _svg(figure)


def _curves(axes: Axes, run: RunRecord, field: str, domains: Sequence[str]) -> None:
    for number, domain in enumerate(domains):
        points = [(step["step"], step[field][domain]) for step in run.steps if step[field].get(domain) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], label=domain, linewidth=1.2)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # no date, and ids from a fixed salt: the same records give the same bytes
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "disam_peft"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
