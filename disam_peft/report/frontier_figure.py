"""The figure of WiSE-FT: accuracy where nobody trained against accuracy on the sources, and likelihood over alpha."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from disam_peft.common.frontier_records import Frontier, mean_curve
from disam_peft.report.drawing import COLOURS, legend_columns

_SIDE_BY_SIDE = 6.0  # inches; narrower, the two panels stand one below the other
_NAMES = {"held_out": "held out", "source_validation": "source validation", "test": "test part"}


def frontier_curves(named: Sequence[tuple[str, Sequence[Frontier]]], width: float) -> Figure:
    """A line for each title: one run, or the mean over several with the same alphas. On the left a dot for each alpha,
    those of zero-shot (hollow) and of the trained weights (large) marked; a ring is the alpha that source validation
    recommends. Without a held-out domain or a test part the left panel shows source validation over alpha."""
    wide = width >= _SIDE_BY_SIDE
    figure = Figure(figsize=(width, 2.9 if wide else 5.4), layout="constrained")
    left, right = figure.subplots(1, 2) if wide else figure.subplots(2, 1)
    judged = {frontier.judged for _, runs in named for frontier in runs}
    split = judged.pop() if len(judged) == 1 else None
    for number, (title, runs) in enumerate(named):
        colour, alphas = COLOURS[number % len(COLOURS)], runs[0].alphas
        of_sources = _percent(mean_curve(runs, "source_validation", "top1"))
        x, y = (alphas, of_sources) if split is None else (of_sources, _percent(mean_curve(runs, split, "top1")))
        _line_with_ends(left, x, y, alphas, colour, title)
        recommended = {frontier.recommended for frontier in runs}
        if len(recommended) == 1:
            place = alphas.index(recommended.pop())
            left.plot(x[place], y[place], "o", color=colour, fillstyle="none", markersize=11, markeredgewidth=1.2)
        right.plot(alphas, _numbers(mean_curve(runs, "source_validation", "nll")), ":", color=colour, linewidth=1.4)
        if split is not None:
            right.plot(alphas, _numbers(mean_curve(runs, split, "nll")), "-", color=colour, linewidth=1.4)
    name = _NAMES["source_validation" if split is None else split]
    left.set_xlabel("alpha" if split is None else "accuracy on source validation (%)")
    left.set_ylabel(f"accuracy, {name} (%)")
    right.set_xlabel("alpha (0: zero-shot, 1: trained)")
    right.set_ylabel("NLL" if split is None else f"NLL ({name}; dotted: sources)")
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.5)
    if len(named) > 1 or named[0][0]:
        columns = legend_columns([title for title, _ in named], width)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


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
