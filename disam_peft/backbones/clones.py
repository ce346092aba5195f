"""A module that shares its parameters with another."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def shallow_clone(module: nn.Module, **children: nn.Module) -> Any:
    """A module with the same parameters, hooks and flags, in which some children are exchanged.

    It is built for one call: what an adapter or ``train()`` changes later would not reach a clone that is kept.
    """
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone
