"""Guarded optimizers that look at the device at other times than the real one: what it does must not depend on that."""

from __future__ import annotations

from disam_peft.training.guarded_optimizer import GuardedOptimizer, StepOutcome


class LooksFirst(GuardedOptimizer):
    """Asks the device before every update, and never tells the optimizer."""

    def step(self, is_finite):
        skipped = not bool(is_finite)
        if not skipped:
            self._scaled.step()
        outcome = StepOutcome(is_finite)
        outcome.resolve(skipped)
        return outcome


class Late(GuardedOptimizer):
    """On a CPU as on a GPU, which may lag behind."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._lags = True
