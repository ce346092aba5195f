"""What may be trained by a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from disam_peft.disam.sharding import is_sharded, local


def trainable_with_rho(
    params: Iterable[Tensor] | Iterable[Mapping[str, Any]], rho: float
) -> tuple[list[Tensor], dict[Tensor, float]]:
    """The trained ones of ``params``, and parameter -> factor on ``rho`` where a group of them has a rho of its own.

    Raises:
        ValueError: see ``trainable``; tensors and groups together, a group with other keys than ``params`` and ``rho``,
            a rho that is negative or not finite, or one beside ``rho`` 0, of which no factor makes it.
    """
    found: list[Any] = list(params)
    if not any(isinstance(group, Mapping) for group in found):
        return trainable(found), {}
    members: list[Tensor] = []
    factors: dict[Tensor, float] = {}
    for number, group in enumerate(found):
        if not isinstance(group, Mapping) or "params" not in group or group.keys() - {"params", "rho"}:
            found_here = ", ".join(map(repr, group)) if isinstance(group, Mapping) else f"a {type(group).__name__}"
            raise ValueError(
                f"params[{number}] must be a group with the keys 'params' and, if need be, 'rho', not {found_here}"
            )
        of_group = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        members += of_group
        if "rho" in group:
            factors.update(dict.fromkeys(of_group, _factor(group["rho"], rho, number)))
    chosen = trainable(members)
    return chosen, {p: factors[p] for p in chosen if p in factors and factors[p] != 1}


def _factor(rho_of_group: Any, rho: float, number: int) -> float:
    try:
        value = float(rho_of_group)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"params[{number}]: rho must be a finite number >= 0, not {rho_of_group!r}")
    if rho == 0:
        raise ValueError(
            f"params[{number}] has a rho of {value:g}, and rho is 0, which is the plain gradient for all parameters; "
            "give the rho of the other groups"
        )
    return value / rho


def trainable(params: Iterable[Tensor]) -> list[Tensor]:
    """Those of ``params`` that require a gradient.

    Raises:
        ValueError: there is none; one that the step cannot perturb.
    """
    found = list(params)
    for p in found:
        if not isinstance(p, Tensor):
            raise ValueError(
                f"params must be tensors, not {type(p).__name__}; pass model.parameters(), or groups of them, not names"
            )
    chosen = [p for p in found if p.requires_grad]
    if not chosen:
        raise ValueError(f"none of the {len(found)} parameters requires a gradient: there is nothing to train")
    if len({id(p) for p in chosen}) != len(chosen):
        raise ValueError("a parameter appears twice in params")
    _require_memory_of_their_own(chosen)
    for p in chosen:
        if not p.is_leaf:
            raise ValueError(f"a parameter of shape {tuple(p.shape)} is the result of a computation, not a leaf")
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"a trained parameter is {str(p.dtype).removeprefix('torch.')}: w + e rounds back to w there; "
                "keep what is trained in float32 and use autocast"
            )
    return chosen


def _require_memory_of_their_own(params: Sequence[Tensor]) -> None:
    """Two parameters over the same memory would be perturbed, and stepped, twice."""
    # there is no memory, and the address 0, behind empty tensors and the meta device
    found = [(str(p.device), local(p).data_ptr(), p) for p in params if p.numel() and local(p).data_ptr()]
    for (device, begin, first), (other, start, second) in pairwise(sorted(found, key=lambda place: place[:2])):
        # a tensor with gaps may lie between the rows of another one, so that only equal addresses are sure
        overlap = start < begin + local(first).nbytes and _is_dense(first) and _is_dense(second)
        if device == other and (start == begin or overlap):
            raise ValueError(
                f"two parameters, of shapes {tuple(first.shape)} and {tuple(second.shape)}, share their memory: each "
                "would be perturbed and trained by itself; tie weights by using one Parameter in both places"
            )


def _is_dense(p: Tensor) -> bool:
    shard = local(p)
    last = sum((size - 1) * stride for size, stride in zip(shard.shape, shard.stride(), strict=True))
    return last + 1 == shard.numel()


def all_sharded(params: Sequence[Tensor], *, reduce_gradients: bool, ascent_cosine: bool) -> bool:
    """Whether the parameters are sharded.

    Raises:
        ValueError: some are and some are not; an option that sharded parameters exclude.
    """
    num_sharded = sum(is_sharded(p) for p in params)
    if num_sharded == 0:
        return False
    if num_sharded < len(params):
        raise ValueError(
            f"{num_sharded} of {len(params)} parameters are sharded: FSDP would reduce their gradients and nobody the "
            "others'; shard all that is trained, or none of it (fully_shard's ignored_params) with reduce_gradients"
        )
    if reduce_gradients:
        raise ValueError("the parameters are sharded and FSDP reduces their gradients: leave reduce_gradients False")
    if ascent_cosine:
        raise ValueError("ascent_cosine needs a second backward through one graph, which sharded parameters forbid")
    return True
