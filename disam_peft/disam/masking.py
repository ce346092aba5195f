"""Masked samples that are not finite, kept out of the gradient.

A masked loss is replaced by 0, so its gradient is 0. That is not enough where the sample is infinite or NaN, because
0 times infinity is NaN, and sums over the batch carry it into the gradient of every weight. So the values that the
backward pass reads, and the gradients between its operations, are set to 0 where they are not finite and belong to a
masked sample.

They belong to one where the tensor's first or second dimension is the batch, or counts several rows for each sample one
sample after the other (heads, tokens). What lies otherwise is left as it is: then the gradient is not finite, and the
step says so. Shapes in this file: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_LEAF = "AccumulateGrad"


def hides_infinity(loss_B: Tensor, mask_B: Tensor) -> bool:
    """Whether a masked sample's loss is not finite. Waits for the device."""
    return bool((~torch.isfinite(loss_B.detach()) & ~mask_B).any())


def finite_where_masked(mask_B: Tensor) -> saved_tensors_hooks:
    """A context for a forward pass: what it keeps for the backward pass is finite for masked samples."""

    def kept(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if not tensor.requires_grad and not bool((tensor.isnan() | tensor.isposinf()).any()):
            return tensor  # minus infinity alone is what attention masks consist of
        return _cleaned(tensor, mask_B, ~tensor.isfinite())

    return saved_tensors_hooks(kept, lambda tensor: tensor)


def guard_gradients(loss_B: Tensor, mask_B: Tensor) -> None:
    """Let no gradient that is not finite pass from a masked sample to the weights in the backward pass of a graph."""

    def cleaned(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(g if g is None else _cleaned(g, mask_B, ~g.isfinite()) for g in gradients)

    for node in _nodes(loss_B):
        if node.name().rpartition("::")[2] != _LEAF:  # there the sum over the samples has been taken
            node.register_prehook(cleaned)


def _cleaned(tensor: Tensor, mask_B: Tensor, faulty: Tensor) -> Tensor:
    """``tensor`` with 0 where it is faulty and a masked sample's."""
    size = len(mask_B)
    for dimension in range(min(2, tensor.ndim)):
        length = tensor.shape[dimension]
        if length and length % size == 0:
            hidden = (~mask_B).to(tensor.device).repeat_interleave(length // size)
            hidden = hidden.view(-1, *[1] * (tensor.ndim - dimension - 1))
            return tensor.masked_fill(hidden & faulty, 0.0)
    return tensor


def _nodes(tensor: Tensor) -> Iterator[torch.autograd.graph.Node]:
    waiting, seen = [tensor.grad_fn], set[torch.autograd.graph.Node]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
