"""The mean of several adapters of one kind, as one adapter (model soups).

Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disam_peft.config.base import Config
from disam_peft.errors import UserError

State = Mapping[str, Tensor]
_OF_THE_START = frozenset({"seed", "init"})
"""Settings that say where training began, and nothing of what an adapter computes."""


def require_same_shape(
    kind: str, configs: Sequence[Config], states: Sequence[State], *, but: frozenset[str] = frozenset()
) -> None:
    """Pass if several adapters compute the same function of their tensors, and have the same tensors.

    Args:
        but: settings that may differ beside those that say where training began.

    Raises:
        UserError: they do not; names the settings or tensors.
    """
    first, *others = (_settings(config, but) for config in configs)
    for number, other in enumerate(others, start=2):
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            told = ", ".join(f"{name}: {first.get(name)} and {other.get(name)}" for name in differing)
            raise UserError(
                f"'{kind}' adapters 1 and {number} differ in {told}; only adapters of equal settings can be averaged"
            )
    names = set(states[0])
    for number, state in enumerate(states[1:], start=2):
        if differing := sorted(names ^ set(state)):
            raise UserError(
                f"'{kind}' adapters 1 and {number} do not have the same tensors ({differing[0]}); only adapters of "
                "equal settings can be averaged"
            )


def _settings(config: Config, but: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in config.model_dump().items() if name not in but | _OF_THE_START}


def mean_of_tensors(kind: str, states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of each tensor, computed in float64.

    Raises:
        UserError: tensors of other shapes.
    """
    found = {}
    for name, tensor in states[0].items():
        shapes = [tuple(state[name].shape) for state in states]
        if len(set(shapes)) > 1:
            raise UserError(
                f"{name} of the '{kind}' adapters has the shapes {shapes}; only adapters of equal shapes can be "
                "averaged"
            )
        mean = torch.stack([state[name].double() for state in states]).mean(dim=0)
        found[name] = mean.to(tensor.dtype)
    return found
