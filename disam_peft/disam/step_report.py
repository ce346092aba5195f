"""What one step saw. Shapes in this file: D domains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from disam_peft.disam.domain_objective import DomainObjective
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.disam.passes import AscentMode, FirstPass


@dataclass(frozen=True)
class StepReport:
    """What one step saw. Tensors, detached and still on the device: reading one may wait for the device.

    All figures are of the whole effective batch, over all micro-batches and ranks, and the same on every rank: what is
    decided on them is decided alike everywhere.

    Attributes:
        loss: mean loss at w over the batch, shape (). Of the losses that the forward pass reports, see ``Forward``.
        objective: value at w of what was descended, shape (): the mean loss and all penalties, without the variance
            term, which the perturbation alone climbs. Without an objective of its own it equals ``loss``.
        terms: value at w of each penalty and each anchor by its kind, without its weight, shape () each; as they are in
            ``objective``. Without an objective that has any, it is empty.
        domain_terms: numbers of each domain that belong to a term, (D,) each: ``groupdro_q``, what multiplies the mean
            losses of the domains; 0 for an absent domain.
        perturbed_loss: mean loss at w + e; equals ``loss`` where there was no second pass.
        domain_ids: (D,) int64, ascending.
        domain_counts: (D,) samples per domain; 0 for a domain that is absent from the batch.
        domain_losses: (D,) mean loss per domain at w; NaN for an absent domain.
        domain_weights: (D,) w_d = n_d c_d, the weights of the mean losses in pass 1, which sum to one (with a penalty
            on more than the losses: besides that penalty's gradient); n_d / N for ERM and SAM. Negative: see
            ``ascent_weights``.
        plain_domain_weights: (D,) the same without the variance term: those of the mean and of the penalties in the
            ascent. Where only ``domain_weights`` are negative, the variance made them so.
        ascent_norm: norm of the ascent gradient over the trained parameters (adaptive: of |w| g), at loss scale 1,
            shape (); 0 where there was no ascent.
        is_finite: shape (), bool: losses, objective and ascent gradient of this step are finite, on every rank. If
            False the gradients hold NaN (a loss scaler skips and backs off by itself); without a scaler, skip the step.
        ascent_cosine: cosine between the ascent direction and the one without the variance term (plain SAM's) on the
            same batch, shape (); None unless asked for.
        mode: how pass 1 went over the micro-batches, see ``DISAM.backward_accumulated``.
    """

    loss: Tensor
    objective: Tensor
    perturbed_loss: Tensor
    domain_ids: Tensor
    domain_counts: Tensor
    domain_losses: Tensor
    domain_weights: Tensor
    plain_domain_weights: Tensor
    ascent_norm: Tensor
    is_finite: Tensor
    ascent_cosine: Tensor | None = None
    mode: AscentMode = "two_phase"
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    domain_terms: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def way(self) -> AscentMode:
        """The former name of ``mode``; it goes away in 0.3."""
        warnings.warn("StepReport.way is now called mode; it goes away in 0.3", DeprecationWarning, stacklevel=2)
        return self.mode

    @classmethod
    def of(
        cls,
        objective: DomainObjective,
        first: FirstPass,
        perturbed: DomainSums,
        *,
        ascent_norm: Tensor | None = None,
        direction_is_finite: Tensor | None = None,
        ascent_cosine: Tensor | None = None,
    ) -> StepReport:
        """The report on a step whose passes saw these sums; without a direction there was no second pass."""
        sums = first.sums
        valued = objective.valued(sums)
        is_finite = torch.isfinite(sums.mean) & torch.isfinite(perturbed.mean)
        if objective.has_penalty(in_ascent=False) or objective.has_statistics:
            is_finite = is_finite & torch.isfinite(valued.value) & torch.isfinite(objective.value(perturbed))
        if direction_is_finite is not None:
            is_finite = is_finite & direction_is_finite.to(is_finite.device)
        return cls(
            loss=sums.reported.mean,
            objective=valued.value,
            perturbed_loss=perturbed.reported.mean,
            domain_ids=sums.ids_D,
            domain_counts=sums.count_D,
            domain_losses=sums.reported.mean_D,
            domain_weights=sums.count_D * first.weight_D,
            plain_domain_weights=sums.count_D * first.plain_weight_D,
            ascent_norm=torch.zeros_like(sums.mean) if ascent_norm is None else ascent_norm,
            is_finite=is_finite,
            ascent_cosine=ascent_cosine,
            mode=first.mode,
            terms=valued.terms,
            domain_terms=valued.domain_terms,
        )
