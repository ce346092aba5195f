"""Beta moving average: iterates weigh as a Beta distribution over the run says. T iterates, P parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from disam_peft.config.average import BmaConfig
from disam_peft.training.averages.base import Average, averages_of_rows
from disam_peft.training.averages.flat_weights import FlatWeights, number_on


class Bma(Average):
    """``sum_s a_s w_s / sum_s a_s`` over the weights w_s after step s, with a_s from ``beta_weight``; w_0 are the
    weights before the first step.

    s counts all steps of the run, so that the last one has the weight that it should have. The weights after a skipped
    step do not enter, nor does their a_s.
    """

    kind: ClassVar[str] = "bma"

    def __init__(self, config: BmaConfig, params: Sequence[Tensor], steps: int) -> None:
        self._config, self._steps, self._step = config, steps, 0
        self._mean = FlatWeights(params)
        self._sum = number_on(params, beta_weight(0, config.beta, steps))

    def update(self, params: Sequence[Tensor], applied: Tensor) -> None:
        self._step += 1
        weight = beta_weight(self._step, self._config.beta, self._steps)
        summed = self._sum + weight
        # Far from the middle a density with a large beta is 0 as a number, and 0 / 0 would make all averages NaN.
        self._mean.move(params, torch.where(summed > 0, weight / summed, 1.0), applied)
        self._sum = torch.where(applied, summed, self._sum)

    def is_judged(self, step: int) -> bool:
        return step == self._steps or self._config.judged == "always"

    def tensors(self) -> list[Tensor]:
        return self._mean.tensors()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean.state_dict(), "sum": self._sum.clone(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean.load_state_dict(state["mean"])
        self._sum = state["sum"].to(self._sum.device)
        self._step = int(state["step"])


def beta_weight(step: int, beta: float, total_steps: int) -> float:
    """The weight of the iterate after step ``step`` of ``total_steps``: the density of Beta(beta, beta) at
    (step + 0.5) / (total_steps + 1)."""
    place = (step + 0.5) / (total_steps + 1)
    scale = math.lgamma(2 * beta) - 2 * math.lgamma(beta)
    return math.exp(scale + (beta - 1) * (math.log(place) + math.log1p(-place)))


def beta_moving_average(params_TP: Tensor, beta: float, total_steps: int) -> tuple[Tensor, Tensor]:
    """The beta moving average after each row of a history of weights.

    Args:
        params_TP: the weights before the first step, then those after each step that was done.
        total_steps: of the whole run, which may be longer than the history.

    Returns:
        The averages (T, P), and the weight of each row (T,), float64.
    """
    average = Bma(BmaConfig(beta=beta), [params_TP[0]], total_steps)
    later_TP = averages_of_rows(average, params_TP[1:])
    weights_T = [beta_weight(step, beta, total_steps) for step in range(len(params_TP))]
    return torch.cat([params_TP[:1], later_TP]), torch.tensor(weights_T, dtype=torch.float64)
