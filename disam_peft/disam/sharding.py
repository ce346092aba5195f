"""Parameters that are sharded over ranks (DTensor, as ``torch.distributed.fsdp.fully_shard`` leaves them).

What works element by element works on this rank's shard; only norms need the other ranks. DTensor's own operators
would do as well, but the batched in-place ones are missing (``torch._foreach_copy_`` raises in torch 2.15).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disam_peft.disam.domain_sums import DomainSums


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return False  # without the import, which costs half a second
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, detached and sharing its memory; of a plain tensor all of it."""
    sharded: Any = tensor.detach()
    whole_or_shard: Tensor = sharded.to_local() if is_sharded(sharded) else sharded
    return whole_or_shard


def layout(tensor: Tensor) -> Any:
    """Hashable; equal for tensors whose shards lie alike. None for a plain tensor."""
    sharded: Any = tensor
    return (sharded.device_mesh, tuple(sharded.placements)) if is_sharded(tensor) else None


def joined_over_shards(norm: Tensor, like: Tensor) -> Tensor:
    """The norm of the whole vector from that of this rank's shard of it; ``like`` says how it is sharded."""
    if not is_sharded(like):
        return norm
    return summed_over_shards(norm.double().square(), like).sqrt().to(norm.dtype)


def summed_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """The sum of a number that every rank has of its own shard; ``like`` says how it is sharded."""
    if not is_sharded(like):
        return value
    mesh, placements = layout(like)
    value = value.clone()
    for mesh_dim, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(value, group=mesh.get_group(mesh_dim))
    return value


def largest_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """The largest of a number that every rank has of its own shard; ``like`` says how it is sharded."""
    if not is_sharded(like):
        return value
    mesh, placements = layout(like)
    value = value.clone()
    for mesh_dim, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=mesh.get_group(mesh_dim))
    return value


def perturbation_arrived(sums: DomainSums, perturbed: DomainSums, rise: Tensor) -> bool | None:
    """Whether pass 2 ran on other weights than pass 1; None where this batch cannot tell.

    Where the rise is a good part of the loss, a model whose losses kept their very bits saw the old weights: FSDP
    modules that do not reshard after the backward go on with their unsharded copies, and SAM would silently be SGD.
    Waits for the device.

    Args:
        rise: by how much e changes the ascent objective, to first order, at least: ``rho ||g||`` for SAM.
    """
    rise = rise.to(sums.mean)
    if not bool(rise > 1e-2 * sums.mean.abs()) or not bool(torch.isfinite(perturbed.mean)):
        return None
    return not torch.equal(sums.sum_D, perturbed.sum_D)
