"""Several ranks as forks of this process, which has everything imported and must not have touched a device (POSIX)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.paths import environment


def fork_ranks(world_size: int, work: Callable[[int], object]) -> None:
    """Run ``work(rank)`` on every rank at once, and wait for all of them.

    Raises:
        RuntimeError: a rank failed; its traceback stands on standard error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


@contextmanager
def gloo_group(folder: str | Path, rank: int, world_size: int) -> Iterator[None]:
    """The default process group of this rank; the ranks meet in a file of the folder."""
    store = dist.FileStore(f"{folder}/store-{world_size}", world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    yield
    dist.barrier()
    dist.destroy_process_group()


def saved_by_ranks(script: ModuleType, world_size: int, *words: str, folder: Path) -> list[Any]:
    """What each rank of a script saves as ``folder/RANK.pt``. It is called with ``world_size PORT *words folder`` in a
    new process, which forks the ranks: this one may have threads already."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(script.__file__), str(world_size), port, *words, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
