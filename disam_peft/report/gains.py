"""What each arm of a comparison gains over the baseline on domains that nobody trained on, and what it costs: a table,
and a figure of accuracy against likelihood."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from disam_peft.report.comparison import Comparison, TextTable, arm_title, by_seed, is_zero_shot
from disam_peft.report.drawing import INK
from disam_peft.report.run_measures import MEASURES, ON_HELD_OUT
from disam_peft.report.statistics import PairedComparison, paired

GAINS = ("top1", "nll", "ece", "worst_top1")
_UNITS = {"top1": "accuracy", "nll": "NLL", "ece": "ECE", "worst_top1": "worst domain"}
_DEAR = colormaps["viridis"]
_PALE = 0.6  # of the colours, from which on white letters cannot be read
_NARROW = 5.0  # inches: below, the names of the arms stand under the axes


@dataclass(frozen=True)
class Gain:
    """An arm under one condition.

    Attributes:
        gradients: how many a run computes, as a share of the baseline's; None where that is not known.
        means: measure -> mean over seeds of the mean over held-out domains; of a worst value, of the worst domain.
        differences: measure -> arm minus baseline, paired by seed.
    """

    arm: str
    gradients: float | None
    means: dict[str, float]
    differences: dict[str, PairedComparison]


def gains(comparison: Comparison, condition: str) -> list[Gain]:
    """Every arm that has numbers on held-out domains under a condition, the zero-shot model included.

    A difference rests on the seeds that both arms have every held-out domain for.
    """
    values = {metric: comparison.values(condition, metric) for metric in GAINS}
    cost = comparison.values(condition, "gradients")
    before = [arm for arm in values["top1"] if is_zero_shot(arm)]
    found = []
    for arm in [*before, *comparison.arms]:
        means, differences = {}, {}
        for metric in GAINS:
            domains = comparison.domains(condition, metric)
            if numbers := by_seed(values[metric].get(arm, {}), domains):
                means[metric] = statistics.fmean(numbers)
                differences[metric] = paired(arm, comparison.baseline, values[metric], domains)
        if means:
            found.append(Gain(arm, _share(cost, arm, comparison.baseline), means, differences))
    return found


def _share(cost: dict[str, dict[tuple[str | None, int], float]], arm: str, baseline: str) -> float | None:
    own, other = (list(cost.get(of, {}).values()) for of in (arm, baseline))
    return statistics.fmean(own) / statistics.fmean(other) if own and other else None


def gains_table(comparison: Comparison, condition: str) -> TextTable | None:
    """A line for each arm; None where the comparison is not about held-out domains, or the baseline has no numbers.

    A study that chooses settings by source validation shows nothing of what was held out.
    """
    found = gains(comparison, condition) if set(comparison.metrics) & set(ON_HELD_OUT) else []
    if comparison.baseline not in [gain.arm for gain in found]:
        return None
    columns = ["arm", "gradients", *(text for m in GAINS for text in (_UNITS[m], "difference"))]
    lines = []
    for gain in found:
        cells = [arm_title(gain.arm), "none" if gain.gradients is None else f"{gain.gradients:.3g}"]
        for metric in GAINS:
            measure = MEASURES[metric]
            digits = measure.digits if metric == "nll" else 1
            cells.append(f"{measure.scale * gain.means[metric]:.{digits}f}" if metric in gain.means else "n/a")
            cells.append(difference_text(gain, metric, comparison.baseline))
        lines.append(tuple(cells))
    of = f", {condition}" if condition else ""
    title = f"Gains on held-out domains over {arm_title(comparison.baseline)}{of}: mean difference and 95 % interval"
    return TextTable(title, tuple(columns), tuple(lines))


def difference_text(gain: Gain, metric: str, baseline: str) -> str:
    """Mean difference to the baseline with its interval, in the units in which the measure is printed; empty for the
    baseline itself."""
    difference = gain.differences.get(metric)
    return "" if gain.arm == baseline or difference is None else interval_text(difference, metric)


def interval_text(difference: PairedComparison, metric: str) -> str:
    """A mean difference with its interval, in the units in which the measure is printed; empty where there is none."""
    measure = MEASURES[metric]
    if difference.mean is None:
        return ""
    digits = measure.digits if metric == "nll" else 1
    numbers = [difference.mean, difference.low, difference.high]
    mean, low, high = (None if n is None else f"{measure.scale * n + 0.0:+.{digits}f}" for n in numbers)
    return f"{mean}" if low is None else f"{mean} ({low} to {high})"


def gains_figure(comparison: Comparison, condition: str, width: float, shown: Sequence[str] = ()) -> Figure:
    """Accuracy against NLL on held-out domains: a numbered point for each arm, with the intervals of its paired
    differences to the baseline as bars; the colour says what it costs.

    Args:
        width: in inches.
        shown: the arms that are drawn, of those that have both numbers; empty: all but zero-shot.
    """
    points = [gain for gain in gains(comparison, condition) if {"top1", "nll"} <= gain.means.keys()]
    points = [gain for gain in points if (gain.arm in shown if shown else not is_zero_shot(gain.arm))]
    scale = Normalize(1, max([2.0, *(gain.gradients or 1 for gain in points)]))
    names = [f"{number}  {arm_title(gain.arm)}" for number, gain in enumerate(points, start=1)]
    beside = width > _NARROW
    lines = len(names) if beside else -(-len(names) // 2)
    figure = Figure(figsize=(width, 0.6 * width + 0.5 if beside else 1.2 * width + 0.17 * lines), layout="constrained")
    axes: Any = figure.subplots()
    for number, gain in enumerate(points, start=1):
        x, y = 100 * gain.means["top1"], gain.means["nll"]
        colour = _DEAR(scale(gain.gradients or 1))
        across, along = (_bars(gain, metric) for metric in ("top1", "nll"))
        axes.errorbar([x], [y], xerr=across, yerr=along, fmt="o", color=colour, markersize=9, elinewidth=0.9, alpha=0.8)
        dark = float(scale(gain.gradients or 1)) < _PALE
        axes.annotate(
            str(number), (x, y), ha="center", va="center_baseline", fontsize=6, color="white" if dark else INK
        )
    axes.set_xlabel("accuracy on held-out domains (%)")
    axes.set_ylabel("NLL on held-out domains (nats)")
    axes.invert_yaxis()
    axes.grid(color="#dfe3ea", linewidth=0.6)
    axes.set_axisbelow(True)
    bar = figure.colorbar(ScalarMappable(scale, _DEAR), ax=axes, location="bottom", aspect=40, fraction=0.05)
    bar.set_label(f"gradients, {arm_title(comparison.baseline)} = 1")
    figure.legend(
        [Line2D([], [], linestyle="none") for _ in names],
        names,
        loc="outside right upper" if beside else "outside lower center",
        ncols=1 if beside else 2,
        handlelength=0,
        handletextpad=0,
        frameon=False,
        fontsize=7.5,
    )
    return figure


def _bars(gain: Gain, metric: str) -> list[list[float]]:
    """How far the interval of the difference reaches below and above its mean."""
    difference, scale = gain.differences[metric], MEASURES[metric].scale
    if difference.mean is None or difference.low is None or difference.high is None:
        return [[0.0], [0.0]]
    return [[scale * (difference.mean - difference.low)], [scale * (difference.high - difference.mean)]]
