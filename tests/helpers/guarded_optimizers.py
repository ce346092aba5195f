"""Guarded optimizers that look at the device at other times than the real one: what it does must not depend on that."""

from __future__ import annotations

from disam_peft.training.guarded_optimizer import Updates


class LooksFirst(Updates):
    """Asks the device before every update, and never tells the optimizer."""

    def take(self, taken):
        skipped = not bool(taken.is_finite)
        if not skipped:
            self._stepper.step()
        self._settled(taken, skipped)


class Late(Updates):
    """On a CPU as on a GPU, which may lag behind."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._lags = True
