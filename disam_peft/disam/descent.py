"""The gradient that a step descends, made of the gradients of both passes.

Below, g1 is the gradient of pass 1 at w (with DISAM that of the ascent objective, which made the perturbation), and g2
is the gradient of pass 2 at w + e. Norms and products are over all trained parameters together, over all shards, and
never adaptive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from disam_peft.disam.perturbation import by_device_and_dtype, filled, flatten, unflatten
from disam_peft.disam.sharding import largest_over_shards, local, summed_over_shards

Descent = Literal["sam", "gsam", "sagm"]
DESCENTS: tuple[str, ...] = get_args(Descent)
PUBLISHED_ALPHA: dict[Descent, float] = {"sam": 0.0, "gsam": 0.4, "sagm": 0.001}
"""What alpha is where nobody says: the example of GSAM's authors, and SAGM's code for PACS, VLCS and TerraIncognita."""


def gsam_gradient(
    first: Sequence[Tensor], second: Sequence[Tensor], alpha: float, *, sharded_like: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """GSAM's gradient ``g2 - alpha (g1 - (g1.g2 / ||g2||^2) g2)``: alpha times the part of g1 that is orthogonal to g2
    is taken away (Zhuang et al., ICLR 2022, arXiv 2203.08065).

    The step descends the loss at the perturbed weights and ascends, where that does not change it, the loss at w: the
    gap between both shrinks. Where g2 is zero all of g1 counts as orthogonal to it, as in the authors' code.

    Args:
        first: g1, one tensor for each parameter or of several parameters, of any shapes.
        second: g2, likewise.
        alpha: 0 gives g2, bit for bit.
        sharded_like: tensors that are sharded over ranks as these are; unset: they are whole.

    Returns:
        One tensor for each of ``second``. Where a number of g1 or g2 is not finite, no number of them is.
    """
    like = second if sharded_like is None else sharded_like
    # squares of entries below 1e-19 vanish in float32, and those above 1e19 overflow: both are made of size 1 first
    first_size, second_size = _largest(first, like), _largest(second, like)
    scaled_first = [a / first_size.to(a) for a in first]
    scaled_second = [b / second_size.to(b) for b in second]
    square = _product(scaled_second, scaled_second, like)
    along = torch.where(square == 0, 0.0, first_size * (_product(scaled_first, scaled_second, like) / square))
    return [
        b - alpha * (a - along.to(b) * of_size_1) for a, b, of_size_1 in zip(first, second, scaled_second, strict=True)
    ]


def sagm_gradient(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """SAGM's gradient ``(g1 + g2) / 2``, as its authors compute it (Wang et al., CVPR 2023, arXiv 2303.11851).

    The paper writes the sum of both: twice the learning rate for SGD, and the same for Adam but for weight decay. The
    other half of SAGM is its perturbation, see ``perturbations``.

    Args:
        first: g1, tensors of any shapes.
        second: g2, likewise.
    """
    return [0.5 * a + 0.5 * b for a, b in zip(first, second, strict=True)]


class FirstGradient:
    """g1, which is kept through pass 2. It is a copy: a wrapper around the model may use the memory again.

    Args:
        params: the trained parameters.
        gradients: g1, one for each, at the loss scale of pass 2 as well; None counts as zero.
    """

    def __init__(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        gradient_of = dict(zip(params, gradients, strict=True))
        self._groups = by_device_and_dtype(params)
        self._used = {p for p, g in gradient_of.items() if g is not None}
        self._flat = [flatten(filled(group, [gradient_of[p] for p in group])) for group in self._groups]

    @torch.no_grad()
    def combine_(self, descent: Descent, alpha: float) -> None:
        """Put the gradient of ``descent`` in the place of g2, which is in ``p.grad``. Where a parameter has no gradient
        in either pass it has none afterwards."""
        second = [flatten(filled(group, [p.grad for p in group])) for group in self._groups]
        if descent == "gsam":
            found = gsam_gradient(self._flat, second, alpha, sharded_like=[group[0] for group in self._groups])
        else:
            found = sagm_gradient(self._flat, second)
        for group, gradient in zip(self._groups, found, strict=True):
            parts = unflatten(gradient, [local(p) for p in group])
            for p, part in zip(group, parts, strict=True):
                if p.grad is None and p in self._used:
                    p.grad = torch.zeros_like(p)
                if p.grad is not None:
                    local(p.grad).copy_(part)


@torch.no_grad()
def poison_unless_(is_finite: Tensor, params: Sequence[Tensor]) -> None:
    """NaN into every gradient where pass 1 overflowed: a loss scaler must see it, pass 2 alone would hide it."""
    factor = torch.where(is_finite, 1.0, math.nan)
    for group in by_device_and_dtype([p.grad for p in params if p.grad is not None]):
        torch._foreach_mul_([local(g) for g in group], factor.to(group[0].device, group[0].dtype))


def _product(some: Sequence[Tensor], others: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """The inner product over all tensors and shards, shape ()."""
    products = [
        summed_over_shards(torch.dot(a.reshape(-1), b.reshape(-1)), like=p)
        for a, b, p in zip(some, others, like, strict=True)
    ]
    widest = max((product.dtype for product in products), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.stack([product.to(products[0].device, widest) for product in products]).sum()


def _largest(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """The largest absolute value over all tensors and shards, shape (); 1 where it is zero or not finite."""
    found = [
        largest_over_shards(torch.linalg.vector_norm(t, math.inf), like=p) for t, p in zip(tensors, like, strict=True)
    ]
    widest = max((value.dtype for value in found), key=lambda dtype: torch.finfo(dtype).bits)
    largest = torch.stack([value.to(found[0].device, widest) for value in found]).amax()
    return torch.where(torch.isfinite(largest) & (largest > 0), largest, torch.ones_like(largest))
