"""The measures of a run, computed from its records: numbers on the held-out domain, and how training went."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from disam_peft.common.frontier_records import Frontier
from disam_peft.common.records import ResultRow
from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.recipe import Recipe
from disam_peft.errors import UserError
from disam_peft.report.runs import RunRecord


@dataclass(frozen=True)
class Measure:
    """How a number is called, printed, and told good from bad."""

    title: str
    higher_is_better: bool
    scale: float = 1.0
    digits: int = 3
    worst_of: str = ""
    """The measure of which this is the worst over the held-out domains, for each seed; empty: it is measured on each of
    them."""


MEASURES = {
    "top1": Measure("accuracy (%) on the held-out domain", True, 100, 1),
    "macro_accuracy": Measure("mean accuracy of the classes (%) on the held-out domain", True, 100, 1),
    "nll": Measure("negative log-likelihood (nats) on the held-out domain", False),
    "ece": Measure("calibration error (%) on the held-out domain", False, 100, 1),
    "worst_top1": Measure("accuracy (%) on the worst held-out domain", True, 100, 1, worst_of="top1"),
    "source_top1": Measure("accuracy (%) on validation images of the sources, mean over domains", True, 100, 1),
    "source_nll": Measure(
        "negative log-likelihood (nats) on validation images of the sources, mean over domains", False
    ),
    "loss_spread": Measure(
        "spread of the sources' training losses over domains (nats), last third of the steps", False
    ),
    "relative_spread": Measure("the same spread, divided by the mean loss", False),
    "sharpness": Measure(
        "sharpness: rise of the loss (nats) to the worst point within rho, on validation images of the sources", False
    ),
    "hessian_max": Measure("largest eigenvalue of the Hessian, on validation images of the sources", False),
}
"""What arms can be compared by."""
ON_HELD_OUT = ("top1", "macro_accuracy", "nll", "ece", "worst_top1")
"""Those that are measured on the held-out domain."""
DIAGNOSTICS = {
    "gradients": Measure("gradients of a batch that training computed", False, 1, 0),
    "source_top1": MEASURES["source_top1"],
    "source_nll": MEASURES["source_nll"],
    "train_loss": Measure("training loss (nats), last third of the steps", False),
    "loss_spread": MEASURES["loss_spread"],
    "weight_shift": Measure("mean |w_d - n_d/N| over domains and steps", False, 1, 4),
    "negative_weights": Measure("share of the domain weights below 0 (%)", False, 100, 1),
    "sharpness": MEASURES["sharpness"],
    "hessian_max": MEASURES["hessian_max"],
    "purity": Measure("share of the images (%) whose inferred domain is mostly of theirs", True, 100, 1),
}
"""What is shown of every arm beside the comparison."""


_CLOSE = 0.1
"""The largest residual of an eigenvalue, as a share of it."""
_BY_DOMAIN = [name for name in ON_HELD_OUT if not MEASURES[name].worst_of]


def run_measures(run: RunRecord) -> dict[str, float | None]:
    """Every measure of a run's trained adapter, with the weights that selection chose; None where it is not defined."""
    return {
        **_result_measures(run.chosen_rows),
        **_sharpness_measures(run.sharpness),
        **training_measures(run.steps),
        "gradients": None if run.recipe is None else gradients(run.recipe),
        "purity": next((event["purity"] for event in run.inferred), None),
    }


def weights_measures(run: RunRecord, weights: str) -> dict[str, float | None]:
    """The measures of a run's results with other weights than those that selection chose.

    Args:
        weights: ``raw``, or the name of an average that the run kept.

    Raises:
        UserError: the run has no results of these weights.
    """
    rows = [row for row in run.rows if row.method != "zero_shot" and row.weights == weights]
    if not rows:
        known = ", ".join(dict.fromkeys(row.weights for row in run.rows if row.method != "zero_shot"))
        raise UserError(f"{run.folder} has no results of the weights {weights!r} (it has {known})")
    cost = None if run.recipe is None else gradients(run.recipe)
    return {**_result_measures(rows), "gradients": cost}


def alpha_measures(run: RunRecord, alpha: float | None) -> dict[str, float | None]:
    """The measures of a run's results at a point between zero-shot and trained weights.

    Args:
        alpha: 0 is zero-shot, 1 the trained adapter; None: the one that source validation recommends.

    Raises:
        UserError: the run has no numbers there.
    """
    found = run.frontier
    wanted = None if found is None else found.recommended if alpha is None else alpha
    if found is None or wanted not in found.alphas:
        raise UserError(f"{run.folder} has no numbers at alpha={wanted}; disam-peft frontier computes them")
    cost = None if run.recipe is None else gradients(run.recipe)
    return {**_frontier_measures(found, found.alphas.index(wanted)), "gradients": cost}


def gradients(recipe: Recipe) -> int:
    """How many gradients of a batch a run computes: one in a plain step, two in a step that perturbs the weights."""
    if takes_no_steps(recipe.adapter):
        return 0
    steps = recipe.train.steps
    return sum(1 + (recipe.method.rho_in_step(step, steps) > 0) for step in range(steps))


def _result_measures(rows: Sequence[ResultRow]) -> dict[str, float | None]:
    held_out = _of_domain(rows, "held_out", rows[0].held_out)
    sources = _mean(rows, "source_validation")
    return {
        **{name: held_out.get(name) for name in _BY_DOMAIN},
        "source_top1": sources.get("top1"),
        "source_nll": sources.get("nll"),
    }


def _frontier_measures(frontier: Frontier, place: int) -> dict[str, float | None]:
    held_out = {name: frontier.curve("held_out", name, frontier.held_out)[place] for name in _BY_DOMAIN}
    sources = {f"source_{name}": frontier.curve("source_validation", name)[place] for name in ("top1", "nll")}
    return {**(held_out if frontier.held_out is not None else dict.fromkeys(held_out)), **sources}


def _sharpness_measures(rows: Sequence[ResultRow]) -> dict[str, float | None]:
    """Of the first radius, on validation images of all sources together. An eigenvalue whose search was given too few
    iterations is none."""
    pooled = {row.metric: row.value for row in rows if row.split == "source_validation" and row.pooled == "all"}
    radius = next((value for name, value in pooled.items() if name.startswith("sharpness_rho_")), None)
    largest, residual = pooled.get("hessian_max"), pooled.get("hessian_residual")
    is_known = largest is not None and residual is not None and residual <= _CLOSE * abs(largest)
    return {"sharpness": radius, "hessian_max": largest if is_known else None}


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
