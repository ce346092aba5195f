"""The loop: the only place that knows of Accelerate, optimizers and schedules."""

from disam_peft.training.config import MethodConfig, TrainConfig
from disam_peft.training.devices import start_accelerator
from disam_peft.training.loop import FitResult, fit
from disam_peft.training.processes import on_main
from disam_peft.training.saver import Checkpoints

__all__ = ["Checkpoints", "FitResult", "MethodConfig", "TrainConfig", "fit", "on_main", "start_accelerator"]
