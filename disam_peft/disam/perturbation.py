"""Perturb exactly these parameters, and restore them bit for bit on every way out.

Everything works on one flat buffer per device and dtype: adapters are many small tensors, and a loop over them costs
more than the arithmetic. Of a sharded parameter the buffer holds this rank's shard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor

from disam_peft.disam.sharding import joined_over_shards, largest_over_shards, layout, local


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, on this rank, in one new 1-D tensor."""
    return torch.cat([local(t).reshape(-1) for t in tensors])


def filled(params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients, with zeros in place of None."""
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)]


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat`` with the shapes of ``like`` (plain tensors)."""
    return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in like]), like, strict=True)]


def by_device_and_dtype(params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups that fit one flat buffer each; nearly always one. (Those of another sharding are another group.)"""
    groups: dict[tuple[object, ...], list[Tensor]] = {}
    for p in params:
        groups.setdefault((p.device, p.dtype, layout(p)), []).append(p)
    return list(groups.values())


class restored(AbstractContextManager[None]):
    """On exit, by whatever way, every one of ``params`` holds the bits that it held on entry.

    The perturbation belongs *inside* the block: an interrupt between entry and the first line of the block then finds
    weights that nobody touched yet.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._groups = by_device_and_dtype(params)
        self._snapshots: list[Tensor] = []

    def __enter__(self) -> None:
        self._snapshots = [flatten(group) for group in self._groups]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.copy_back()

    @torch.no_grad()
    def copy_back(self) -> None:
        """Restore now, if entered. Whoever must survive an interrupt *during* the exit calls it once more."""
        for group, snapshot in zip(self._groups, self._snapshots, strict=bool(self._snapshots)):
            # copy back, not subtract: (w + e) - e != w in floating point
            shards = [local(p) for p in group]
            torch._foreach_copy_(shards, unflatten(snapshot, shards))


class AscentDirection:
    """The gradient of the ascent objective, as the direction of a perturbation of norm rho.

    ``e = rho g / ||g||`` (SAM), or ``e = rho w^2 g / || |w| g ||`` (ASAM, arXiv 2102.11600, without its eta). SAGM goes
    back along the gradient itself: ``e = (rho / ||g|| - alpha) g``, adaptive ``(rho / || |w| g || - alpha) w^2 g``.
    Where the norm is zero or not finite, e is zero: the weights never hold a NaN.

    A norm squares its entries, and in float32 squares of entries below 1e-19 are rounded or vanish, as those above 1e19
    overflow. Where the norm leaves that range, the gradient is divided by its largest entry first.

    Args:
        params: the parameters to perturb.
        gradients: one for each, at any common loss scale (e does not depend on it); None counts as zero.
        adaptive: ASAM.
        back: SAGM's alpha at the loss scale of the gradients, that is divided by it, shape (). Unset: 0.
        rho_factors: parameter -> by which rho is multiplied there, while the norm stays that over all. Those that are
            left out have 1.

    Attributes:
        norm: ``||g||``, or ``|| |w| g ||`` if adaptive, at the loss scale of the gradients, over all shards; shape ().
        is_finite: shape (), bool, on the device.
    """

    @torch.no_grad()
    def __init__(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        *,
        adaptive: bool,
        back: Tensor | None = None,
        rho_factors: Mapping[Tensor, float] | None = None,
    ) -> None:
        gradient_of = dict(zip(params, gradients, strict=True))
        self._groups = by_device_and_dtype(params)
        self._back, self._rho_factors = back, rho_factors or {}
        found = [flatten(filled(group, [gradient_of[p] for p in group])) for group in self._groups]
        self._directions, self.norm = self._measured(found, adaptive)
        self._scaled_norm, self._divisor = self.norm, torch.ones_like(self.norm)
        in_range = self._is_in_range(self.norm)
        if self.norm.device.type != "cpu" or not in_range:  # asking a GPU would wait for it
            largest = torch.where(in_range, torch.ones_like(self.norm), self._largest(found))
            found = [gradient / largest.to(gradient) for gradient in found]
            self._directions, self._scaled_norm = self._measured(found, adaptive)
            self.norm, self._divisor = self._scaled_norm * largest, largest
        self.is_finite = torch.isfinite(self._scaled_norm)

    def _measured(self, gradients: Sequence[Tensor], adaptive: bool) -> tuple[list[Tensor], Tensor]:
        """The directions of these gradients, one for each group, and the norm that they are divided by."""
        directions: list[Tensor] = []
        norms: list[Tensor] = []
        for group, gradient in zip(self._groups, gradients, strict=True):
            if adaptive:
                weights = flatten(group)
                norm = torch.linalg.vector_norm(weights * gradient)
                directions.append(weights.square().mul_(gradient))
            else:
                norm = torch.linalg.vector_norm(gradient)
                directions.append(gradient)
            norms.append(joined_over_shards(norm, like=group[0]))
        return directions, _joined_norm(norms)

    def _is_in_range(self, norm: Tensor) -> Tensor:
        """Whether a norm is right, shape (): no square has overflowed, and none that counts has vanished."""
        size = sum(p.numel() for group in self._groups for p in group)
        kinds = [torch.finfo(group[0].dtype) for group in self._groups]
        least = max(math.sqrt(size * kind.tiny / kind.eps) for kind in kinds)
        return torch.isfinite(norm) & (norm > least)

    def _largest(self, gradients: Sequence[Tensor]) -> Tensor:
        """The largest absolute value, shape (); 1 where it is zero or not finite."""
        found = [
            largest_over_shards(torch.linalg.vector_norm(gradient, math.inf), like=group[0])
            for group, gradient in zip(self._groups, gradients, strict=True)
        ]
        largest = torch.stack([value.to(self.norm) for value in found]).amax()
        return torch.where(torch.isfinite(largest) & (largest > 0), largest, torch.ones_like(largest))

    @torch.no_grad()
    def add_(self, rho: float) -> None:
        """w <- w + e, in place; without waiting for the device."""
        for group, step in zip(self._groups, self._steps(rho), strict=True):
            shards = [local(p) for p in group]
            torch._foreach_add_(shards, unflatten(step, shards))

    def _steps(self, rho: float) -> list[Tensor]:
        """e, flat, one for each group."""
        # tested as norm > 0, not as norm + 1e-12: that would be 0 / 0 in half precision
        usable = self.is_finite & (self._scaled_norm > 0)
        steps: list[Tensor] = []
        for group, direction in zip(self._groups, self._directions, strict=True):
            size = (rho / self._scaled_norm).to(direction.device)
            step = direction * size
            if any(p in self._rho_factors for p in group):
                factors = [self._rho_factors.get(p, 1.0) for p in group]
                torch._foreach_mul_(unflatten(step, [local(p) for p in group]), factors)
            if self._back is not None:
                step.sub_(direction * (self._back * self._divisor).to(direction))
            steps.append(torch.where(usable.to(direction.device), step, torch.zeros_like(direction)))
        return steps

    @torch.no_grad()
    def cosine(self, other: AscentDirection) -> Tensor:
        """Cosine between two directions over the same unsharded parameters; shape (), NaN where one of them is zero."""
        pairs = list(zip(self._directions, other._directions, strict=True))
        dot = torch.stack([(a @ b).to(self.norm) for a, b in pairs]).sum()
        lengths = [_joined_norm([torch.linalg.vector_norm(v) for v in side]) for side in zip(*pairs, strict=True)]
        return dot / (lengths[0] * lengths[1])


@torch.no_grad()
def perturbations(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, alpha: float = 0.0, *, adaptive: bool = False
) -> list[Tensor]:
    """e of SAM, and of SAGM where alpha is not 0: ``(rho / ||g|| - alpha) g``, one tensor for each of ``weights``.

    Args:
        weights: w, tensors of any shapes; the norm is over all of them together.
        gradients: g, of the ascent objective, one for each.
        rho: radius.
        alpha: of SAGM (Wang et al., CVPR 2023, arXiv 2303.11851); 0 is SAM.
        adaptive: ``(rho / || |w| g || - alpha) w^2 g``.
    """
    back = weights[0].new_tensor(alpha) if alpha else None
    direction = AscentDirection(weights, gradients, adaptive=adaptive, back=back)
    step_of: dict[Tensor, Tensor] = {}
    for group, step in zip(direction._groups, direction._steps(rho), strict=True):
        step_of.update(zip(group, unflatten(step, group), strict=True))
    return [step_of[w] for w in weights]


def _joined_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of a vector from the norms of its parts."""
    if len(norms) == 1:
        return norms[0]
    widest = max((n.dtype for n in norms), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, widest) for n in norms]))
