"""Figures that are maps: losses around the trained weights, and the confusion of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from disam_peft.common.records import Confusion, LossSlice
from disam_peft.report.drawing import INK, columns_of, edges, grid, make_room_for_titles, panel_title

LARGEST_MATRIX = 40
"""Classes of a confusion matrix that can still be read."""
_NUMBERED = 16  # classes up to which each cell has room for its count
_LEVELS = 12
_CELL, _NAMES = 0.17, 0.9  # inches: of a count in 7 pt, and of the names of the classes


def loss_planes(planes: Sequence[tuple[str, LossSlice]], width: float) -> Figure:
    """How the loss rises (and falls) around w, a panel per run; contours at the same heights in all of them."""
    figure, panels = grid(len(planes), width, 2.3, 2.7)
    figure.set_figheight(figure.get_figheight() + 0.6)  # of the colour bar
    rises = [_rises(plane) for _, plane in planes]
    largest = max((abs(v) for rows in rises for row in rows for v in row if math.isfinite(v)), default=0.0) or 1.0
    levels = [largest * (2 * i / _LEVELS - 1) for i in range(_LEVELS + 1)]
    shown = None
    for axes, (title, plane), rows in zip(panels, planes, rises, strict=True):
        x = plane.coordinates
        norm = CenteredNorm(halfrange=largest)
        shown = axes.contourf(x, x, rows, levels=levels, cmap="PuOr_r", norm=norm)
        axes.contour(x, x, rows, levels=levels, colors=INK, linewidths=0.4, alpha=0.6)
        axes.plot(0, 0, marker="o", color=INK, markersize=3)
        for rho in plane.rhos:
            if rho < x[-1]:
                axes.add_patch(Circle((0, 0), rho, fill=False, linestyle="--", linewidth=0.8, edgecolor=INK))
        axes.set_aspect("equal")
        axes.set_title(panel_title(title, width / columns_of(panels)))
    make_room_for_titles(figure, panels)
    left, lowest = edges(panels)
    first, second = planes[0][1].directions
    for axes in left:
        axes.set_ylabel(_axis(second, 2))
    for axes in lowest:
        axes.set_xlabel(_axis(first, 1))
    if shown is not None:
        ticks = [largest * i / 2 for i in (-2, -1, 0, 1, 2)]
        bar = figure.colorbar(shown, ax=panels, location="bottom", shrink=0.7, aspect=35, ticks=ticks)
        bar.set_label("loss minus loss at w")
        bar.ax.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    return figure


def confusion_maps(matrices: Sequence[tuple[str, Confusion]], width: float) -> Figure:
    """True classes in rows, predicted ones in columns; colour is the share of the row. A panel per run."""
    classes = len(matrices[0][1].classes)
    columns = max(1, min(len(matrices), int((width - _NAMES) / max(1.6, _CELL * classes))))
    side = min((width - _NAMES) / columns, 0.3 * classes + 0.6)
    figure, panels = grid(len(matrices), width, (width - 0.01) / columns, side + _NAMES / 2)
    figure.set_figheight(figure.get_figheight() + _NAMES / 2)
    for axes, (title, matrix) in zip(panels, matrices, strict=True):
        counts = [[0] * classes for _ in range(classes)]
        for true, predicted, count in matrix.counts:
            counts[true][predicted] = count
        _matrix(axes, counts, matrix.classes)
        right, total = sum(counts[i][i] for i in range(classes)), sum(map(sum, counts))
        not_finite = f", {matrix.not_finite} not finite" if matrix.not_finite else ""
        share = f"{100 * right / (total + matrix.not_finite):.0f} %" if total else "n/a"
        shown = f"{share} right{not_finite}"
        settings = panel_title(title, width / columns)
        axes.set_title(f"{settings}\n{shown}" if "\n" in settings else f"{title}: {shown}")
    make_room_for_titles(figure, panels)
    left, lowest = edges(panels)
    for axes in left:
        axes.set_ylabel("true")
    for axes in lowest:
        axes.set_xlabel("predicted")
    return figure


def _matrix(axes: Axes, counts: list[list[int]], classes: Sequence[str]) -> None:
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(classes) > _NUMBERED:
        return
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            if count:
                colour = "white" if shares[i][j] > 0.55 else INK
                axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=7)


def _rises(plane: LossSlice) -> list[list[float]]:
    middle = len(plane.coordinates) // 2
    at_w = plane.losses[middle][middle]
    return [[math.nan if v is None or at_w is None else v - at_w for v in row] for row in plane.losses]


def _axis(direction: str, number: int) -> str:
    return f"random direction {number}" if direction == "random" else direction
