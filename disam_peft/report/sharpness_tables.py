"""The sharpness of methods side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from disam_peft.common.records import ResultRow
from disam_peft.report.result_tables import Column, ComparisonTable, column_titles, mean_over_seeds, training_domains

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
    by_place: dict[tuple[str | None, str, str], dict[tuple[str, str, Column], dict[int, float]]]
    by_place = defaultdict(lambda: defaultdict(dict))
    found = list(rows)
    for row in found:
        if row.value is not None and _label(row.metric) is not None:
            column = (row.method, row.weights)
            by_place[row.held_out, row.backbone, row.adapter][row.metric, row.split, column][row.seed] = row.value
    sizes: dict[tuple[str | None, str, str], dict[str, int]] = defaultdict(dict)
    for row in found:
        sizes[row.held_out, row.backbone, row.adapter][row.split] = row.n
    tables = []
    for (held_out, backbone, adapter), values in by_place.items():
        columns = column_titles(column for _, _, column in values)
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
        shown = tuple(columns.values())
        tables.append(ComparisonTable(title, shown, tuple(lines), scale=1, digits=None, corner="measure"))
    return tables


def _label(metric: str) -> str | None:
    """What a measure is called in the table; None for those that follow from others."""
    if metric.startswith("sharpness_rho_"):
        return f"rise of the loss within {metric.removeprefix('sharpness_rho_')}"
    return _LABELS.get(metric)
