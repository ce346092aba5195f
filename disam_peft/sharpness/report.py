"""What a step saw, for logs and for the decision to skip it. Shapes in this file: D domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

AscentWay = Literal["mean", "two_phase", "per_domain"]


@dataclass(frozen=True)
class StepReport:
    """What one step saw. Tensors, detached and still on the device: reading one may wait for the device.

    All figures are of the whole effective batch, over all micro-batches and ranks, and the same on every rank: what is
    decided on them is decided alike everywhere.

    Attributes:
        loss: mean loss at w over the batch, shape ().
        perturbed_loss: mean loss at w + e; equals ``loss`` where there was no second pass.
        domain_ids: (D,) int64, ascending.
        domain_counts: (D,) samples per domain; 0 for a domain that is absent from the batch.
        domain_losses: (D,) mean loss per domain at w; NaN for an absent domain.
        domain_weights: (D,) w_d = n_d c_d, which sum to one; n_d / N for ERM and SAM. Negative: see ``ascent_weights``.
        ascent_norm: norm of the ascent gradient over the trained parameters (adaptive: of |w| g), at loss scale 1,
            shape (); 0 where there was no ascent.
        is_finite: shape (), bool: losses and ascent gradient of this step are finite, on every rank. If False the
            gradients hold NaN (a loss scaler skips and backs off by itself); without a scaler, skip the step.
        ascent_cosine: cosine between the ascent direction and plain SAM's on the same batch, shape (); None unless
            asked for.
        way: how pass 1 went over the micro-batches, see ``DISAM.backward_accumulated``.
    """

    loss: Tensor
    perturbed_loss: Tensor
    domain_ids: Tensor
    domain_counts: Tensor
    domain_losses: Tensor
    domain_weights: Tensor
    ascent_norm: Tensor
    is_finite: Tensor
    ascent_cosine: Tensor | None = None
    way: AscentWay = "two_phase"
