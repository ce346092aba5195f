"""What several processes must do or decide together: a process that went its own way would leave the others waiting.

Importing this module loads no torch, so that the command line can ask for the first process before it needs more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from disam_peft.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def is_first_process() -> bool:
    """True on the process that prints and writes, as the launcher (torchrun, accelerate launch) says: ``RANK`` 0."""
    return os.environ.get("RANK", "0") == "0"


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What ``action()`` gives on the main process, on every process; nobody goes on before it is done.

    Raises:
        UserError: ``action`` raised it.
        RuntimeError: it raised something else (on the main process: that).
    """
    if accelerator.num_processes == 1:
        return action()
    import torch.distributed as dist

    outcome: list[Any] = [None, None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            failure, outcome[1] = error, str(error)
        except Exception as error:
            failure, outcome[2] = error, repr(error)
    dist.broadcast_object_list(outcome, src=0, device=accelerator.device)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    if outcome[2] is not None:
        raise RuntimeError(f"the main process failed: {outcome[2]}")
    return outcome[0]


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of all processes' numbers, the same on each."""
    if accelerator.num_processes == 1:
        return number
    import torch
    import torch.distributed as dist

    numbers = torch.tensor([number], device=accelerator.device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return int(numbers)


def from_all(accelerator: Accelerator, value: Result) -> list[Result]:
    """Every process's value, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values
