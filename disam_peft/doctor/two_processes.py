"""Checks that two processes, started on the CPU, come to the same result as one.

Each runs ``python -m disam_peft.doctor.two_processes FOLDER RANK DTYPE``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from disam_peft.config.recipe import Recipe, load_recipe, save_recipe
from disam_peft.doctor.check_result import CheckResult, differing, failed, largest_relative, measured, unavailable
from disam_peft.doctor.equalities import ROUNDING
from disam_peft.doctor.subject import build_subject

PROCESSES = "two processes equal one"
COMMAND = (sys.executable, "-m", "disam_peft.doctor.two_processes")


@dataclass
class TwoProcesses:
    """Two processes that compute while the other checks run; ``finding`` waits for their result."""

    folder: tempfile.TemporaryDirectory[str]
    ranks: list[subprocess.Popen[str]]
    dtype: torch.dtype

    @classmethod
    def start(cls, recipe: Recipe, dtype: torch.dtype, command: Sequence[str] = COMMAND) -> TwoProcesses:
        folder = tempfile.TemporaryDirectory(prefix="disam-peft-doctor-")
        save_recipe(recipe, Path(folder.name) / "recipe.yaml")
        threads = str(max(1, torch.get_num_threads() // 2))
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": threads}
        name = str(dtype).removeprefix("torch.")
        ranks = [
            subprocess.Popen(
                [*command, folder.name, str(rank), name],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        return cls(folder, ranks, dtype)

    def finding(self, seconds: float) -> CheckResult:
        """Their result, for which this waits at most so many seconds."""
        deadline = time.monotonic() + seconds
        try:
            for rank in self.ranks:
                errors = rank.communicate(timeout=max(1.0, deadline - time.monotonic()))[1]
                if rank.returncode != 0:
                    last = (errors.strip().splitlines() or ["no message"])[-1]
                    return failed(PROCESSES, f"a process ended with {rank.returncode}: {last}")
            return compared(Path(self.folder.name), self.dtype)
        except subprocess.TimeoutExpired:
            return unavailable(PROCESSES, f"did not end within {seconds:.0f} s; --seconds gives more time")
        finally:
            self.stop()

    def stop(self) -> None:
        """End both processes, whether or not they are done."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
            if rank.stderr is not None:
                rank.stderr.close()
        self.folder.cleanup()


def compared(folder: Path, dtype: torch.dtype) -> CheckResult:
    """The result that rank 0 wrote down: whether both processes have the same bits, and if so how far their gradient is
    from that of one process."""
    found = json.loads((folder / "found.json").read_text())
    if found["differing"]:
        what = f"numbers in which the two differ from one another, of {found['numbers']}"
        return measured(PROCESSES, what, found["differing"], 0)
    what = f"difference of gradients, relative, {str(dtype).removeprefix('torch.')}, gloo on the CPU"
    return measured(PROCESSES, what, found["difference"], ROUNDING[dtype])


def work(folder: Path, rank: int, dtype: torch.dtype) -> None:
    """The whole batch alone, then a part of it as one of two; rank 0 writes down how far they are apart."""
    subject = build_subject(load_recipe(folder / "recipe.yaml"), torch.device("cpu")).use(dtype)
    if rank == 0:
        subject.disam().backward(subject.losses(), subject.domains_B)
    alone_P = subject.gradient()
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    mine = slice(0, -2) if rank == 0 else slice(-2, None)  # the second lacks the first domain
    subject.disam(reduce_gradients=True).backward(subject.losses(mine), subject.domains_B[mine])
    together_P = subject.gradient()
    both = [torch.empty_like(together_P) for _ in range(2)]
    dist.all_gather(both, together_P)
    dist.destroy_process_group()
    if rank == 0:
        found = {
            "difference": largest_relative(together_P, alone_P),
            "differing": differing(*both),
            "numbers": len(together_P),
        }
        (folder / "found.json").write_text(json.dumps(found))


def main(arguments: Sequence[str]) -> None:
    folder, rank, name = arguments
    work(Path(folder), int(rank), getattr(torch, name))


if __name__ == "__main__":
    main(sys.argv[1:])
