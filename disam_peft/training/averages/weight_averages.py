"""All averages of a run, and the weights for which they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from disam_peft.common.records import RAW
from disam_peft.config.average import AverageConfig, EmaConfig
from disam_peft.config.base import Config
from disam_peft.disam.perturbation import restored
from disam_peft.errors import UserError
from disam_peft.training.averages.base import Average
from disam_peft.training.averages.ema import Ema
from disam_peft.training.guarded_optimizer import StepOutcome

AVERAGES: dict[type[Config], type[Average]] = {
    EmaConfig: Ema,
}
"""Config class -> average."""


class WeightAverages:
    """The averages that a recipe asks for, each of the same trained tensors.

    Args:
        configs: one for each average.
        params: the trained tensors, on the device where they stay.
    """

    def __init__(self, configs: Sequence[AverageConfig], params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._averages = {name: AVERAGES[type(config)](config, params) for name, config in named(configs).items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._averages)

    def update(self, outcome: StepOutcome) -> None:
        """Take the weights after a step into each average, unless it was skipped. Nothing waits for the device."""
        for average in self._averages.values():
            average.update(self._params, outcome.applied)

    @contextmanager
    def in_place_of_weights(self, name: str) -> Iterator[None]:
        """The trained tensors hold this average (``raw``: themselves); on exit they hold their own bits again."""
        if name == RAW:
            yield
            return
        with restored(self._params):
            with torch.no_grad():
                for p, average in zip(self._params, self._averages[name].tensors(), strict=True):
                    p.copy_(average)
            yield

    def state_dict(self) -> dict[str, Any]:
        return {name: average.state_dict() for name, average in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: it is the state of other averages than this run keeps.
        """
        if set(state) != set(self._averages):
            raise UserError(f"its averages differ (here {sorted(self._averages)}; saved {sorted(state)})")
        for name, average in self._averages.items():
            average.load_state_dict(state[name])


def named(configs: Sequence[AverageConfig]) -> dict[str, AverageConfig]:
    """The averages by the name that results give them: their kind, numbered where a kind occurs several times."""
    found: dict[str, AverageConfig] = {}
    for config in configs:
        same = [other for other in found.values() if other.kind == config.kind]
        found[config.kind if not same else f"{config.kind}_{len(same) + 1}"] = config
    return found
