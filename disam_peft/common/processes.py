"""What the processes of a distributed run know of each other, and what they do or decide together.

A decision that one process took alone would leave the others waiting for it for ever, so it is taken by all of them
with the functions of this module. Without a process group there is one process, and they cost nothing. Importing this
module loads no torch: before something else has loaded it, there can be no process group.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from disam_peft.common.slurm import slurm_task
from disam_peft.errors import UserError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")


def rank() -> int:
    """The number of this process in the process group; 0 without a group."""
    return _group().get_rank() if has_group() else 0


def world_size() -> int:
    """The number of processes in the process group; 1 without a group."""
    return _group().get_world_size() if has_group() else 1


def has_group() -> bool:
    """Whether this process has joined a process group of ``torch.distributed``."""
    group = _group()
    return group is not None and group.is_available() and group.is_initialized()


def is_main() -> bool:
    """Whether this is the process that writes records and speaks to the user. Before there is a process group, the
    launcher's environment variable ``RANK`` decides, or the number of a SLURM task."""
    if has_group():
        return rank() == 0
    task = slurm_task()
    return os.environ.get("RANK", "0") == "0" if task is None else task.rank == 0


def wait() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        _group().barrier()


def on_main(action: Callable[[], Result]) -> Result:
    """The result of ``action()``, which the main process alone calls, on every process. All wait until it is done.

    Args:
        action: returns something that can be pickled.

    Raises:
        UserError: ``action`` raised a UserError; it is raised on every process.
        RuntimeError: ``action`` raised another error. On the main process that error itself is raised.
    """
    if world_size() == 1:
        return action()
    # What the main process sends: the result, the text of a UserError, the text of another error.
    sent: list[Any] = [None, None, None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            sent[0] = action()
        except UserError as error:
            failure, sent[1] = error, str(error)
        except Exception as error:
            failure, sent[2] = error, repr(error)
    _group().broadcast_object_list(sent, src=0)
    if failure is not None:
        raise failure
    if sent[1] is not None:
        raise UserError(sent[1])
    if sent[2] is not None:
        raise RuntimeError(f"the main process failed: {sent[2]}")
    return sent[0]


def all_or_none(action: Callable[[], Result]) -> Result:
    """The result of ``action()``, which every process calls. Where one of them fails all of them do, so that nobody
    waits for a process that is gone.

    Raises:
        UserError: ``action`` raised a UserError on this process, or else any error on another one.
    """
    if world_size() == 1:
        return action()
    result: Any = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    texts = from_all(None if failure is None else str(failure) or repr(failure))
    if failure is not None:
        raise failure
    failed = next((text for text in texts if text is not None), None)
    if failed is not None:
        raise UserError(f"another process failed: {failed}")
    return result


def largest(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers, the same on each.

    Args:
        device: where the process group works: the GPU with NCCL.
    """
    if world_size() == 1:
        return number
    import torch

    numbers = torch.tensor([number], device=device)
    _group().all_reduce(numbers, op=_group().ReduceOp.MAX)
    return int(numbers)


def from_all(value: Result) -> list[Result]:
    """Every process's value, in the order of their ranks. Values are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    _group().all_gather_object(values, value)
    return values


def _group() -> Any:
    """The module ``torch.distributed`` where something has imported it, else None."""
    return sys.modules.get("torch.distributed")
