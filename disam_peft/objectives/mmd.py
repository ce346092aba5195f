"""MMD: maximum mean discrepancy between the features of the domains.

Shapes in this file: B samples of a micro-batch, P places in the whole batch, D domains, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from disam_peft.config.penalties import MMDConfig
from disam_peft.disam.domain_objective import DomainsOfSamples
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.objectives.base import Outputs, Penalty
from disam_peft.objectives.whole_batch import features_alone, whole_batch

GAMMAS: Final = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""DomainBed's: the kernel is the sum over them of ``exp(-gamma |x - y|^2)``."""
SMALLEST_DISTANCE: Final = 1e-30


def mmd(features: Tensor, domains: Tensor) -> Tensor:
    """DomainBed's MMD penalty of a whole batch, shape (), differentiable in the features.

    For a pair (a, b) of domains it is ``mean k(a, a) + mean k(b, b) - 2 mean k(a, b)`` with the diagonal included (the
    biased estimate) and the kernel of ``GAMMAS``; squared distances are at least 1e-30. The penalty is the mean over
    all pairs, and 0 without a pair.

    Args:
        features: (B, E), as they are; training gives those of length 1.
        domains: (B,) integers; any values.
    """
    penalty = MMD(MMDConfig())
    return penalty.value(whole_batch(penalty, features_alone(features), domains))


class MMD(Penalty):
    """See ``mmd``. The features are the normalised image features, after the adapter.

    A kernel compares samples, so that this is no function of sums over domains. The features of all samples are
    collected one by one in their places instead: a sum over micro-batches and processes of tensors (P, E), which are 0
    where others have the sample. What follows, about a dozen tensors (P, P) of float64, is computed by every process.
    """

    num_statistics = 2

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        return domains.in_places(outputs.features, *outputs.places)

    def value(self, sums: DomainSums) -> Tensor:
        feature_PE, taken_DP = sums.statistics
        mean_DP = sums.mean_of((taken_DP > 0).to(feature_PE.dtype))  # row d times values: their mean over domain d
        kernel_DD = mean_DP @ _kernel(feature_PE) @ mean_DP.mT
        # sum over the pairs of k_aa + k_bb - 2 k_ab
        over_pairs = sums.num_present * kernel_DD.diagonal().sum() - kernel_DD.sum()
        num_pairs = sums.num_present * (sums.num_present - 1) / 2
        return over_pairs / num_pairs.clamp(min=1)


def _kernel(feature_PE: Tensor) -> Tensor:
    """(P, P)."""
    centred_PE = feature_PE - feature_PE.detach().mean(dim=0)  # the same distances, with less rounding
    square_P = centred_PE.square().sum(dim=1)
    distance_PP = square_P[:, None] + square_P - 2 * centred_PE @ centred_PE.mT
    distance_PP = distance_PP.clamp(min=SMALLEST_DISTANCE)
    kernel_PP = torch.zeros_like(distance_PP)
    for gamma in GAMMAS:
        kernel_PP = kernel_PP + torch.exp(-gamma * distance_PP)
    return kernel_PP
