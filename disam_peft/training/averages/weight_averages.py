"""All averages of a run, and the weights for which they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from disam_peft.common.records import RAW
from disam_peft.config.average import BmaConfig, EmaConfig, KeptAverageConfig, SwaConfig, SwadConfig, named
from disam_peft.config.base import Config
from disam_peft.disam.perturbation import restored
from disam_peft.errors import UserError
from disam_peft.training.averages.base import Average
from disam_peft.training.averages.bma import Bma
from disam_peft.training.averages.ema import Ema
from disam_peft.training.averages.swa import Swa
from disam_peft.training.averages.swad import Swad
from disam_peft.training.guarded_optimizer import StepOutcome

AVERAGES: dict[type[Config], type[Average]] = {
    EmaConfig: Ema,
    SwaConfig: Swa,
    BmaConfig: Bma,
    SwadConfig: Swad,
}
"""Config class -> average."""


class WeightAverages:
    """The averages that a recipe asks for, each of the same trained tensors.

    Args:
        configs: one for each average.
        params: the trained tensors, on the device where they stay.
        steps: of the whole run.
    """

    def __init__(self, configs: Sequence[KeptAverageConfig], params: Sequence[Tensor], steps: int) -> None:
        self._configs, self._params, self._steps = named(configs), list(params), steps
        self._averages: dict[str, Average] = {}
        self.begin()

    def begin(self) -> None:
        """Forget all: every average begins with what the weights are now."""
        self._averages = {
            name: AVERAGES[type(config)](config, self._params, self._steps) for name, config in self._configs.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._averages)

    def update(self, outcome: StepOutcome) -> None:
        """Take the weights after a step into each average, unless it was skipped. Nothing waits for the device."""
        for average in self._averages.values():
            average.update(self._params, outcome.applied)

    @property
    def needing_validation_loss(self) -> tuple[str, ...]:
        """The names of those that are nothing without ``validated``."""
        return tuple(name for name, average in self._averages.items() if average.needs_validation_loss)

    def validated(self, step: int, loss: float | None) -> None:
        """The weights themselves were validated after ``step``.

        Args:
            loss: see ``Average.validated``; None: the validation does not tell it.

        Raises:
            UserError: an average needs the loss.
        """
        if loss is None:
            if names := self.needing_validation_loss:
                raise UserError(
                    f"the average {names[0]} needs the validation loss, which the validation did not tell; let "
                    "validate return a selection.Validation with loss=..., or keep another average"
                )
            return
        for average in self._averages.values():
            average.validated(step, loss, self._params)

    def judged(self, step: int) -> tuple[str, ...]:
        """The names of the averages that are validated where the weights are validated after ``step``."""
        return tuple(name for name, average in self._averages.items() if average.is_judged(step))

    def about(self) -> dict[str, dict[str, Any]]:
        """What is recorded of each at the end of a run, of those that have something to tell."""
        told = {name: average.about() for name, average in self._averages.items()}
        return {name: values for name, values in told.items() if values}

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
