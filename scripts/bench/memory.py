"""CoOp over many classes: the peak memory of a fresh process each, and what a memory budget costs in time."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from disam_peft.backbones.families import load_backbone
from disam_peft.config.backbone import BackboneConfig

from .coop import coop_classifier
from .measure import Row, interleaved, ratios
from .models import our_backbone
from .steps import Batch, Step, difference, ours

BUDGETS_GB = (2.0, 0.5)
PEAK_TARGET_GB = 2.2
GB = 1e9


def memory_steps(
    folder: Path, classes: int, batch_size: int, budgets_gb: tuple[float, ...], device: torch.device
) -> dict[float | None, Step]:
    """DISAM on CoOp with each budget, and under None without one, on one model at the same weights."""
    backbone = our_backbone(folder, device)
    batch = Batch.draw(batch_size, backbone, classes)
    limits: tuple[float | None, ...] = (None, *budgets_gb)
    return {limit: ours(coop_classifier(backbone, classes, memory_budget_gb=limit), batch) for limit in limits}


def rows(folder: Path, classes: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table."""
    peaks = {limit: peak_gb(folder, classes, batch_size, limit, device) for limit in (None, *BUDGETS_GB)}
    step = memory_steps(folder, classes, batch_size, BUDGETS_GB, device)
    whole = step[None].gradients()
    exact = {limit: difference(step[limit].gradients(), whole) for limit in BUDGETS_GB}
    timed = {str(limit): one.run for limit, one in step.items()}
    seconds = interleaved(timed, rounds, device, cold_rounds=0)  # the gradients have warmed all up
    what = f"CoOp {classes} classes, DISAM"
    process, step_alone = peaks[None]
    found = [
        Row(f"{what}, no budget: peak of the process", [process], unit="GB"),
        Row(f"{what}, no budget: of it by the step", [step_alone], unit="GB"),
    ]
    for limit in BUDGETS_GB:
        target, slower = (PEAK_TARGET_GB, 1.2) if limit == BUDGETS_GB[0] else (None, None)
        process, step_alone = peaks[limit]
        against = ratios(seconds[str(limit)], seconds[str(None)])
        found += [
            Row(f"{what}, budget {limit:g} GB: peak of the process", [process], target, exact[limit], unit="GB"),
            Row(f"{what}, budget {limit:g} GB: of it by the step", [step_alone], None, exact[limit], unit="GB"),
            Row(f"{what}, time with budget {limit:g} GB / without", against, slower, exact[limit]),
        ]
    return found


def peak_gb(
    folder: Path, classes: int, batch_size: int, budget_gb: float | None, device: torch.device
) -> tuple[float, float]:
    """Peak memory (10^9 bytes) of a new process that takes one step, and how much the step added to it."""
    job = {
        "folder": str(folder),
        "classes": classes,
        "batch_size": batch_size,
        "budget_gb": budget_gb,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", f"{__package__}.memory", json.dumps(job)]
    # The folder above this package is where `-m` finds it.
    result = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    before, after = json.loads(result.stdout.splitlines()[-1])
    return after / GB, (after - before) / GB


def _one_step(
    folder: str, classes: int, batch_size: int, budget_gb: float | None, device: str, threads: int
) -> tuple[int, int]:
    """Bytes that this process holds before the step, and its peak after it."""
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM weights.*")
        # Drawn anew: a file of weights that is mapped while it loads would count as memory.
        backbone = load_backbone(BackboneConfig(family="transformers", name=folder, pretrained="none"))
    backbone.to(device)
    step = ours(
        coop_classifier(backbone, classes, memory_budget_gb=budget_gb), Batch.draw(batch_size, backbone, classes)
    )
    if backbone.device.type == "cuda":
        before = torch.cuda.memory_allocated(backbone.device)
        step.run()
        return before, torch.cuda.max_memory_allocated(backbone.device)
    before = process_bytes("VmRSS")
    step.run()
    return before, process_bytes("VmHWM")


def process_bytes(field: str) -> int:
    """A field of Linux's process status; elsewhere the peak."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux a new process inherits the peak of the one that started it.
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{field}:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    print(json.dumps(_one_step(**json.loads(sys.argv[1]))))
