"""Devices, precision and processes, through Accelerate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin, parse_flag_from_env

from disam_peft.common.slurm import is_batch_script, slurm_task
from disam_peft.errors import Notice, UserError

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Variables by which ``accelerate launch`` hands on what its config says."""
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Those that torch accepts."""


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
        UserError: a precision that the device does not have; a launch that would shard the model.
    """
    _refuse_sharding()
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


def _refuse_sharding() -> None:
    """Accelerate shards what is handed to its ``prepare``, and the towers are called in parts, which never go there:
    each process would hold them whole, against what the user asked for.

    Raises:
        UserError: ``accelerate launch`` was told to shard.
    """
    for flag, name in _SHARDING.items():
        if parse_flag_from_env(flag):
            raise UserError(
                f"this process was launched with {name} ({flag}), which shards a model over processes; here every "
                "process holds the whole frozen model, and only batches are shared. Launch without it (accelerate "
                "launch --multi_gpu); for a tower that does not fit set train.gradient_checkpointing=true and "
                "backbone.precision=bfloat16, int8 or nf4"
            )


def _join(timeout_minutes: float) -> PartialState:
    """Accelerate's knowledge of the processes. Not told ``cpu``, it looks for them on accelerators alone: of several
    processes on CPUs (torchrun) each would believe itself alone, and all would write the same files. It does not know
    the tasks of a SLURM step either.

    Raises:
        UserError: the tasks of a SLURM step cannot find each other.
    """
    on_cpus = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    task = slurm_task()
    if task is not None and not torch.distributed.is_initialized():
        os.environ.update(task.variables())
        if not on_cpus and (seen := torch.accelerator.device_count()) > 0:
            # SLURM may show to each task its own GPU alone, which is then the first one
            os.environ["LOCAL_RANK"] = str(task.local_rank % seen)
    elif is_batch_script() and (tasks := os.environ.get("SLURM_NTASKS", "1")) != "1":
        text = (
            f"this batch script may start {tasks} tasks, and this is one process; srun disam-peft ... uses all of them"
        )
        warnings.warn(text, Notice, stacklevel=4)
    try:
        return PartialState(cpu=on_cpus, timeout=timedelta(minutes=timeout_minutes))
    except RuntimeError as error:
        if task is None:
            raise
        raise UserError(
            f"the {task.tasks} tasks of this SLURM step could not meet at {task.address}, port {task.port} ({error}); "
            "set MASTER_ADDR and MASTER_PORT, or start one torchrun on each node: srun --ntasks-per-node=1 torchrun "
            "--nnodes $SLURM_NNODES --nproc-per-node N --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
            "-m disam_peft.cli train ..."
        ) from error


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, the kernels that torch chooses are those of ``train.deterministic``; what was set before is put back.

    Raises:
        UserError: the environment gives cuBLAS a workspace with which its results differ from run to run.
    """
    if not wanted:
        yield
        return
    given = os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])  # read when cuBLAS is first used
    if given not in DETERMINISTIC_WORKSPACES and torch.cuda.is_available():
        raise UserError(
            f"train.deterministic: {CUBLAS_WORKSPACE}={given} lets results differ from run to run; unset it, or set it "
            f"to {' or '.join(DETERMINISTIC_WORKSPACES)}"
        )
    before = torch.are_deterministic_algorithms_enabled()
    warns, benchmarks = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmarks
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


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
