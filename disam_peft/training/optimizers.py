"""Learning rate over a run."""

from __future__ import annotations

import math

from disam_peft.config.training import TrainConfig


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Factor on the learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant or half a cosine.

    The first step of a warm-up of n has factor 1/n, step n - 1 has 1; the cosine falls from 1 towards 0, which the
    step after the last one would have.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
