"""CORAL: distances between means and covariances of the domains' features.

Shapes in this file: B samples, D domains, E embedding width, F any number of entries.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from disam_peft.config.penalties import CoralConfig
from disam_peft.disam.domain_objective import DomainsOfSamples
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.objectives.base import Outputs, Penalty
from disam_peft.objectives.whole_batch import features_alone, whole_batch


def coral(features: Tensor, domains: Tensor) -> Tensor:
    """DomainBed's CORAL penalty of a whole batch, shape (), differentiable in the features.

    For a pair (a, b) of domains it is the mean over the entries of ``(m_a - m_b)^2`` plus that of ``(S_a - S_b)^2``,
    with means m and unbiased covariances S; the penalty is the mean over all pairs, and 0 without a pair. (The original
    CORAL of Sun & Saenko, arXiv 1607.01719, compares covariances alone, and divides by 4 E^2.) A domain of one sample
    has no covariance: DomainBed's code gives NaN, here such a pair compares the means alone.

    Args:
        features: (B, E), as they are; training gives those of length 1.
        domains: (B,) integers; any values.
    """
    penalty = Coral(CoralConfig())
    return penalty.value(whole_batch(penalty, features_alone(features), domains))


class Coral(Penalty):
    """See ``coral``. The features are the normalised image features, after the adapter."""

    num_statistics = 2

    def statistics(self, outputs: Outputs, domains: DomainsOfSamples) -> Sequence[Tensor]:
        return domains.sums(outputs.features), domains.outer_sums(outputs.features)

    def value(self, sums: DomainSums) -> Tensor:
        sum_DE, outer_DEE = sums.statistics
        width, count_D11 = sum_DE.shape[1], sums.count_D[:, None, None]
        mean_DE = sums.mean_of(sum_DE)
        scatter_DEE = outer_DEE - mean_DE[:, :, None] * sum_DE[:, None, :]
        covariance_DEE = scatter_DEE / (count_D11 - 1).clamp(min=1)
        has_two_D = (sums.count_D > 1).to(sums.count_D.dtype)
        of_means = _over_pairs(mean_DE, sums.present_D) / width
        of_covariances = _over_pairs(covariance_DEE.flatten(1), has_two_D) / width**2
        num_pairs = sums.num_present * (sums.num_present - 1) / 2
        return (of_means + of_covariances) / num_pairs.clamp(min=1)


def _over_pairs(value_DF: Tensor, counts_D: Tensor) -> Tensor:
    """``sum over the pairs (a, b) of |v_a - v_b|^2``, which is ``K sum_a |v_a - mean|^2``, over K of the domains."""
    value_DF, counts_D1 = value_DF * counts_D[:, None], counts_D[:, None]
    count = counts_D.sum()
    mean_F = value_DF.sum(dim=0) / count.clamp(min=1)
    return count * (counts_D1 * (value_DF - mean_F).square()).sum()
