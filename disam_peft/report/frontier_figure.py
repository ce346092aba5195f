"""The figure of WiSE-FT: accuracy where nobody trained against accuracy on the sources; accuracy, NLL and ECE over
alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from disam_peft.common.frontier_records import Frontier, mean_curve
from disam_peft.report.drawing import COLOURS, legend_above

_SIDE_BY_SIDE = 6.0  # inches; narrower, the two panels stand one below the other
_NAMES = {"held_out": "held out", "source_validation": "source validation", "test": "test part"}


def frontier_curves(named: Sequence[tuple[str, Sequence[Frontier]]], width: float) -> Figure:
    """A line for each title: one run, or the mean over several with the same alphas. The first panel has the accuracy
    where nobody trained against that on source validation, with a dot for each alpha: those of zero-shot (hollow) and
    of the trained weights (large) are marked, and a ring is the alpha that source validation recommends. The others
    have accuracy, NLL and ECE over alpha, on source validation dotted. Without a held-out domain or a test part they
    are the only ones, and the marks stand in the first of them."""
    judged = {frontier.judged for _, runs in named for frontier in runs}
    split = judged.pop() if len(judged) == 1 else None
    figure, panels = _panels(width, 3 if split is None else 4)
    for number, (title, runs) in enumerate(named):
        colour, alphas = COLOURS[number % len(COLOURS)], runs[0].alphas
        of_sources = _percent(mean_curve(runs, "source_validation", "top1"))
        marked = of_sources if split is None else _percent(mean_curve(runs, split, "top1"))
        x, y = (alphas, marked) if split is None else (of_sources, marked)
        _line_with_ends(panels[0], x, y, alphas, colour, title)
        recommended = {frontier.recommended for frontier in runs}
        if len(recommended) == 1:
            place = alphas.index(recommended.pop())
            panels[0].plot(x[place], y[place], "o", color=colour, fillstyle="none", markersize=11, markeredgewidth=1.2)
        if split is not None:
            panels[1].plot(alphas, of_sources, ":", color=colour, linewidth=1.4)
            panels[1].plot(alphas, marked, "-", color=colour, linewidth=1.4)
        for panel, metric in zip(panels[-2:], ("nll", "ece"), strict=True):
            panel.plot(
                alphas, _numbers(mean_curve(runs, "source_validation", metric)), ":", color=colour, linewidth=1.4
            )
            if split is not None:
                panel.plot(alphas, _numbers(mean_curve(runs, split, metric)), "-", color=colour, linewidth=1.4)
    name = _NAMES["source_validation" if split is None else split]
    if split is not None:
        panels[0].set_xlabel("accuracy on source validation (%)")
        panels[0].set_ylabel(f"accuracy, {name} (%)")
    first = f"accuracy, {name} (%)" if split is None else "accuracy (%)\n(dotted: sources)"
    for panel, label in zip(panels[-3:], (first, "NLL", "ECE"), strict=True):
        panel.set_xlabel("alpha (0: zero-shot, 1: trained)")
        panel.set_ylabel(label)
    for panel in panels:
        panel.grid(alpha=0.25, linewidth=0.5)
    if len(named) > 1 or named[0][0]:
        legend_above(figure, *panels[0].get_legend_handles_labels())
    return figure


def _panels(width: float, count: int) -> tuple[Figure, list[Any]]:
    """Three panels in a row or four in a square; one below the other where the figure is narrow."""
    if width < _SIDE_BY_SIDE:
        figure = Figure(figsize=(width, 2.7 * count), layout="constrained")
        return figure, list(figure.subplots(count, 1))
    rows = 1 if count == 3 else 2
    figure = Figure(figsize=(width, 2.7 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, count // rows).flat)


def _line_with_ends(
    axes: Any, x: list[float], y: list[float], alphas: Sequence[float], colour: str, title: str
) -> None:
    axes.plot(x, y, ".-", color=colour, linewidth=1.2, markersize=4, label=title)
    for end, style in ((0.0, "none"), (1.0, "full")):
        if end in alphas:
            place = alphas.index(end)
            axes.plot(x[place], y[place], "o", color=colour, fillstyle=style, markersize=6)
            axes.annotate(f"{end:g}", (x[place], y[place]), xytext=(-7, 5), textcoords="offset points", ha="right")


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _percent(values: Sequence[float | None]) -> list[float]:
    return [100 * value for value in _numbers(values)]
