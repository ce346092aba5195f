"""IRM: the squared gradient of each domain's loss by a factor of the logits.

Shapes in this file: B samples of a micro-batch, P places in the whole batch, C classes, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disam_peft.config.penalties import IRMConfig
from disam_peft.disam.domain_objective import DomainsOfSamples
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.objectives.base import Outputs, Penalty
from disam_peft.objectives.whole_batch import outputs_of, whole_batch


def irm(logits: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
    """DomainBed's IRM penalty of a whole batch, shape (), differentiable in the logits.

    With ``s_i = sum_c p_ic z_ic - z_iy``, the derivative of the cross entropy of ``scale * logits`` by the scale at 1,
    it is the mean over the domains of (mean of s over the domain's even rows) times (mean over its odd rows), in the
    order of the batch. It may be negative. A domain of one sample contributes 0.

    Args:
        logits: (B, C).
        labels: (B,).
        domains: (B,) integers; any values.
    """
    penalty = IRM(IRMConfig(variant="domainbed"))
    return penalty.value(whole_batch(penalty, outputs_of(logits, labels), domains))


def irm_v1(logits: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
    """The penalty of IRM's authors, shape (): the mean over the domains of (mean of s over the domain)^2, with s, the
    arguments and the derivative as in ``irm``. (Their own loss is for two classes.)"""
    penalty = IRM(IRMConfig(variant="v1"))
    return penalty.value(whole_batch(penalty, outputs_of(logits, labels), domains))


class IRM(Penalty):
    """See ``irm`` and ``irm_v1``. The loss is the plain cross entropy, whatever is descended beside the penalty."""

    config: IRMConfig

    def __init__(self, config: IRMConfig) -> None:
        super().__init__(config)
        self.num_statistics = 1 if config.variant == "v1" else 2

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        logits_BC = outputs.logits_BC
        by_scale_B = ((logits_BC.softmax(dim=1) - outputs.targets_BC) * logits_BC).sum(dim=1)
        if self.config.variant == "v1":
            return (domains.sums(by_scale_B),)
        return domains.in_places(by_scale_B, *outputs.places)

    def value(self, sums: DomainSums) -> Tensor:
        if self.config.variant == "v1":
            (sum_D,) = sums.statistics
            return sums.over_domains(sums.mean_of(sum_D).square())
        by_scale_P, taken_DP = sums.statistics
        is_taken_DP = taken_DP.detach() > 0
        is_odd_DP = is_taken_DP & (is_taken_DP.cumsum(dim=1) % 2 == 0)  # the second, the fourth, ... of its domain
        even_D, odd_D = (_mean(by_scale_P, half_DP) for half_DP in (is_taken_DP & ~is_odd_DP, is_odd_DP))
        return sums.over_domains(even_D * odd_D)


def _mean(value_P: Tensor, of_DP: Tensor) -> Tensor:
    """Mean over the places where a row is True, (D,); 0 where there are none."""
    sum_D = torch.where(of_DP, value_P, 0.0).sum(dim=1)
    return sum_D / of_DP.sum(dim=1).clamp(min=1)
