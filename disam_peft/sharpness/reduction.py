"""Gradients over ranks, for models that no wrapper reduces. Adapters are small: one flat buffer, one collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.sharpness.perturbation import by_device_and_dtype, flatten, unflatten


@torch.no_grad()
def reduce_gradients_(params: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Add up ``.grad`` over the ranks, in place. A gradient that no rank has stays None; one that some ranks lack
    counts as zero there, so that every rank ends with the same bits."""
    for members in by_device_and_dtype(params):
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
        used = torch.tensor([p.grad is not None for p in members], dtype=members[0].dtype, device=members[0].device)
        flat = torch.cat([flatten(gradients), used])
        dist.all_reduce(flat, group=group)
        summed, times_used = flat[: -len(members)], flat[-len(members) :].tolist()
        for p, gradient, times in zip(members, unflatten(summed, members), times_used, strict=True):
            p.grad = gradient if times > 0 else None


def check_replicas_agree(norm: Tensor, group: dist.ProcessGroup | None) -> None:
    """All ranks must hold the same reduced gradient; asked once, at the first step.

    Raises:
        ValueError: they do not, so each rank would perturb, and train, a model of its own.
    """
    bounds = torch.stack([norm, -norm])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = bounds[0].item(), -bounds[1].item()
    if largest - smallest > 1e-3 * abs(largest):
        raise ValueError(
            f"the gradients differ between ranks (norms from {smallest:.6g} to {largest:.6g}): nobody reduces them; "
            "wrap the model in DistributedDataParallel, or give DISAM reduce_gradients=True"
        )
