"""V-REx: the variance over domains of their mean losses. Shapes in this file: D domains."""

from __future__ import annotations

from torch import Tensor

from disam_peft.config.objective import VRexConfig
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.objectives.base import Penalty


class VRex(Penalty):
    """``(1/K) sum_d (L_d - Lbar)^2`` over the K domains of the batch (arXiv 2003.00688), as DomainBed has it.

    The variance is the population's. (The authors' own code for financial data divides by K - 1.) The weight is 1 in
    the first ``anneal`` steps. DomainBed also throws away the state of Adam at the end of them, which is not done here.
    """

    config: VRexConfig

    def value(self, sums: DomainSums) -> Tensor:
        mean_D = sums.mean_of(sums.sum_D)
        return sums.over_domains((mean_D - sums.over_domains(mean_D)).square())

    def weight(self, step: int) -> float:
        return 1.0 if step < self.config.anneal else self.config.weight
