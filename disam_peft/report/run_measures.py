"""The measures of a run, computed from its records: numbers on the held-out domain, and how training went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disam_peft.common.records import ResultRow
from disam_peft.report.runs import RunRecord


@dataclass(frozen=True)
class Measure:
    """How a number is called, printed, and told good from bad."""

    title: str
    higher_is_better: bool
    scale: float = 1.0
    digits: int = 3


MEASURES = {
    "top1": Measure("accuracy (%) on the held-out domain", True, 100, 1),
    "macro_accuracy": Measure("mean accuracy of the classes (%) on the held-out domain", True, 100, 1),
    "nll": Measure("negative log-likelihood (nats) on the held-out domain", False),
    "ece": Measure("calibration error (%) on the held-out domain", False, 100, 1),
    "source_top1": Measure("accuracy (%) on validation images of the sources, mean over domains", True, 100, 1),
    "source_nll": Measure(
        "negative log-likelihood (nats) on validation images of the sources, mean over domains", False
    ),
    "loss_spread": Measure(
        "spread of the sources' training losses over domains (nats), last third of the steps", False
    ),
    "relative_spread": Measure("the same spread, divided by the mean loss", False),
}
"""What arms can be compared by."""
ON_HELD_OUT = ("top1", "macro_accuracy", "nll", "ece")
"""Those that are measured on the held-out domain."""
DIAGNOSTICS = {
    "source_top1": MEASURES["source_top1"],
    "train_loss": Measure("training loss (nats), last third of the steps", False),
    "loss_spread": MEASURES["loss_spread"],
    "weight_shift": Measure("mean |w_d - n_d/N| over domains and steps", False, 1, 4),
    "negative_weights": Measure("share of the domain weights below 0 (%)", False, 100, 1),
    "purity": Measure("share of the images (%) whose inferred domain is mostly of theirs", True, 100, 1),
}
"""What is shown of every arm beside the comparison."""


def run_measures(run: RunRecord) -> dict[str, float | None]:
    """Every measure of a run's trained adapter, with the weights that selection chose; None where it is not defined."""
    trained = run.chosen_rows
    held_out = _of_domain(trained, "held_out", trained[0].held_out)
    sources = _mean(trained, "source_validation")
    return {
        **{name: held_out.get(name) for name in ON_HELD_OUT},
        "source_top1": sources.get("top1"),
        "source_nll": sources.get("nll"),
        **training_measures(run.steps),
        "purity": next((event["purity"] for event in run.inferred), None),
    }


def zero_shot_measures(run: RunRecord) -> dict[str, float | None]:
    """The same of the model before it was trained, as far as there is such a thing."""
    rows = [row for row in run.rows if row.method == "zero_shot"]
    if not rows:
        return {}
    held_out = _of_domain(rows, "held_out", rows[0].held_out)
    sources = _mean(rows, "source_validation")
    return {**held_out, "source_top1": sources.get("top1"), "source_nll": sources.get("nll")}


def training_measures(steps: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """From the records of steps. ``loss_spread``: every domain's training loss at w is averaged over the recorded steps
    of the last third; their standard deviation over domains (ddof 0) is 0 where all domains have converged alike."""
    if not steps:
        return dict.fromkeys(("train_loss", "loss_spread", "relative_spread", "weight_shift", "negative_weights"))
    late = [step for step in steps if step["step"] > 2 / 3 * steps[-1]["step"]]
    names = sorted({name for step in late for name in step.get("domain_loss", {})})
    means = []
    for name in names:
        losses = [value for step in late if (value := step.get("domain_loss", {}).get(name)) is not None]
        if losses:
            means.append(statistics.fmean(losses))
    mean = statistics.fmean(means) if means else None
    spread = statistics.pstdev(means) if means else None
    weights = [
        (weight, step["domain_share"][name])
        for step in steps
        for name, weight in step.get("domain_weight", {}).items()
        if weight is not None and step.get("domain_share", {}).get(name) is not None
    ]
    return {
        "train_loss": mean,
        "loss_spread": spread,
        "relative_spread": spread / mean if spread is not None and mean else None,
        "weight_shift": statistics.fmean(abs(w - share) for w, share in weights) if weights else None,
        "negative_weights": statistics.fmean(w < 0 for w, _ in weights) if weights else None,
    }


def _of_domain(rows: Sequence[ResultRow], split: str, domain: str | None) -> dict[str, float | None]:
    return {row.metric: row.value for row in rows if row.split == split and row.is_of(domain)}


def _mean(rows: Sequence[ResultRow], split: str) -> dict[str, float | None]:
    return {row.metric: row.value for row in rows if row.split == split and row.pooled == "mean"}
