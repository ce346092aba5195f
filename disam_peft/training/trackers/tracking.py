"""Kind of tracker -> class, and how a run uses the one that its recipe names."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from disam_peft.config.trackers import NoTrackerConfig, TrackerConfig
from disam_peft.errors import Notice
from disam_peft.training.trackers.base import TrackedRun, Tracker
from disam_peft.training.trackers.json_lines import JsonLines
from disam_peft.training.trackers.tensorboard import TensorBoard
from disam_peft.training.trackers.wandb import Wandb

TRACKERS: dict[str, type[Tracker[Any]]] = {
    "tensorboard": TensorBoard,
    "json_lines": JsonLines,
    "wandb": Wandb,
}


def require_tracker(config: TrackerConfig) -> None:
    """Pass if the tracker can be used. Called before the work begins, since packages are cheap to look for.

    Raises:
        UserError: a package that it needs is not installed.
    """
    if not isinstance(config, NoTrackerConfig):
        TRACKERS[config.kind](config).require_installed()


def forget_tracked(run: TrackedRun) -> None:
    """Remove what trackers of every kind wrote for an earlier run in the same folder, which is started again: the new
    one may have another tracker, or none."""
    for kind in TRACKERS.values():
        kind.forget(run)


@contextmanager
def tracking(config: TrackerConfig, run: TrackedRun, accelerator: Accelerator) -> Iterator[None]:
    """Inside this context ``accelerator.log`` writes to the config's tracker, and the user is told where.

    A tracker belongs to one run: the next run of the same process has a tracker of its own. The kind ``none`` writes
    nothing. Of several processes the main one alone opens a tracker; some of Accelerate's trackers, such as that of
    wandb, would start a run on each of them.

    Raises:
        UserError: a package that the tracker needs is not installed. Raised on every process, so that all of them end.
    """
    if isinstance(config, NoTrackerConfig):
        yield
        return
    tracker = TRACKERS[config.kind](config)
    tracker.require_installed()
    if not accelerator.is_main_process:
        yield
        return
    warnings.warn(f"{config.kind} writes to {tracker.place(run)}; {tracker.hint(run)}", Notice, stacklevel=3)
    opened = tracker.open(run)
    opened.start()
    accelerator.trackers.append(opened)
    try:
        yield
    finally:
        accelerator.trackers.remove(opened)
        opened.finish()
