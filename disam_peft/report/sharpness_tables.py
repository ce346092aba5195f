"""The sharpness of methods side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disam_peft.common.records import RAW, ResultRow
from disam_peft.report.result_tables import ComparisonTable, column_titles, mean_over_seeds, training_domains

_LABELS = {
    "sample_loss": "loss at w",
    "gradient_norm": "norm of the gradient",
    "hessian_max": "largest Hessian eigenvalue",
    "hessian_residual": "residual of that eigenvalue",
    "gradient_variance": "variance of per-sample gradients",
}
_SPLITS = {"held_out": "held out", "source_validation": "source validation"}


def compare_sharpness(rows: Iterable[ResultRow]) -> list[ComparisonTable]:
    """One table per held-out domain, backbone and adapter: measures in lines, methods in columns, means over seeds.

    Sharpness is measured around the weights that selection chose. Where they were an average for some runs, the columns
    say so.
    """
    rows = list(rows)
    titles = column_titles((row.method, row.weights) for row in rows if _is_shown(row))
    return _tables([(titles[row.method, row.weights], row) for row in rows if _is_shown(row)], tuple(titles.values()))


def sharpness_by_title(
    of_runs: Sequence[tuple[str, Mapping[str, Any], Sequence[ResultRow]]],
) -> list[ComparisonTable]:
    """The same with a column for each title, over all seeds that have it. Where samples of other sizes were measured,
    or it was measured with other settings, which cannot be compared, the columns say so.

    Args:
        of_runs: title, settings of the measurement and rows of sharpness of every run.
    """
    measured = [settings for _, settings, of_run in of_runs if any(map(_is_shown, of_run))]
    differing = [
        key
        for key in dict.fromkeys(key for settings in measured for key in settings)
        if len({str(settings.get(key)) for settings in measured}) > 1
    ]
    rows = [
        (", ".join([title, *(f"measured with {key}={settings.get(key)}" for key in differing)]), row)
        for title, settings, of_run in of_runs
        for row in of_run
        if _is_shown(row)
    ]
    by_split: dict[str, set[int]] = {}
    for _, row in rows:
        by_split.setdefault(row.split, set()).add(row.n)
    if any(len(counts) > 1 for counts in by_split.values()):
        rows = [(f"{title}, {row.n} images", row) for title, row in rows]
    averaged = {row.weights for _, row in rows} != {RAW}
    rows = [(f"{title}, {row.weights}" if averaged else title, row) for title, row in rows]
    return _tables(rows, tuple(dict.fromkeys(title for title, _ in rows)))


def _is_shown(row: ResultRow) -> bool:
    return row.value is not None and _label(row.metric) is not None


def _tables(found: Sequence[tuple[str, ResultRow]], titles: Sequence[str]) -> list[ComparisonTable]:
    by_place: dict[tuple[str | None, str, str], dict[tuple[str, str, str], dict[int, float]]]
    by_place = defaultdict(lambda: defaultdict(dict))
    for title, row in found:
        if row.value is not None:
            by_place[row.held_out, row.backbone, row.adapter][row.metric, row.split, title][row.seed] = row.value
    sizes: dict[tuple[str | None, str, str], dict[str, int]] = defaultdict(dict)
    for _, row in found:
        sizes[row.held_out, row.backbone, row.adapter][row.split] = row.n
    tables = []
    for (held_out, backbone, adapter), values in by_place.items():
        columns = [title for title in titles if any(column == title for _, _, column in values)]
        metrics = list(dict.fromkeys(metric for metric, _, _ in values))
        splits = list(dict.fromkeys(split for _, split, _ in values))
        lines = [
            (
                f"{_label(metric)}, {_SPLITS.get(split, split)}",
                tuple(mean_over_seeds(values.get((metric, split, column))) for column in columns),
            )
            for metric in metrics
            for split in splits
        ]
        counts = ", ".join(
            f"{n} images of {_SPLITS.get(split, split)}" for split, n in sizes[held_out, backbone, adapter].items()
        )
        title = f"{adapter} on {backbone}, {training_domains(held_out)}: sharpness on {counts}"
        tables.append(ComparisonTable(title, tuple(columns), tuple(lines), scale=1, digits=None, corner="measure"))
    return tables


def _label(metric: str) -> str | None:
    """What a measure is called in the table; None for those that follow from others."""
    if metric.startswith("sharpness_rho_"):
        return f"rise of the loss within {metric.removeprefix('sharpness_rho_')}"
    return _LABELS.get(metric)
