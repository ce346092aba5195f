"""Masked samples that are not finite, kept out of the gradient.

A masked loss is replaced by 0, so its gradient is 0. That is not enough where the sample, or a derivative at it, is
infinite or NaN: 0 times infinity is NaN, and sums over the batch carry it into the gradient of every weight. So the
values that the backward pass reads, and the gradients between its operations, are set to 0 where they are not finite
and belong to a masked sample. The loss does not tell whether there are any: tanh of infinity is 1.

They belong to one where the tensor's first or second dimension is the batch, or counts several rows for each sample one
sample after the other (heads, tokens). What lies otherwise is left as it is: then the gradient is not finite, and the
step says so. So are tensors of 0 and minus infinity alone, which attention masks are. Shapes in this file: B samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, saved_tensors_hooks

_LEAF = "AccumulateGrad"
# What follows these on the way to a leaf is the leaf's own gradient, in another shape or type.
_OF_THE_LEAF = frozenset(
    f"{name}Backward0" for name in ("T", "Transpose", "Permute", "View", "Unsqueeze", "Squeeze", "Alias", "ToCopy")
)
_MODIFIED = "a tensor that the backward pass needs was modified in place after the forward pass had used it"


class Watch:
    """Sees whether a forward pass under ``hooks`` keeps anything for the backward pass that is not finite.

    Args:
        mask_B: False for the samples that count nowhere.
    """

    def __init__(self, mask_B: Tensor) -> None:
        self._mask_B = mask_B
        self._seen: dict[torch.device, Tensor] = {}

    def hooks(self) -> saved_tensors_hooks:
        """The context for the forward pass, which does not wait for the device."""
        return saved_tensors_hooks(self._kept, _given_back)

    def hides(self, loss_B: Tensor) -> bool:
        """Whether something that is not finite was kept, or is the loss of a masked sample. Waits for the device."""
        found = (~torch.isfinite(loss_B.detach()) & ~self._mask_B).any()
        for seen in self._seen.values():
            found = found | seen.to(found.device)
        return bool(found)

    def _kept(self, tensor: Tensor) -> tuple[Tensor, int]:
        if _is_looked_at(tensor):
            with torch.no_grad():
                found = ~tensor.isfinite().all() & ~_may_be_attention_mask(tensor, self._mask_B)
                seen = self._seen.get(tensor.device)
                self._seen[tensor.device] = found if seen is None else seen | found
        return tensor, tensor._version


def _given_back(kept: tuple[Tensor, int]) -> Tensor:
    tensor, version = kept  # autograd itself checks the version only where no hooks are
    if tensor._version != version:
        raise RuntimeError(_MODIFIED)
    return tensor


def finite_where_masked(mask_B: Tensor) -> saved_tensors_hooks:
    """A context for a forward pass: what it keeps for the backward pass is finite for masked samples."""

    def kept(tensor: Tensor) -> Tensor:
        if not _is_looked_at(tensor):
            return tensor
        with torch.no_grad():
            faulty = ~tensor.isfinite()
            if not tensor.requires_grad and not bool((tensor.isnan() | tensor.isposinf()).any()):
                # of minus infinity alone: a masked sample's only where no other sample has it as well
                hidden = next(_hidden(tensor, mask_B), faulty)
                if bool((faulty & ~hidden).any()) or bool(_may_be_attention_mask(tensor, mask_B)):
                    return tensor
        return _cleaned(tensor, mask_B, faulty)

    return saved_tensors_hooks(kept, lambda tensor: tensor)


def guard_gradients(roots: Sequence[Tensor], mask_B: Tensor) -> None:
    """Let no gradient that is not finite pass from a masked sample to the weights in the backward pass of a graph."""

    def cleaned(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return tuple(g if g is None else _cleaned(g, mask_B, ~g.isfinite()) for g in gradients)

    for node in _nodes(roots):
        if not _is_of_a_leaf(node):  # there the sum over the samples has been taken
            node.register_prehook(cleaned)


def _is_looked_at(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.is_floating_point() and tensor.element_size() > 1


def _may_be_attention_mask(tensor: Tensor, mask_B: Tensor) -> Tensor:
    """(): whether all values are 0 or minus infinity. Where no sample counts it makes no difference, and is False."""
    only = ((tensor == 0) | tensor.isneginf()).all()
    return only & mask_B.any().to(tensor.device)


def _hidden(tensor: Tensor, mask_B: Tensor) -> Iterator[Tensor]:
    """Where the masked samples are, for each dimension that may be the batch; can be broadcast to ``tensor``."""
    size = len(mask_B)
    for dimension in range(min(2, tensor.ndim)):
        length = tensor.shape[dimension]
        if size and length and length % size == 0:
            hidden = (~mask_B).to(tensor.device).repeat_interleave(length // size, output_size=length)
            yield hidden.view(-1, *[1] * (tensor.ndim - dimension - 1))


def _cleaned(tensor: Tensor, mask_B: Tensor, faulty: Tensor) -> Tensor:
    """``tensor`` with 0 where it is faulty and a masked sample's."""
    hidden = next(_hidden(tensor, mask_B), None)
    return tensor if hidden is None else tensor.masked_fill(hidden & faulty, 0.0)


def _is_of_a_leaf(node: Node) -> bool:
    while _short(node) in _OF_THE_LEAF and len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return _short(node) == _LEAF


def _short(node: Node) -> str:
    return node.name().rpartition("::")[2]


def _nodes(roots: Sequence[Tensor]) -> Iterator[Node]:
    waiting, seen = [root.grad_fn for root in roots], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]
