"""What the ranks of one step share: sums of losses, and gradients that no wrapper around the model reduces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.disam.domain_sums import DomainSums
from disam_peft.disam.perturbation import by_device_and_dtype, filled, flatten, unflatten

NoSync = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a batch, and who adds up their gradients.

    Attributes:
        group: their process group; None is the default one.
        size: how many they are; 1 without torch.distributed.
        reduces_here: this step adds up the gradients, in one collective per pass. Otherwise a wrapper around the model
            averages them as they come.
        no_sync: keeps such a wrapper from it.
    """

    group: dist.ProcessGroup | None
    size: int
    reduces_here: bool
    no_sync: NoSync = nullcontext

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, reduces_here: bool, no_sync: NoSync | None = None) -> Ranks:
        """``no_sync``: of a wrapper around the model; with it the gradients are added up here."""
        size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        return cls(group, size, reduces_here or no_sync is not None, nullcontext if no_sync is None else no_sync)

    @property
    def loss_factor(self) -> int:
        """By which a rank's share of a sum over all ranks is multiplied: a wrapper divides by it when it averages."""
        return 1 if self.reduces_here else self.size

    def summed(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks; not in place."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_sums(self, sums: DomainSums) -> DomainSums:
        """The same sums over all ranks: one collective. All ranks must hold the same ``ids_D`` and statistics.

        A loss that is not finite on one rank makes its domain's sum so on all: no flag is needed beside it.
        """
        if self.size == 1:
            return sums
        mine = sums.tensors()
        everybodys = self.summed(torch.cat([tensor.reshape(-1) for tensor in mine]))
        return sums.with_tensors(unflatten(everybodys, mine))

    @torch.no_grad()
    def add_up_gradients_(self, params: Sequence[Tensor]) -> None:
        """Sum ``.grad`` over the ranks, in place, if that is done here. A gradient that no rank has stays None; one
        that some ranks lack counts as zero there, so that every rank ends with the same bits."""
        if self.size == 1 or not self.reduces_here:
            return
        for members in by_device_and_dtype(params):
            used = torch.tensor([p.grad is not None for p in members], dtype=members[0].dtype, device=members[0].device)
            flat = torch.cat([flatten(filled(members, [p.grad for p in members])), used])
            dist.all_reduce(flat, group=self.group)
            summed, times_used = flat[: -len(members)], flat[-len(members) :].tolist()
            for p, gradient, times in zip(members, unflatten(summed, members), times_used, strict=True):
                p.grad = gradient if times > 0 else None

    def added_up(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sum over the ranks of gradients that no wrapper knows of."""
        if self.size == 1:
            return list(gradients)
        return [self.summed(gradient) for gradient in filled(params, gradients)]

    def check_replicas_agree(self, norm: Tensor) -> None:
        """All ranks must hold the same reduced gradient; asked once, at the first step.

        Raises:
            ValueError: they do not, so each rank would perturb, and train, a model of its own.
        """
        bounds = torch.stack([norm, -norm])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        largest, smallest = bounds[0].item(), -bounds[1].item()
        if largest - smallest > 1e-3 * abs(largest):
            raise ValueError(
                f"the gradients differ between ranks (norms from {smallest:.6g} to {largest:.6g}): nobody reduces "
                "them; wrap the model in DistributedDataParallel, or give DISAM reduce_gradients=True"
            )
