"""What the steps of a run looked like: counted on the device, read only when somebody writes it down. D domains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from disam_peft.config.method import MethodConfig
from disam_peft.disam.disam import StepReport

RARE = 0.05
UNUSUAL = 0.2
COUNTED = ("one_domain_steps", "zero_ascent_steps", "negative_domain_weights", "domain_weights")


class StepCounters:
    """Counts steps without effect, with one domain, without an ascent direction, and domain weights below 0."""

    def __init__(self, domain_names: tuple[str, ...], num_sources: int, method: MethodConfig) -> None:
        self._names, self._num_sources, self._method = domain_names, num_sources, method
        self._steps, self.skipped = 0, 0
        self._totals: Tensor | None = None  # in the order of COUNTED

    def count(self, report: StepReport, skipped: bool) -> None:
        present_D = report.domain_counts > 0
        no_ascent = (report.ascent_norm == 0) & (self._method.effective_rho > 0)
        seen = torch.stack(
            [
                (present_D.sum() == 1).long(),
                no_ascent.long().to(present_D.device),
                (report.domain_weights < 0).sum(),
                present_D.sum(),
            ]
        )
        self._totals = seen if self._totals is None else self._totals + seen
        self._steps += 1
        self.skipped += skipped

    def numbers(self, report: StepReport, gradient_norm: Tensor) -> dict[str, Any]:
        """The report as plain numbers, domains by name; absent domains are left out."""
        counts_D = report.domain_counts.tolist()
        present = [i for i, count in enumerate(counts_D) if count > 0]
        losses_D, weights_D = report.domain_losses.tolist(), report.domain_weights.tolist()
        values: dict[str, Any] = {
            "loss": float(report.loss),
            "perturbed_loss": float(report.perturbed_loss),
            "domain_loss": {self._names[i]: losses_D[i] for i in present},
            "domain_weight": {self._names[i]: weights_D[i] for i in present},
            "domain_share": {self._names[i]: counts_D[i] / sum(counts_D) for i in present},
            "ascent_norm": float(report.ascent_norm),
            "gradient_norm": float(gradient_norm),
        }
        if report.ascent_cosine is not None:
            values["ascent_cosine"] = float(report.ascent_cosine)
        return values

    def totals(self) -> dict[str, int]:
        """Counts over the run."""
        counts = [0] * len(COUNTED) if self._totals is None else self._totals.tolist()
        return {"steps": self._steps, "skipped_steps": self.skipped, **dict(zip(COUNTED, counts, strict=True))}

    def load(self, totals: Mapping[str, int], device: torch.device) -> None:
        """Go on from what ``totals()`` gave."""
        self._steps, self.skipped = totals["steps"], totals["skipped_steps"]
        self._totals = torch.tensor([totals[name] for name in COUNTED], device=device)

    def warn_at_the_end(self) -> None:
        """Say what happened more often than the method is meant for."""
        if self._method.effective_variance_weight == 0:
            return
        totals = self.totals()
        weights, steps = max(1, totals["domain_weights"]), max(1, totals["steps"])
        if totals["negative_domain_weights"] > RARE * weights:
            warnings.warn(
                f"{totals['negative_domain_weights'] / weights:.0%} of the domain weights were negative: the ascent "
                "walks down on those domains. A weight w_d is negative where L_d - mean(L) > n_d K / (2 lambda N); "
                f"lower method.variance_weight={self._method.variance_weight:g}",
                stacklevel=3,
            )
        if self._num_sources > 1 and totals["one_domain_steps"] > UNUSUAL * steps:
            warnings.warn(
                f"{totals['one_domain_steps'] / steps:.0%} of the steps saw one domain only and were plain SAM; use "
                "train.sampling=balanced or a larger train.batch_size",
                stacklevel=3,
            )
