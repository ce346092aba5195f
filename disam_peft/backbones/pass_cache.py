"""Outputs of the frozen layers inside the first trained block, kept from pass 1 of a step for pass 2.

The frozen part of a tower ends in the middle of the first block that is trained: the first norm of that block and the
base layers of its projections see the same tensors in every pass of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.backbones.blocks import shallow_clone


class Call:
    """One call of a layer: its arguments and its result. It is valid as long as nobody changes them in place.

    Args:
        called_with: the arguments; tensors, and values that can be compared.
        returned: the result; a tensor, or a tuple that contains tensors.
    """

    def __init__(self, called_with: Sequence[Any], returned: Any) -> None:
        self.called_with, self.returned = [*called_with, *_autocast_of(called_with)], returned
        self._tensors = [value for value in (*called_with, *_flat(returned)) if isinstance(value, Tensor)]
        self._versions = [tensor._version for tensor in self._tensors]

    def is_of(self, called_with: Sequence[Any]) -> bool:
        """Whether the layer would return the same result again: it is called with the same tensor objects, unchanged
        since, and with equal other values."""
        now = [*called_with, *_autocast_of(called_with)]
        return (
            len(now) == len(self.called_with)
            and all(_is_same(a, b) for a, b in zip(self.called_with, now, strict=True))
            and self._versions == [tensor._version for tensor in self._tensors]
        )


PassCache = dict[str, Call]
"""Path of a layer -> its last call. The caller keeps it while no frozen weight changes, which is for one step."""


def with_cache(block: nn.Module, cache: PassCache) -> nn.Module:
    """A clone of ``block``, with the same parameters, whose frozen layers look for their result in ``cache`` first.

    A cached result is used only if the layer is called with the same tensor objects as before, unchanged, under the
    same autocast, and none of them has a graph. So it is exact whatever an adapter does around the layer; everything
    after a trained weight is computed in every pass. A compiled block is returned as it is, because splitting its
    kernels would cost more than the cache saves.
    """
    return block if block._compiled_call_impl is not None else _clone(block, cache, "")


def _clone(module: nn.Module, cache: PassCache, path: str) -> nn.Module:
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters) and not _draws(module):
        return _cached(module, cache, path)
    children = {name: _clone(child, cache, f"{path}.{name}") for name, child in module.named_children()}
    return shallow_clone(module, **children)


def _cached(module: nn.Module, cache: PassCache, path: str) -> nn.Module:
    # A clone and not a wrapper, because adapters ask their base layer for its class and weights.
    clone: Any = copy.copy(module)
    compute: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *(item for pair in sorted(kwargs.items()) for item in pair)]
        tensors = [value for value in values if isinstance(value, Tensor)]
        # A result that was computed in inference mode could not be used in training.
        inference = torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors)
        if inference or any(tensor.requires_grad for tensor in tensors):
            return compute(*args, **kwargs)
        before = cache.get(path)
        if before is None or not before.is_of(values):
            before = cache[path] = Call(values, compute(*args, **kwargs))
        return before.returned

    clone.forward = forward
    return clone


def _flat(returned: Any) -> Sequence[Any]:
    return returned if isinstance(returned, tuple) else (returned,)


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b))


def _autocast_of(values: Sequence[Any]) -> list[Any]:
    """The autocast precision in which a layer computes on these values; None without autocast."""
    devices = {value.device.type for value in values if isinstance(value, Tensor)}
    return [torch.get_autocast_dtype(one) if torch.is_autocast_enabled(one) else None for one in sorted(devices)]


def _draws(module: nn.Module) -> bool:
    """Whether the module draws random numbers. It must then run in every pass, or later draws would be different."""
    return any(isinstance(part, nn.modules.dropout._DropoutNd) and part.training for part in module.modules())
