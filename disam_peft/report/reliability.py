"""How often predictions of a given confidence are right, from ``predictions.parquet``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from disam_peft.common.prediction_table import PredictionTable
from disam_peft.report.drawing import COLOURS, grid, legend_above

BINS = 15
"""Those of the expected calibration error, see ``evaluation/metrics.py``."""


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence lies between two numbers."""

    count: int
    confidence: float
    """Their mean."""
    accuracy: float


def reliability(table: PredictionTable, split: str, domain: str | None = None) -> list[Bin]:
    """The bins of equal width that hold predictions, by confidence; a confidence on an edge is in the bin below it.

    Args:
        split: other splits are left out.
        domain: None: all domains of the split.
    """
    confidences: dict[int, list[float]] = {}
    right: dict[int, int] = {}
    rows = zip(table.split, table.domain, table.label, table.predicted, table.predicted_probability, strict=True)
    for of, within, label, predicted, confidence in rows:
        if of != split or confidence is None or (domain is not None and within != domain):
            continue
        place = sum(confidence > edge / BINS for edge in range(1, BINS))
        confidences.setdefault(place, []).append(confidence)
        right[place] = right.get(place, 0) + (label == predicted)
    return [
        Bin(len(values), sum(values) / len(values), right[place] / len(values))
        for place, values in sorted(confidences.items())
    ]


def reliability_curves(named: Sequence[tuple[str, Sequence[Bin]]], width: float) -> Figure:
    """Accuracy over confidence, a line per run; the area of a dot is the share of the predictions that it stands for.
    On the dotted line confidence is what it says."""
    figure, [axes] = grid(1, width, width, 3.2)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=":")
    for number, (title, bins) in enumerate(named):
        colour = COLOURS[number % len(COLOURS)]
        total = sum(one.count for one in bins)
        x, y = [one.confidence for one in bins], [one.accuracy for one in bins]
        axes.plot(x, y, color=colour, linewidth=1.2, label=title)
        axes.scatter(x, y, s=[8 + 160 * one.count / total for one in bins], color=colour, alpha=0.6, linewidths=0)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.02, 1.05)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that is right")
    legend_above(figure, *axes.get_legend_handles_labels())
    return figure
