"""The loop: the only place that knows of Accelerate, optimizers and schedules."""

from disam_peft.training.config import MethodConfig, TrainConfig
from disam_peft.training.devices import start_accelerator
from disam_peft.training.loop import FitResult, fit

__all__ = ["FitResult", "MethodConfig", "TrainConfig", "fit", "start_accelerator"]
