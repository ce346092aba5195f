"""Figures of a comparison as SVG text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from disam_peft.report.comparison import Comparison, Judgement, arm_title, is_zero_shot, seed_values
from disam_peft.report.drawing import COLOURS, METHOD_COLOURS, STYLE, svg
from disam_peft.report.run_measures import MEASURES
from disam_peft.report.runs import RunRecord

FACES = {"first": "#0072B2", "second": "#D55E00"}
UNDECIDED = "#8a8f99"


def difference_intervals(comparison: Comparison, metric: str) -> str:
    """A line per condition and pair: the mean difference with its interval, the seeds as dots, 0 as a rule."""
    measure, found = MEASURES[metric], comparison.verdicts[metric]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(found)), layout="constrained")
        axes: Any = figure.subplots()
        axes.axvline(0, color="#1c2330", linewidth=0.8)
        for place, one in enumerate(found):
            result = one.result
            if result.mean is None:
                continue
            colour = FACES.get(result.verdict, UNDECIDED)
            dots = seed_values(comparison, one, metric)
            axes.plot([measure.scale * x for x in dots], [place] * len(dots), ".", color=colour, alpha=0.35, zorder=1)
            if result.low is not None and result.high is not None:
                ends = [measure.scale * result.low, measure.scale * result.high]
                axes.plot(ends, [place, place], color=colour, linewidth=2.2, solid_capstyle="butt", zorder=2)
            axes.plot([measure.scale * result.mean], [place], "o", color=colour, markersize=5, zorder=3)
        axes.set_yticks(range(len(found)), [_name(one) for one in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        unit = " (points)" if measure.scale == 100 else ""
        axes.set_xlabel(f"difference{unit}: {measure.title.replace(' (%)', '')}", fontsize=8)
        axes.grid(axis="x", color="#dfe3ea", linewidth=0.6)
        axes.set_axisbelow(True)
        return svg(figure)


def arm_lines(comparison: Comparison, metric: str, means: Mapping[str, Sequence[float | None]]) -> str:
    """Mean of each arm over the conditions, which stand in their order."""
    measure = MEASURES[metric]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        axes: Any = figure.subplots()
        for number, (arm, values) in enumerate(means.items()):
            heights = [float("nan") if value is None else measure.scale * value for value in values]
            style = "--" if is_zero_shot(arm) else "-"
            colour = METHOD_COLOURS.get(arm_title(arm), COLOURS[(number + 2) % len(COLOURS)])
            axes.plot(heights, style, marker="o", markersize=4, color=colour, label=arm_title(arm))
        axes.set_xticks(range(len(comparison.conditions)), list(comparison.conditions), rotation=20, ha="right")
        axes.set_ylabel(metric.replace("_", " ") + (" (%)" if measure.scale == 100 else ""))
        figure.legend(loc="outside upper center", ncols=min(5, len(means)), frameon=False)
        return svg(figure)


def domain_panels(arms: Mapping[str, Sequence[RunRecord]], field: str, label: str) -> str:
    """``domain_loss`` or ``domain_weight`` of every source domain over the steps, the mean over the runs of an arm; a
    panel per arm."""
    curves = {arm: _mean_curves(runs, field) for arm, runs in arms.items()}
    domains = sorted({domain for of in curves.values() for domain in of})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 * max(2, len(curves)) + 0.8, 2.8), layout="constrained")
        panels: Any = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, (arm, of) in zip(panels, curves.items(), strict=True):
            for domain, points in of.items():
                colour = COLOURS[domains.index(domain) % len(COLOURS)]
                axes.plot(*zip(*points, strict=True), color=colour, label=domain, linewidth=1.2)
            axes.set_title(arm_title(arm), fontsize=8)
            axes.set_xlabel("step")
        panels[0].set_ylabel(label)
        handles = {h.get_label(): h for axes in panels for h in axes.get_lines()}
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
        return svg(figure)


def _mean_curves(runs: Sequence[RunRecord], field: str) -> dict[str, list[tuple[int, float]]]:
    """domain -> (step, mean over the runs that have it there)."""
    found: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for step in run.steps:
            for domain, value in step.get(field, {}).items():
                if value is not None:
                    found.setdefault(domain, {}).setdefault(step["step"], []).append(value)
    return {
        domain: [(step, statistics.fmean(values)) for step, values in sorted(by_step.items())]
        for domain, by_step in sorted(found.items())
    }


def _name(one: Judgement) -> str:
    pair = f"{arm_title(one.result.first)} - {arm_title(one.result.second)}"
    return f"{one.condition}: {pair}" if one.condition else pair
