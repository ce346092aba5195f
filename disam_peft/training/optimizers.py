"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from disam_peft.config.training import TrainConfig
from disam_peft.errors import UserError
from disam_peft.training.guarded_optimizer import StepOutcome


def build_optimizer(
    params: Sequence[Tensor] | Sequence[dict[str, Any]], config: TrainConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of a recipe.

    Args:
        params: tensors, or parameter groups with learning rates of their own.
        fused: one kernel for all tensors. It must be off under a loss scaler: a fused optimizer would hide from
            Accelerate that the scaler skipped its step.
    """
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(params, rate, config.momentum, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(params, rate, weight_decay=decay, fused=fused)


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


class Schedule:
    """The learning rate over the steps that were taken: a skipped step does not advance it."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        self._scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        return float(self._scheduler.get_last_lr()[0])

    def step(self, outcome: StepOutcome) -> None:
        """Advance, as soon as it is known that the step was taken."""
        outcome.when_known(lambda skipped: None if skipped else self._scheduler.step())

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._scheduler.state_dict().items() if key != "lr_lambdas"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: it is the state of another kind of schedule.
        """
        here = self._scheduler.state_dict()
        if set(here) - {"lr_lambdas"} != set(state):
            raise UserError(f"its schedule differs (here {sorted(here)}; saved {sorted(state)})")
        self._scheduler.load_state_dict({**here, **state})
