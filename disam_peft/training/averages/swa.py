"""Stochastic weight averaging: the plain mean of iterates. T iterates, P parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from disam_peft.config.average import SwaConfig
from disam_peft.training.averages.base import Average, averages_of_rows
from disam_peft.training.averages.flat_weights import FlatWeights, count_on, number_on


class Swa(Average):
    """The mean of every ``every``-th iterate of the last part of the run, the last iterate included.

    A skipped step counts as a step of the run, and its weights enter no mean. Before the first iterate that enters
    there is nothing to judge.
    """

    kind: ClassVar[str] = "swa"

    def __init__(self, config: SwaConfig, params: Sequence[Tensor], steps: int) -> None:
        self._config, self._steps, self._step = config, steps, 0
        self._first = config.first_step(steps)
        self._mean = FlatWeights(params)
        self._count, self._one = count_on(params), number_on(params, 1.0)

    def update(self, params: Sequence[Tensor], applied: Tensor) -> None:
        self._step += 1
        if self._step < self._first or (self._steps - self._step) % self._config.every:
            return
        # Where all iterates so far were skipped, it holds the weights as they are.
        self._mean.move(params, self._one / (self._count + 1), applied | (self._count == 0))
        self._count += applied

    def is_judged(self, step: int) -> bool:
        return step == self._steps or (self._config.judged == "always" and step >= self._first)

    def tensors(self) -> list[Tensor]:
        return self._mean.tensors()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean.state_dict(), "count": self._count.clone(), "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean.load_state_dict(state["mean"])
        self._count.copy_(state["count"])
        self._step = int(state["step"])


def swa(params_TP: Tensor, start: float = 0.75, every: int = 1) -> Tensor:
    """The mean of every ``every``-th row after the share ``start`` of all rows, counted back from the last row.

    Returns:
        (P,).
    """
    average = Swa(SwaConfig(start=start, every=every), [params_TP[0]], len(params_TP))
    return averages_of_rows(average, params_TP)[-1]
