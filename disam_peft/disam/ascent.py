"""The closed form of the ascent weights.

Shapes in this file: D domains (the ids in play; some may be absent from the batch).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

VarianceOver = Literal["domains", "samples"]


def ascent_weights(
    mean_D: Tensor,
    count_D: Tensor,
    variance_weight: float | Tensor,
    objective_D: Tensor | None = None,
    variance_over: VarianceOver = "domains",
) -> Tensor:
    """Weight c_d of each sample of domain d in the ascent gradient ``sum_i c_d(i) grad l_i``.

    The gradient of ``mean(l) - lambda * Var(L)`` with the population variance over the K domains present is linear
    in the samples' gradients, with ``c_d = 1/N - (2 lambda / K) (L_d - mean_d L_d) / n_d`` (arXiv 2405.18861, Eq. 6-8).
    So pass 1 needs one backward and no graph through the variance. ``n_d c_d`` are the domain weights w_d; they sum to
    one, and one is negative where ``L_d - Lbar > n_d K / (2 lambda N)``.

    Over samples, the variance weighs every domain by its share of the batch, ``sum_d (n_d/N) (L_d - L)^2`` with the
    batch mean L. Then ``c_d = 1/N - (2 lambda / N) (L_d - L)``. The code that the paper's authors published computes
    this one. Both are the same where all domains have equally many samples.

    Args:
        mean_D: mean loss per domain, (D,) or (..., D) for several models at once; ignored (may be NaN) where the count
            is 0.
        count_D: samples per domain, (D,); floating point, so that nothing is rounded to float32 on the way.
        variance_weight: lambda; 0 gives 1/N throughout, exactly. A tensor that broadcasts to ``mean_D`` gives each
            model its own.
        objective_D: dJ/dS_d of another objective J in the place of the mean loss, where S_d are the sums of losses;
            (D,), or () where all are equal. It takes the place of 1/N, the first term of ``c_d``.
        variance_over: ``domains`` (the paper) or ``samples`` (its code).

    Returns:
        ``mean_D``'s shape and dtype; 0 for absent domains.
    """
    present_D = count_D > 0
    # in the losses' own dtype: dividing a number by an integer tensor would silently round to float32
    num_present = present_D.sum().to(mean_D.dtype)
    mean_D = torch.where(present_D, mean_D, torch.zeros_like(mean_D))
    if variance_over == "samples":
        total = count_D.sum()
        grand_mean = (mean_D * count_D).sum(dim=-1, keepdim=True) / total
        pull_D = (2.0 * variance_weight / total) * (mean_D - grand_mean)
    else:
        grand_mean = mean_D.sum(dim=-1, keepdim=True) / num_present
        safe_count_D = torch.where(present_D, count_D, torch.ones_like(count_D))
        pull_D = (2.0 * variance_weight / num_present) * (mean_D - grand_mean) / safe_count_D
    # with lambda = 0 the pull must vanish even where a loss is inf (0 * inf would be NaN)
    if isinstance(variance_weight, Tensor):
        pull_D = torch.where(variance_weight != 0, pull_D, torch.zeros_like(pull_D))
    elif variance_weight == 0:
        pull_D = torch.zeros_like(pull_D)
    weight_D = (1.0 / count_D.sum() if objective_D is None else objective_D) - pull_D
    return torch.where(present_D, weight_D, torch.zeros_like(weight_D))
