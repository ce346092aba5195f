"""SWAD: the mean of the iterates between the valley of the validation loss and its rise. T iterates, P parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from disam_peft.config.average import SwadConfig
from disam_peft.training.averages.base import Average
from disam_peft.training.averages.flat_weights import FlatWeights, count_on, number_on
from disam_peft.training.averages.loss_valley import CleanValley, LossValley, PublishedValley, Segment, Window

VALLEYS: dict[str, type[LossValley]] = {"clean": CleanValley, "published": PublishedValley}


class Swad(Average):
    """The running mean of the iterates of the present segment, on the device; at each validation the segment is closed
    and goes to the host, where a ``LossValley`` decides what becomes of it.

    A skipped step gives no iterate. A segment without any goes on at the next validation. After the end of the window
    training goes on and nothing here changes; the authors' trainer stops there.
    """

    kind: ClassVar[str] = "swad"
    needs_validation_loss: ClassVar[bool] = True

    def __init__(self, config: SwadConfig, params: Sequence[Tensor], steps: int) -> None:
        self._steps = steps
        self._segment = FlatWeights(params)
        self._count, self._one = count_on(params), number_on(params, 1.0)
        self._first_step = 1
        self._valley = VALLEYS[config.variant](config.n_converge, config.n_tolerance, config.tolerance_ratio)

    def update(self, params: Sequence[Tensor], applied: Tensor) -> None:
        if self._valley.dead_at_step is None:
            self._segment.move(params, self._one / (self._count + 1), applied)
            self._count += applied

    def validated(self, step: int, loss: float, params: Sequence[Tensor]) -> None:
        count = int(self._count)
        if count == 0 or self._valley.dead_at_step is not None:
            return
        mean = [buffer.cpu() for buffer in self._segment.state_dict()]
        last = [buffer.cpu() for buffer in self._segment.flattened(params)]
        self._valley.close(Segment(self._first_step, step, loss, count, mean, last))
        self._count.zero_()
        self._first_step = step + 1

    def is_judged(self, step: int) -> bool:
        return step == self._steps

    def tensors(self) -> list[Tensor]:
        window = self._valley.window()
        if window is None:  # nothing was validated yet
            return self._segment.tensors()
        devices = [buffer.device for buffer in self._segment.buffers]
        buffers = [mean.to(device) for mean, device in zip(window.mean, devices, strict=True)]
        return self._segment.tensors(buffers)

    def about(self) -> dict[str, Any]:
        window = self._valley.window()
        valley = {"converge_step": self._valley.converge_step, "dead_at_step": self._valley.dead_at_step}
        if window is None:
            return valley
        return {**valley, "start_step": window.start_step, "end_step": window.end_step, "averaged": window.count}

    def state_dict(self) -> dict[str, Any]:
        return {
            "segment": self._segment.state_dict(),
            "count": self._count.clone(),
            "first_step": self._first_step,
            "valley": self._valley.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._segment.load_state_dict(state["segment"])
        self._count.copy_(state["count"])
        self._first_step = int(state["first_step"])
        self._valley.load_state_dict(state["valley"])


@dataclass(frozen=True)
class SwadResult:
    """What ``swad`` found.

    Attributes:
        final: (P,), the average.
        converge_step: the step of the lowest validation loss, where the window begins to be looked for; -1: the loss
            never stopped to fall, and ``final`` is the mean of the last segment.
        threshold: the loss above which the window ends; NaN if it never converged.
        dead_at_step: the validation at which the end of the window was seen; -1: never.
        start_step, end_step: the first and last step of the window.
        n_averaged: how many things were averaged: segments if ``published``, iterates if ``clean`` or never converged.
    """

    final: Tensor
    converge_step: int
    threshold: float
    dead_at_step: int
    start_step: int
    end_step: int
    n_averaged: int


def swad(
    params_TP: Tensor,
    losses: Sequence[float] | Tensor,
    *,
    eval_every: int,
    n_converge: int = 3,
    n_tolerance: int = 6,
    tolerance_ratio: float = 0.3,
    variant: Literal["clean", "published"] = "published",
) -> SwadResult:
    """SWAD of a history of weights.

    Args:
        params_TP: row s holds the weights after step s, which counts from 0.
        losses: the validation loss of the rows 0, ``eval_every``, 2 ``eval_every``, ...

    What comes after the end of the window is not looked at.
    """
    config = SwadConfig(
        variant=variant, n_converge=n_converge, n_tolerance=n_tolerance, tolerance_ratio=tolerance_ratio
    )
    average = Swad(config, [params_TP[0]], len(params_TP))
    average._first_step = 0
    taken = torch.ones((), dtype=torch.bool, device=params_TP.device)
    for step, params_P in enumerate(params_TP):
        average.update([params_P], taken)
        if step % eval_every == 0:
            average.validated(step, float(losses[step // eval_every]), [params_P])
    valley, window = average._valley, average._valley.window()
    assert isinstance(window, Window), "row 0 is validated"
    return SwadResult(
        final=average.tensors()[0],
        converge_step=-1 if valley.converge_step is None else valley.converge_step,
        threshold=float("nan") if valley.threshold is None else valley.threshold,
        dead_at_step=-1 if valley.dead_at_step is None else valley.dead_at_step,
        start_step=window.start_step,
        end_step=window.end_step,
        n_averaged=window.count,
    )
