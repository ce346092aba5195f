"""Transformer blocks of which only the input is kept for backward, which runs them again (Chen et al. 2016, "Training
deep nets with sublinear memory cost", arXiv 1604.06174; "gradient checkpointing")."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_MARK = "_is_recomputed"
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, a tower that runs some of these blocks with a graph keeps nothing but their inputs. The backward pass may
    come later, outside.

    Values and gradients are those of the plain blocks, to the bit where the kernels repeat themselves: backward sees
    the same weights, the same autocast and the same random numbers of torch's generators as the forward pass did, and
    leaves the generators as it found them. So the weights must be the same in a forward pass and in its backward, as
    they are in each pass of a step.
    """
    for block in blocks:
        setattr(block, _MARK, True)
    try:
        yield
    finally:
        for block in blocks:
            delattr(block, _MARK)


def is_recomputed(block: nn.Module) -> bool:
    """Whether a block, or what it is a clone of, is one of ``recomputed`` at the moment."""
    return bool(vars(block).get(_MARK, False))


def where_recomputed(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks for one call, those that are ``recomputed`` as clones that keep only their inputs."""
    return [_keeping_inputs(block) if is_recomputed(block) else block for block in blocks]


def _keeping_inputs(block: nn.Module) -> nn.Module:
    # A clone and not a wrapper, because towers read attributes off their blocks.
    clone: Any = copy.copy(block)
    clone._compiled_call_impl = None  # the block's own is called inside
    for name in _HOOKS:
        setattr(clone, name, OrderedDict())

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return block(*args, **kwargs)
        as_now = copy.copy(block)
        for name in _HOOKS:  # backward may come when some of them, by which prompts enter a block, are gone
            setattr(as_now, name, OrderedDict(getattr(block, name)))
        return checkpoint(as_now, *args, use_reentrant=False, **kwargs)

    clone.forward = forward
    return clone
