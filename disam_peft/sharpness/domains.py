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


def ascent_weights(mean_D: Tensor, count_D: Tensor, variance_weight: float | Tensor) -> Tensor:
    """Weight c_d of each sample of domain d in the ascent gradient ``sum_i c_d(i) grad l_i``.

    The gradient of ``mean(l) - lambda * Var(L)`` with the population variance over the K domains present is linear
    in the samples' gradients, with ``c_d = 1/N - (2 lambda / K) (L_d - mean_d L_d) / n_d`` (arXiv 2405.18861, Eq. 6-8).
    So pass 1 needs one backward and no graph through the variance. ``n_d c_d`` are the domain weights w_d; they sum to
    one, and one is negative where ``L_d - Lbar > n_d K / (2 lambda N)``.

    Args:
        mean_D: mean loss per domain, (D,) or (..., D) for several models at once; ignored (may be NaN) where the count
            is 0.
        count_D: samples per domain, (D,); floating point, so that nothing is rounded to float32 on the way.
        variance_weight: lambda; 0 gives 1/N throughout, exactly. A tensor that broadcasts to ``mean_D`` gives each
            model its own.

    Returns:
        ``mean_D``'s shape and dtype; 0 for absent domains.
    """
    present_D = count_D > 0
    # in the losses' own dtype: dividing a number by an integer tensor would silently round to float32
    num_present = present_D.sum().to(mean_D.dtype)
    mean_D = torch.where(present_D, mean_D, torch.zeros_like(mean_D))
    grand_mean = mean_D.sum(dim=-1, keepdim=True) / num_present
    safe_count_D = torch.where(present_D, count_D, torch.ones_like(count_D))
    pull_D = (2.0 * variance_weight / num_present) * (mean_D - grand_mean) / safe_count_D
    # with lambda = 0 the pull must vanish even where a loss is inf (0 * inf would be NaN)
    if isinstance(variance_weight, Tensor):
        pull_D = torch.where(variance_weight != 0, pull_D, torch.zeros_like(pull_D))
    elif variance_weight == 0:
        pull_D = torch.zeros_like(pull_D)
    weight_D = 1.0 / count_D.sum() - pull_D
    return torch.where(present_D, weight_D, torch.zeros_like(weight_D))


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
