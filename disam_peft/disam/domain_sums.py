"""Per-domain sums and means, and the closed form of the ascent weights.

Shapes in this file: B samples, D domains (the ids in play; some may be absent from the batch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class DomainSums:
    """Sums over a batch, which add up over ranks and micro-batches where means would not.

    Attributes:
        ids_D: the domain ids, ascending, int64.
        sum_D: sum of the per-sample losses of each domain, in the accumulation dtype (float64 where there is one).
        count_D: number of samples of each domain, same dtype as ``sum_D``.
    """

    ids_D: Tensor
    sum_D: Tensor
    count_D: Tensor

    def __add__(self, other: DomainSums) -> DomainSums:
        """Of two batches together; both must hold the same ``ids_D``."""
        return DomainSums(self.ids_D, self.sum_D + other.sum_D, self.count_D + other.count_D)

    @property
    def mean_D(self) -> Tensor:
        """Mean loss per domain; NaN for an absent domain."""
        return self.sum_D / self.count_D

    @property
    def total(self) -> Tensor:
        """Number of samples, shape ()."""
        return self.count_D.sum()

    @property
    def mean(self) -> Tensor:
        """Mean loss over all samples, shape ()."""
        return self.sum_D.sum() / self.total


def domain_sums(loss_B: Tensor, index_B: Tensor, ids_D: Tensor, mask_B: Tensor | None = None) -> DomainSums:
    """Sums and counts per domain by one scatter each.

    Args:
        loss_B: per-sample losses; detached here.
        index_B: position of each sample's domain in ``ids_D``.
        ids_D: the domain ids in play.
        mask_B: bool; a sample where it is False is not counted and its loss is not read. Unset: all are.
    """
    # float64 also for float32 losses: a float32 sum over a large batch would cost the weights their last digits
    dtype = torch.float32 if loss_B.device.type == "mps" else torch.float64
    zeros_D = torch.zeros(len(ids_D), dtype=dtype, device=loss_B.device)
    loss_B = loss_B.detach().to(dtype)
    ones_B = torch.ones_like(loss_B)
    if mask_B is not None:
        loss_B, ones_B = loss_B.where(mask_B, 0.0), mask_B.to(dtype)
    return DomainSums(
        ids_D,
        sum_D=zeros_D.index_add(0, index_B, loss_B),
        count_D=zeros_D.index_add(0, index_B, ones_B),
    )


def domain_index(domains_B: Tensor, num_domains: int | None) -> tuple[Tensor, Tensor]:
    """Ids in play and the position of every sample's domain among them: (ids_D, index_B).

    With ``num_domains`` the ids are 0..num_domains-1, present or not, and nothing waits for the device. Without,
    they are those that occur, whatever their values.
    """
    if num_domains is None:
        return torch.unique(domains_B, sorted=True, return_inverse=True)
    return torch.arange(num_domains, device=domains_B.device), domains_B


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
