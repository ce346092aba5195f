"""V-REx: the variance over domains of their mean losses. Shapes in this file: D domains."""

from __future__ import annotations

from torch import Tensor

from disam_peft.config.penalties import VRexConfig
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.objectives.base import Penalty
from disam_peft.objectives.whole_batch import outputs_of, whole_batch


def vrex(logits: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
    """DomainBed's V-REx penalty of a whole batch, shape (), differentiable in the logits: the population variance of
    the domains' mean cross entropies.

    Args:
        logits: (B, C).
        labels: (B,).
        domains: (B,) integers; any values.
    """
    penalty = VRex(VRexConfig())
    return penalty.value(whole_batch(penalty, outputs_of(logits, labels), domains))


class VRex(Penalty):
    """``(1/K) sum_d (L_d - Lbar)^2`` over the K domains of the batch (arXiv 2003.00688), as DomainBed has it.

    The variance is the population's. (The authors' own code for financial data divides by K - 1.) The losses are those
    that are descended.
    """

    def value(self, sums: DomainSums) -> Tensor:
        mean_D = sums.mean_of(sums.sum_D)
        return sums.over_domains((mean_D - sums.over_domains(mean_D)).square())
