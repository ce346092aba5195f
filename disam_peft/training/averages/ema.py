"""Exponential moving average of the trained weights. T iterates, P parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from disam_peft.config.average import EmaConfig
from disam_peft.training.averages.base import Average, averages_of_rows
from disam_peft.training.averages.flat_weights import FlatWeights, count_on, number_on


class Ema(Average):
    """``average <- decay * average + (1 - decay) * w`` after each step that was taken.

    The first step copies the weights, and there is no bias correction, as in ``torch.optim.swa_utils``.
    """

    kind: ClassVar[str] = "ema"

    def __init__(self, config: EmaConfig, params: Sequence[Tensor], steps: int) -> None:
        self._average = FlatWeights(params)
        self._share, self._whole = number_on(params, 1.0 - config.decay), number_on(params, 1.0)
        self._updates = count_on(params)

    def update(self, params: Sequence[Tensor], applied: Tensor) -> None:
        self._average.move(params, torch.where(self._updates == 0, self._whole, self._share), applied)
        self._updates += applied

    def tensors(self) -> list[Tensor]:
        return self._average.tensors()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average.state_dict(), "updates": self._updates.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._average.load_state_dict(state["average"])
        self._updates.copy_(state["updates"])


def ema(params_TP: Tensor, decay: float) -> Tensor:
    """The exponential moving average after each row of a history of weights.

    Returns:
        (T, P): row s is the average of the rows up to s; row 0 is that of ``params_TP``.
    """
    average = Ema(EmaConfig(decay=decay), [params_TP[0]], len(params_TP))
    return averages_of_rows(average, params_TP)
