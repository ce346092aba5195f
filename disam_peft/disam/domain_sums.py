"""Per-domain sums and means of the losses, and of whatever else an objective needs.

Shapes in this file: B samples, D domains (the ids in play; some may be absent from the batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class DomainSums:
    """Sums over a batch, which add up over ranks and micro-batches where means would not.

    All tensors are of the accumulation dtype (float64 where there is one).

    Attributes:
        ids_D: the domain ids, ascending, int64.
        sum_D: sum of the per-sample losses of each domain.
        count_D: number of samples of each domain.
        reported_D: sum of the per-sample losses that a report shows; unset: those of ``sum_D``.
        statistics: further sums over the samples, most of them (D, ...), that an objective asked for.
        terms: sums (D,) of parts of the losses, which a report shows one by one.
    """

    ids_D: Tensor
    sum_D: Tensor
    count_D: Tensor
    reported_D: Tensor | None = None
    statistics: tuple[Tensor, ...] = ()
    terms: tuple[Tensor, ...] = ()

    def __add__(self, other: DomainSums) -> DomainSums:
        """Of two batches together. Both must hold the same ``ids_D`` and the same statistics."""
        return self.with_tensors([a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)])

    def tensors(self) -> list[Tensor]:
        """All that adds up, in a fixed order."""
        reported = [] if self.reported_D is None else [self.reported_D]
        return [self.sum_D, self.count_D, *reported, *self.terms, *self.statistics]

    def with_tensors(self, tensors: Sequence[Tensor]) -> DomainSums:
        """The same kind of sums with other values, in the order of ``tensors()``."""
        sum_D, count_D, *others = tensors
        reported_D = None if self.reported_D is None else others.pop(0)
        terms, statistics = others[: len(self.terms)], others[len(self.terms) :]
        return DomainSums(self.ids_D, sum_D, count_D, reported_D, tuple(statistics), tuple(terms))

    @cached_property
    def mean_D(self) -> Tensor:
        """Mean loss per domain; NaN for an absent domain."""
        return self.sum_D / self.count_D

    @cached_property
    def total(self) -> Tensor:
        """Number of samples, shape ()."""
        return self.count_D.sum()

    @cached_property
    def mean(self) -> Tensor:
        """Mean loss over all samples, shape ()."""
        return self.sum_D.sum() / self.total

    @property
    def reported(self) -> DomainSums:
        """The losses that a report shows, in the place of those that are descended."""
        return self if self.reported_D is None else DomainSums(self.ids_D, self.reported_D, self.count_D)

    # -- for objectives: differentiable, and without a NaN where a domain is absent --------------------------

    @cached_property
    def present_D(self) -> Tensor:
        """1 for each domain that has samples in the batch, 0 for the others."""
        return (self.count_D > 0).to(self.count_D.dtype)

    @cached_property
    def num_present(self) -> Tensor:
        """K, the number of domains in the batch, shape ()."""
        return self.present_D.sum()

    def mean_of(self, sum_D: Tensor) -> Tensor:
        """Mean over the samples of each domain from their sum, (D, ...); 0 for an absent domain."""
        return sum_D / self.count_D.clamp(min=1).view(-1, *[1] * (sum_D.ndim - 1))

    def over_domains(self, value_D: Tensor) -> Tensor:
        """Mean over the domains in the batch of one value for each of them: (D,) to ()."""
        return value_D.where(self.present_D > 0, 0.0).sum() / self.num_present


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """float64 also for float32 losses: a float32 sum over a large batch would cost the weights their last digits."""
    return torch.float32 if device.type == "mps" else torch.float64


def domain_sums(
    loss_B: Tensor,
    index_B: Tensor,
    ids_D: Tensor,
    mask_B: Tensor | None = None,
    reported_B: Tensor | None = None,
    statistics: Sequence[Tensor] = (),
    terms: Sequence[Tensor] = (),
) -> DomainSums:
    """Sums and counts per domain by one scatter each.

    Args:
        loss_B: per-sample losses; detached here.
        index_B: position of each sample's domain in ``ids_D``.
        ids_D: the domain ids in play.
        mask_B: bool; a sample where it is False is not counted and its loss is not read. Unset: all are.
        reported_B: per-sample losses that a report shows, if they are others.
        statistics: sums of the same samples, (D, ...) each; detached here.
        terms: parts of the losses, (B,) each, that a report shows.
    """
    dtype = accumulation_dtype(loss_B.device)
    zeros_D = torch.zeros(len(ids_D), dtype=dtype, device=loss_B.device)

    def summed(value_B: Tensor) -> Tensor:
        value_B = value_B.detach().to(dtype)
        return zeros_D.index_add(0, index_B, value_B if mask_B is None else value_B.where(mask_B, 0.0))

    return DomainSums(
        ids_D,
        sum_D=summed(loss_B),
        count_D=summed(torch.ones_like(loss_B, dtype=dtype)),
        reported_D=None if reported_B is None else summed(reported_B),
        statistics=tuple(statistic.detach() for statistic in statistics),
        terms=tuple(summed(term_B) for term_B in terms),
    )


def domain_index(domains_B: Tensor, num_domains: int | None) -> tuple[Tensor, Tensor]:
    """Ids in play and the position of every sample's domain among them: (ids_D, index_B).

    With ``num_domains`` the ids are 0..num_domains-1, present or not, and nothing waits for the device. Without,
    they are those that occur, whatever their values.
    """
    if num_domains is None:
        return torch.unique(domains_B, sorted=True, return_inverse=True)
    return _all_ids(num_domains, domains_B.device), domains_B


@cache
def _all_ids(num_domains: int, device: torch.device) -> Tensor:
    """Always the same tensor: state per domain sees without asking the device that the ids are those of before."""
    with torch.inference_mode(False):
        return torch.arange(num_domains, device=device)


def union_of_ids(ids_D: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The ids that occur on any rank, ascending; for runs that do not say how many domains there are."""
    world_size = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=ids_D.device) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(ids_D)], device=ids_D.device), group=group)
    longest = max(1, int(torch.stack(sizes).max()))
    padded = torch.zeros(longest, dtype=torch.int64, device=ids_D.device)
    padded[: len(ids_D)] = ids_D
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded, group=group)
    return torch.unique(torch.cat([ids[: int(size)] for ids, size in zip(gathered, sizes, strict=True)]))
