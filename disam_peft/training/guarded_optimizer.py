"""What became of a step, asked of the device as late as can be.

A step whose losses or gradient are not finite must change nothing. A fused optimizer decides that by itself, by a flag
on the device. The host, whose schedule and records hang on it, reads the flag once the passes of the next step are
queued: the device never runs dry while the host waits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

from disam_peft.disam.disam import StepReport


@dataclass(frozen=True)
class Taken:
    """A step whose gradient is in ``p.grad``.

    Attributes:
        step: its number, from 1.
        indices_B: the samples of its batch, on the host.
        gradient_norm: before clipping, at loss scale 1, shape ().
        learning_rate: of its update.
    """

    step: int
    indices_B: Tensor
    report: StepReport
    gradient_norm: Tensor
    learning_rate: float

    @property
    def is_finite(self) -> Tensor:
        """Whether it may change the weights: shape (), bool, on the device."""
        return self.report.is_finite & torch.isfinite(self.gradient_norm)


class Updates:
    """Takes one update after another, and says of each what became of it.

    Args:
        stepper: the optimizer as Accelerate wraps it.
        settled: called as ``settled(taken, skipped)`` for every step, in their order: in ``take`` where the host knows
            at once, else in the next call of ``settle``.
    """

    def __init__(self, stepper: AcceleratedOptimizer, settled: Callable[[Taken, bool], None]) -> None:
        self._stepper, self._optimizer, self._settled = stepper, stepper.optimizer, settled
        self._decides_itself = bool(self._optimizer.defaults.get("fused"))
        self._lags = self._optimizer.param_groups[0]["params"][0].is_cuda  # a CPU is done when the call returns
        self._open: tuple[Taken, _Answer, bool] | None = None

    def take(self, taken: Taken) -> None:
        """Update the weights, unless the step is not finite."""
        self.settle()
        if self._stepper.scaler is not None:
            # The scaler looks at the device itself, once a step: it skips, and halves its scale.
            self._stepper.step()
            self._settled(taken, bool(self._stepper.step_was_skipped))
        elif self._decides_itself:
            self._take_unseen(taken)
            if not self._lags:
                self.settle()
        else:
            skipped = not bool(taken.is_finite)
            if not skipped:
                self._stepper.step()
            self._settled(taken, skipped)

    def settle(self) -> None:
        """Wait until it is known what became of the last step; then optimizer, schedule and records are up to date."""
        if self._open is None:
            return
        (taken, answer, is_first), self._open = self._open, None
        skipped = answer.read()
        if skipped and is_first:
            # torch made the state on the way, and left momentum as the memory happened to be
            self._optimizer.state.clear()
        self._settled(taken, skipped)

    def _take_unseen(self, taken: Taken) -> None:
        skipped = (~taken.is_finite).float()
        is_first = not self._optimizer.state
        answer = _Answer(skipped)  # before the update is queued, which need not be waited for
        # meant for a loss scaler: at 1 the kernels leave weights, state and count of steps as they are
        self._optimizer.found_inf = skipped
        try:
            self._stepper.step()
        finally:
            del self._optimizer.found_inf
        self._open = taken, answer, is_first


class _Answer:
    """A flag of the device, on its way to the host."""

    def __init__(self, flag: Tensor) -> None:
        self._flag, self._arrived = flag, None
        if flag.is_cuda:
            self._flag = torch.empty((), dtype=flag.dtype, pin_memory=True)  # or the copy would wait for the device
            self._flag.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.current_stream(flag.device).record_event()

    def read(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._flag)
