"""What the steps of a run looked like: counted on the device, and read only when it is written down. D domains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from disam_peft.config.base import Config
from disam_peft.config.method import MethodConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.disam.step_report import StepReport
from disam_peft.errors import Diverged
from disam_peft.training.guarded_optimizer import StepOutcome
from disam_peft.training.idle_method import IdleMethod

MAX_SKIPPED_IN_A_ROW = 10
RARE = 0.05
UNUSUAL = 0.2
COUNTED = (
    "one_domain_steps",
    "zero_ascent_steps",
    "negative_domain_weights",
    "negative_by_variance",
    "domain_weights",
)
OnEvent = Callable[..., None]


@dataclass(frozen=True)
class FinishedStep:
    """An optimizer step, before it is known whether it was taken.

    Attributes:
        number: of the step, from 1.
        indices_B: the samples of its batch, on the host.
        report: of its gradient.
        gradient_norm: before clipping, at loss scale 1, shape ().
        learning_rate: of its update.
        rho: radius of its perturbation; 0 where it took the plain gradient.
        variance_weight: its lambda.
    """

    number: int
    indices_B: Tensor
    report: StepReport
    gradient_norm: Tensor
    learning_rate: float
    rho: float
    variance_weight: float


class StepMetrics:
    """Counts steps without effect, with one domain, without an ascent direction, and domain weights below 0; records
    every ``log_every``-th step; ends a run whose steps are skipped ten times in a row.

    Args:
        on_event: gets the records of ``metrics.jsonl``.
        accelerator: gets the same numbers for its tracker, if it has one.
        objective: what is descended; warnings explain weights of domains by it.
    """

    def __init__(
        self,
        dataset: DomainDataset,
        method: MethodConfig,
        config: TrainConfig,
        on_event: OnEvent,
        accelerator: Accelerator,
        objective: ObjectiveConfig,
    ) -> None:
        self._dataset, self._method, self._config, self._objective = dataset, method, config, objective
        self._on_event, self._accelerator = on_event, accelerator
        self._steps, self.skipped, self._skipped_in_a_row = 0, 0, 0
        self._counts: Tensor | None = None  # in the order of COUNTED
        self._losses: Tensor | None = None  # of the first and the last step
        self._idle = IdleMethod(method, config, len(dataset.present_domains), accelerator.device)
        self.recorded: tuple[int, float] | None = None
        """Number and loss of the last step that was recorded; to read another one, the host would have to wait for the
        device."""

    def is_logged(self, step: int) -> bool:
        """Whether the numbers of this step are recorded, which makes the host wait for the device."""
        return step % self._config.log_every == 0 or step in (1, self._config.steps)

    def record(self, step: FinishedStep, outcome: StepOutcome) -> None:
        """Count the step, and write it down if it is time, as soon as it is known whether it was taken.

        Raises:
            Diverged: this is the tenth step in a row that was skipped; names files of its batch.
        """
        outcome.when_known(lambda skipped: self._finish(step, skipped))

    def _finish(self, step: FinishedStep, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise Diverged(self._diverged(step.indices_B))
        loss = step.report.loss
        self._losses = torch.stack([loss if self._losses is None else self._losses[0], loss])
        self._count(step, skipped)
        if self.is_logged(step.number) or skipped:
            values = {"learning_rate": step.learning_rate, "skipped": skipped, **self._numbers(step)}
            self.recorded = (step.number, values["loss"])
            self._on_event("step", step=step.number, **values)
            self.track(step.number, {name: value for name, value in values.items() if name != "skipped"})

    def _count(self, step: FinishedStep, skipped: bool) -> None:
        report = step.report
        present_D = report.domain_counts > 0
        no_ascent = (report.ascent_norm == 0) & (step.rho > 0)
        seen = torch.stack(
            [
                (present_D.sum() == 1).long(),
                no_ascent.long().to(present_D.device),
                (report.domain_weights < 0).sum(),
                ((report.domain_weights < 0) & (report.plain_domain_weights >= 0)).sum(),
                present_D.sum(),
            ]
        )
        self._counts = seen if self._counts is None else self._counts + seen
        if not skipped:
            self._idle.count(report, is_perturbed=step.rho > 0)
        self._steps += 1
        self.skipped += skipped

    def _numbers(self, step: FinishedStep) -> dict[str, Any]:
        """The report as plain numbers, domains by name; absent domains are left out."""
        report, names = step.report, self._dataset.domains
        counts_D = report.domain_counts.tolist()
        present = [i for i, count in enumerate(counts_D) if count > 0]
        losses_D, weights_D = report.domain_losses.tolist(), report.domain_weights.tolist()
        values: dict[str, Any] = {
            "loss": float(report.loss),
            "objective": float(report.objective),
            "perturbed_loss": float(report.perturbed_loss),
            "domain_loss": {names[i]: losses_D[i] for i in present},
            "domain_weight": {names[i]: weights_D[i] for i in present},
            "domain_share": {names[i]: counts_D[i] / sum(counts_D) for i in present},
            "ascent_norm": float(report.ascent_norm),
            "gradient_norm": float(step.gradient_norm),
        }
        if report.terms:
            values["terms"] = dict(zip(report.terms, torch.stack(list(report.terms.values())).tolist(), strict=True))
        for name, value_D in report.domain_terms.items():
            by_domain = value_D.tolist()
            values[name] = {names[i]: by_domain[i] for i in present}
        if self._method.changes:
            values["rho"], values["variance_weight"] = step.rho, step.variance_weight
        if report.ascent_cosine is not None:
            values["ascent_cosine"] = float(report.ascent_cosine)
        return values

    def track(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand numbers to the tracker, those of domains as ``name/domain``."""
        if not self._accelerator.trackers:
            return
        flat: dict[str, float] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                flat.update({f"{name}/{inner}": v for inner, v in value.items() if v is not None})
            elif value is not None:
                flat[name] = value
        self._accelerator.log(flat, step=step)

    @property
    def first_loss(self) -> float:
        """Mean loss of the first step; NaN before it."""
        return float("nan") if self._losses is None else float(self._losses[0])

    @property
    def last_loss(self) -> float:
        """Mean loss of the last step so far; NaN before the first."""
        return float("nan") if self._losses is None else float(self._losses[1])

    def totals(self) -> dict[str, int]:
        """Counts over the run."""
        counts = [0] * len(COUNTED) if self._counts is None else self._counts.tolist()
        return {"steps": self._steps, "skipped_steps": self.skipped, **dict(zip(COUNTED, counts, strict=True))}

    def state_dict(self) -> dict[str, Any]:
        return {
            "totals": self.totals(),
            "skipped_in_a_row": self._skipped_in_a_row,
            "losses": self._losses,
            "idle_method": self._idle.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        totals, losses = state["totals"], state["losses"]
        self._steps, self.skipped = totals["steps"], totals["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        device = self._accelerator.device
        # a state of a version that did not count what the variance did alone goes on from 0
        self._counts = torch.tensor([totals.get(name, 0) for name in COUNTED], device=device)
        self._losses = None if losses is None else losses.to(device)
        self._idle.load_state_dict(state.get("idle_method"))

    @property
    def has_trained(self) -> bool:
        """Whether any step so far changed the weights."""
        return self._steps > self.skipped

    def require_training(self) -> None:
        """Pass if any step of the run changed the weights.

        Raises:
            Diverged: all of them were skipped.
        """
        if not self.has_trained:
            raise Diverged(
                f"nothing was trained: all {self._steps} steps of the run had a loss or gradient that is not finite "
                f"and were skipped; try {self._remedy}"
            )

    def warn_at_the_start(self, params: Sequence[Tensor], adapter: Config | None) -> None:
        """Say before the first step what the trained tensors of this adapter show already."""
        self._idle.notice_at_the_start(params, adapter)

    def warn_at_the_end(self, params: Sequence[Tensor], adapter: Config | None) -> None:
        """Say what happened more often than the method is meant for, and where it could not act.

        Args:
            params: the trained tensors after the last step.
            adapter: the adapter whose tensors they are.
        """
        self._idle.notice_at_the_end(params, adapter, self._steps - self.skipped)
        if self._method.effective_variance_weight == 0:
            return
        totals = self.totals()
        weights, steps = max(1, totals["domain_weights"]), max(1, totals["steps"])
        # a penalty may make weights negative by its own definition, which no lambda mends
        if totals["negative_by_variance"] > RARE * weights:
            warnings.warn(
                f"{totals['negative_by_variance'] / weights:.0%} of the domain weights were negative because of the "
                f"variance: the ascent walks down on those domains. {self._bound()}; "
                f"lower method.variance_weight={self._method.effective_variance_weight:g}",
                stacklevel=3,
            )
        if len(self._dataset.present_domains) > 1 and totals["one_domain_steps"] > UNUSUAL * steps:
            warnings.warn(
                f"{totals['one_domain_steps'] / steps:.0%} of the steps saw one domain only and were plain "
                f"{self._method.descent.upper()}; use "
                "train.sampling=balanced or a larger train.batch_size",
                stacklevel=3,
            )

    def _bound(self) -> str:
        """Where the variance makes a domain weight negative, in words."""
        if not self._objective.climbs_mean_over_samples:
            return "It takes more from a domain than its weight in the objective, penalties included"
        over_samples, relative = self._method.variance_over == "samples", self._method.variance_scale == "relative"
        apart = "(L_d - mean(L)) / mean loss" if relative else "L_d - mean(L)"
        bound = f"{apart} > 1 / (2 lambda)" if over_samples else f"{apart} > n_d K / (2 lambda N)"
        return f"A weight w_d is negative where {bound}"

    def _diverged(self, indices_B: Tensor) -> str:
        files = "\n".join(f"  {self._dataset.source(i)}" for i in indices_B[:10].tolist())
        return (
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a loss or gradient that is not finite and were skipped; "
            f"try {self._remedy}. The last batch held, among others:\n{files}"
        )

    @property
    def _remedy(self) -> str:
        fp16 = self._config.mixed_precision == "fp16"
        return "train.mixed_precision=bf16" if fp16 else "a lower train.learning_rate or method.rho"
