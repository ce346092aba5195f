"""Devices, precision and processes, through Accelerate."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

from disam_peft.errors import UserError


def start_accelerator(
    mixed_precision: str = "no",
    *,
    timeout_minutes: float = 30,
) -> Accelerator:
    """An Accelerator for this process: one of many under ``accelerate launch``, the only one otherwise.

    Args:
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        timeout_minutes: how long processes wait for each other before they give up.

    Raises:
        UserError: a precision that the device does not have.
    """
    processes = _join(timeout_minutes)
    # before Accelerate sees it: fp16 on a CPU would silently run in float32
    check_precision(mixed_precision, processes.device)
    # by a plugin: a number would give way to that of ``accelerate launch``, and every loss be divided by it
    one_batch_per_step = GradientAccumulationPlugin(num_steps=1)
    try:
        return Accelerator(mixed_precision=mixed_precision, gradient_accumulation_plugin=one_batch_per_step)
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        raise UserError(
            f"train.mixed_precision={mixed_precision}: this process began with another one, and Accelerate keeps one "
            "for all of a process; run it in a new process"
        ) from error


def _join(timeout_minutes: float) -> PartialState:
    """Accelerate's knowledge of the processes. Not told ``cpu``, it looks for them on accelerators alone: of several
    processes on CPUs (torchrun) each would believe itself alone, and all would write the same files."""
    on_cpus = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpus, timeout=timedelta(minutes=timeout_minutes))


def check_precision(mixed_precision: str, device: torch.device) -> None:
    """Pass if ``device`` computes in this precision.

    Raises:
        UserError: it does not; names the alternative.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("train.mixed_precision=fp16 does not exist on a CPU; use bf16, or no")
    if (
        mixed_precision == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"train.mixed_precision=bf16: {name} has no bfloat16; use fp16, or no")
