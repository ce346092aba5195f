"""The closed form of the ascent weights.

Shapes in this file: D domains (the ids in play; some may be absent from the batch).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

VarianceOver = Literal["domains", "samples"]
VarianceScale = Literal["absolute", "relative"]
VarianceForm = Literal["variance", "entropic"]
VARIANCE_OVER: tuple[str, ...] = get_args(VarianceOver)
VARIANCE_SCALES: tuple[str, ...] = get_args(VarianceScale)
VARIANCE_FORMS: tuple[str, ...] = get_args(VarianceForm)


def ascent_weights(
    mean_D: Tensor,
    count_D: Tensor,
    variance_weight: float | Tensor,
    objective_D: Tensor | None = None,
    variance_over: VarianceOver = "domains",
    variance_scale: VarianceScale = "absolute",
) -> Tensor:
    """Weight c_d of each sample of domain d in the ascent gradient ``sum_i c_d(i) grad l_i``.

    The gradient of ``mean(l) - lambda * Var(L)`` with the population variance over the K domains present is linear
    in the samples' gradients, with ``c_d = 1/N - (2 lambda / K) (L_d - mean_d L_d) / n_d`` (arXiv 2405.18861, Eq. 6-8).
    So pass 1 needs one backward and no graph through the variance. ``n_d c_d`` are the domain weights w_d; they sum to
    one, and one is negative where ``L_d - Lbar > n_d K / (2 lambda N)``.

    Over samples, the variance weighs every domain by its share of the batch, ``sum_d (n_d/N) (L_d - L)^2`` with the
    batch mean L. Then ``c_d = 1/N - (2 lambda / N) (L_d - L)``. The code that the paper's authors published computes
    this one. Both are the same where all domains have equally many samples.

    Relative, lambda is divided by the batch mean of the losses, ``m = (1/N) sum_i l_i``, taken as a number: then it
    means the same at the start of a run, when losses are large, and at its end. Where m is not positive there is no
    variance term.

    Args:
        mean_D: mean loss per domain, (D,) or (..., D) for several models at once; ignored (may be NaN) where the count
            is 0.
        count_D: samples per domain, (D,); floating point, so that nothing is rounded to float32 on the way.
        variance_weight: lambda; 0 gives 1/N throughout, exactly. A tensor that broadcasts to ``mean_D`` gives each
            model its own.
        objective_D: dJ/dS_d of another objective J in the place of the mean loss, where S_d are the sums of losses;
            (D,), or () where all are equal. It takes the place of 1/N, the first term of ``c_d``.
        variance_over: ``domains`` (the paper) or ``samples`` (its code).
        variance_scale: ``absolute`` (the paper) or ``relative``.

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
    if variance_scale == "relative":
        batch_mean = _batch_mean(mean_D, count_D)
        pull_D = torch.where(batch_mean > 0, pull_D / batch_mean, torch.zeros_like(pull_D))
    # with lambda = 0 the pull must vanish even where a loss is inf (0 * inf would be NaN)
    if isinstance(variance_weight, Tensor):
        pull_D = torch.where(variance_weight != 0, pull_D, torch.zeros_like(pull_D))
    elif variance_weight == 0:
        pull_D = torch.zeros_like(pull_D)
    weight_D = (1.0 / count_D.sum() if objective_D is None else objective_D) - pull_D
    return torch.where(present_D, weight_D, torch.zeros_like(weight_D))


def entropic_weights(
    mean_D: Tensor, count_D: Tensor, temperature: float | Tensor, mean_weight_D: Tensor | None = None
) -> Tensor:
    """Weight c_d of each sample of domain d where the domain weights are a softmax, so that none is negative.

    ``w_d = n_d c_d = softmax_d(log b_d - tau L_d / m)`` over the domains present. b_d are the domain's weights in the
    mean that is descended, n_d/N for the mean over samples, and ``m = (1/N) sum_i l_i`` is the mean loss, taken as a
    number. To second order in the differences of the losses this is DISAM over samples with ``lambda = tau / (2 m)``.
    Where m is not positive, w_d = b_d.

    Args:
        mean_D: mean loss per domain, (D,) or (..., D) for several models at once; ignored where the count is 0.
        count_D: samples per domain, (D,); floating point.
        temperature: tau; 0 gives ``mean_weight_D`` exactly. A tensor that broadcasts to ``mean_D`` gives each model its
            own.
        mean_weight_D: b_d / n_d, (D,) or () where all are equal; unset: 1/N.

    Returns:
        ``mean_D``'s shape and dtype; 0 for absent domains. ``n_d c_d`` have the same sum as ``b_d``.
    """
    present_D = count_D.bool()
    mean_D = mean_D.where(present_D, 0.0)
    base_D = (1.0 / count_D.sum() if mean_weight_D is None else mean_weight_D).expand_as(mean_D)
    share_D = torch.where(present_D, base_D * count_D, torch.zeros_like(mean_D))
    batch_mean = _batch_mean(mean_D, count_D)
    weight_D = torch.softmax(share_D.log() - temperature * mean_D / batch_mean, dim=-1) * share_D.sum(-1, keepdim=True)
    safe_count_D = count_D.where(present_D, 1.0)
    is_plain = torch.as_tensor(temperature, device=mean_D.device) == 0
    weight_D = torch.where(is_plain | (batch_mean <= 0), base_D, weight_D / safe_count_D)
    return weight_D.where(present_D, 0.0)


def _batch_mean(mean_D: Tensor, count_D: Tensor) -> Tensor:
    """(1/N) sum_i l_i, (..., 1), of means that are 0 where the domain is absent."""
    return (mean_D * count_D).sum(dim=-1, keepdim=True) / count_D.sum()
