"""Figures of results and of training. All of them take a width in inches, see ``drawing``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from disam_peft.common.records import RAW
from disam_peft.config.uncommon import setting_in_a_name, uncommon_settings
from disam_peft.report.configurations import Configuration, configuration_titles
from disam_peft.report.drawing import (
    COLOURS,
    METHOD_COLOURS,
    columns_of,
    edges,
    grid,
    legend_above,
    make_room_for_titles,
    panel_title,
    wrapped,
)
from disam_peft.report.result_tables import METHOD_TITLES, ComparisonTable, SeedMean
from disam_peft.report.runs import RunRecord

_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")
_MOST_LINES = 30  # of a figure with a name on each
_NAMES = 0.5  # of the width of a figure with a name on each line
_SMOOTH_FROM = 15  # recorded steps; fewer are shown as they are


def accuracy_bars(table: ComparisonTable, width: float) -> Figure:
    """A group of bars per held-out domain, a bar per column; the deviation over seeds as a whisker."""
    figure, [axes] = grid(1, width, width, 2.8)
    bar = 0.8 / len(table.columns)
    for number, title in enumerate(table.columns):
        method, _, weights = title.partition(", ")
        known = [(i, cells[number]) for i, (_, cells) in enumerate(table.lines) if cells[number] is not None]
        places = [i + (number + 0.5) * bar - 0.4 for i, _ in known]
        heights = [table.scale * cell.mean for _, cell in known if cell is not None]
        spread = [table.scale * (cell.deviation or 0.0) for _, cell in known if cell is not None]
        bars = axes.bar(
            places,
            heights,
            bar,
            color=METHOD_COLOURS[method],
            hatch="//" if weights not in ("", RAW) else None,  # an average has the colour of its method
            edgecolor="white",
            linewidth=0,
            label=title,
            yerr=spread if any(spread) else None,
        )
        if len(table.lines) * len(table.columns) <= 2 * width and not any(spread):
            axes.bar_label(bars, [f"{height:.{table.digits}f}" for height in heights], padding=2)
    names = [name for name, _ in table.lines]
    crowded = sum(map(len, names)) > 10 * width
    axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set_ylabel("accuracy (%)" if table.scale == 100 else "")
    legend_above(figure, *axes.get_legend_handles_labels())
    return figure


def configuration_dots(table: ComparisonTable, width: float) -> Figure:
    """Of a table with a configuration in each line: a line of dots for each, or where there are too many for that, a
    dot for each in one line per method. What a table has no number for is not there."""
    summed = len(table.lines) > _MOST_LINES
    names = _names_of_lines(table)
    methods = [name.partition(", ")[0] for name, _ in table.lines]
    rows = [wrapped(name, _NAMES * width, 3) for name in (dict.fromkeys(methods) if summed else names)]
    lines = max(name.count("\n") for name in rows) + 1
    figure, [axes] = grid(1, width, width, 1.0 + (0.5 if summed else 0.11 + 0.15 * lines) * len(rows))
    for number, (line, cells) in enumerate(table.lines):
        colour = METHOD_COLOURS[methods[number]]
        *domains, last = cells
        if summed:
            alone = methods.count(methods[number]) == 1
            place = rows.index(methods[number]) + (0.0 if alone else _scattered(number))
        else:
            place = float(number)
        if not summed or last is None:  # of runs on some of the domains there is no mean
            axes.plot(*_dots(domains, place, table.scale), ".", color=colour, alpha=0.45, markersize=5)
        hollow = ", " in line and not line.endswith(f", {RAW}")  # an average of the weights
        axes.plot(
            *_dots([last], place, table.scale),
            "o",
            color=colour,
            markersize=5 if summed else 6,
            alpha=0.7 if summed else 1.0,
            fillstyle="none" if hollow else "full",
        )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    small = len(table.columns) > 1 and (not summed or any(cells[-1] is None for _, cells in table.lines))
    about = f"{table.columns[-1]}{' (small dots: one domain)' if small else ''}"
    axes.set_xlabel(("accuracy (%), " if table.scale == 100 else "") + about)
    return figure


def _names_of_lines(table: ComparisonTable) -> list[str]:
    """The method of each line, and what tells it from most lines."""
    rows = [
        {title: text for title, text in zip(table.label_columns, told, strict=True) if text and title != "seeds"}
        for told in table.labels
    ]
    return [
        ", ".join([name, *(setting_in_a_name(title, text) for title, text in telling.items())])
        for (name, _), telling in zip(table.lines, uncommon_settings(rows), strict=True)
    ]


def _dots(cells: Sequence[SeedMean | None], place: float, scale: float) -> tuple[list[float], list[float]]:
    means = [scale * cell.mean for cell in cells if cell is not None]
    return means, [place] * len(means)


def _scattered(number: int) -> float:
    """Between -0.3 and 0.3, so that dots of neighbours in the table stand apart; the same at each drawing."""
    return 0.6 * ((number * 0.6180339887) % 1) - 0.3


def domain_curves(named: Sequence[tuple[str, RunRecord]], field: str, label: str, width: float) -> Figure:
    """``domain_loss`` or ``domain_weight`` of every source domain over the steps, a panel per run.

    Each batch as a thin line, its moving average over a tenth of the run as a thick one.
    """
    figure, panels = grid(len(named), width, 2.2, 2.3)
    domains = sorted({name for _, run in named for step in run.steps for name in step.get(field, {})})
    for axes, (title, run) in zip(panels, named, strict=True):
        for number, domain in enumerate(domains):
            points = [
                (step["step"], step[field][domain]) for step in run.steps if step.get(field, {}).get(domain) is not None
            ]
            _curve(axes, points, *_look(number))
        axes.set_title(panel_title(title, width / columns_of(panels)))
        axes.grid(alpha=0.25, linewidth=0.5)
    make_room_for_titles(figure, panels)
    left, lowest = edges(panels)
    for axes in left:
        axes.set_ylabel(label)
    for axes in lowest:
        axes.set_xlabel("step")
    # made here: matplotlib leaves names that begin with an underscore out of its own
    handles = [Line2D([], [], color=c, linestyle=s, linewidth=1.6) for c, s in map(_look, range(len(domains)))]
    legend_above(figure, handles, domains)
    return figure


def cosine_curves(named: Sequence[tuple[str, RunRecord]], width: float) -> Figure:
    """The cosine between each run's ascent direction and plain SAM's on the same batch, over the steps."""
    figure, [axes] = grid(1, width, width, 2.4)
    axes.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    for number, (title, run) in enumerate(named):
        points = [(s["step"], s["ascent_cosine"]) for s in run.steps if s.get("ascent_cosine") is not None]
        method = METHOD_TITLES[run.trained.method]
        same_method = sum(other.trained.method == run.trained.method for _, other in named) > 1
        _curve(axes, points, COLOURS[number % len(COLOURS)] if same_method else METHOD_COLOURS[method], "-", title)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.set_xlabel("step")
    axes.set_ylabel("cosine to SAM")
    legend_above(figure, *axes.get_legend_handles_labels())
    return figure


def titles(runs: Sequence[RunRecord]) -> list[str]:
    """The methods of the runs, with the settings that tell them apart where several share one; where these are the
    same, or not known, with the run's name."""
    methods = [METHOD_TITLES[run.trained.method] for run in runs]
    told = configuration_titles([Configuration(run.data, run.settings, (run,)) for run in runs])
    return [
        f"{method} ({run.folder.parent.name})" if methods.count(method) > 1 and told.count(title) > 1 else title
        for method, run, title in zip(methods, runs, told, strict=True)
    ]


def _look(number: int) -> tuple[str, Literal["-", "--", ":"]]:
    """Colour and line style of the domain of this number: 21 that differ."""
    return COLOURS[number % len(COLOURS)], _LINES[number // len(COLOURS) % len(_LINES)]


def _curve(
    axes: Axes, points: Sequence[tuple[int, float]], colour: str, style: Literal["-", "--", ":"], label: str = ""
) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if len(points) < _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linestyle=style, linewidth=1.4, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    axes.plot(steps, _smoothed(values), color=colour, linestyle=style, linewidth=1.6, label=label)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a tenth of the values, centred, narrower at both ends so that it stays centred."""
    reach = max(1, len(values) // 20)
    means = []
    for i in range(len(values)):
        around = min(reach, i, len(values) - 1 - i)
        window = values[i - around : i + around + 1]
        means.append(sum(window) / len(window))
    return means
