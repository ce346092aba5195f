"""A penalty on a whole batch that is at hand, as a function of tensors. Shapes in this file: B samples, D domains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disam_peft.disam.domain_objective import DomainsOfSamples
from disam_peft.disam.domain_sums import DomainSums
from disam_peft.objectives.base import Outputs, Penalty
from disam_peft.objectives.cross_entropy import cross_entropy


def whole_batch(penalty: Penalty, outputs: Outputs, domains: Tensor, ids: Sequence[int] | None = None) -> DomainSums:
    """The sums of the plain cross entropy and of what the penalty asks for, over all samples, with their graph.

    In training the same sums are collected over micro-batches and processes, see ``disam.passes``.

    Args:
        domains: (B,) integers; any values.
        ids: the domains in play, ascending; unset: those that occur.

    Raises:
        ValueError: a domain that is none of ``ids``.
    """
    domains = torch.as_tensor(domains).long()
    if ids is None:
        ids_D, index_B = torch.unique(domains, sorted=True, return_inverse=True)
    else:
        ids_D = torch.as_tensor(list(ids), dtype=torch.int64, device=domains.device)
        index_B = torch.searchsorted(ids_D, domains).clamp(max=len(ids_D) - 1)
        if not torch.equal(ids_D[index_B], domains):
            raise ValueError(f"the batch holds domains that are none of ids={list(ids)}: {domains.unique().tolist()}")
    of_samples = DomainsOfSamples(index_B, len(ids_D))
    loss_B = cross_entropy(outputs.logits_BC, outputs.labels_B)
    count_D = of_samples.sums(torch.ones_like(loss_B))
    return DomainSums(
        ids_D, of_samples.sums(loss_B), count_D, statistics=tuple(penalty.statistics(outputs, of_samples))
    )


def outputs_of(logits: Tensor, labels: Tensor, features: Tensor | None = None) -> Outputs:
    """Of a batch whose rows stand in the order of the batch."""
    place_B = torch.arange(len(logits), device=logits.device)
    return Outputs(logits, labels, features, place_B=place_B, num_places=len(logits))


def features_alone(features: Tensor) -> Outputs:
    """Of a penalty that reads no logits."""
    return outputs_of(
        features.new_zeros(len(features), 1), features.new_zeros(len(features), dtype=torch.int64), features
    )


def mean_over_domains(logits: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
    """The mean over the domains of the batch of their mean cross entropies, shape (): DomainBed's loss beside its
    penalties. logits (B, C), labels (B,), domains (B,) of any integers."""
    sums = whole_batch(Penalty(None), outputs_of(logits, labels), domains)
    return sums.over_domains(sums.mean_of(sums.sum_D))
