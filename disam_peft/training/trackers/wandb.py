"""Weights & Biases, through Accelerate and without a network."""

from __future__ import annotations

from pathlib import Path

from accelerate.tracking import GeneralTracker, WandBTracker

from disam_peft.config.trackers import WandbConfig
from disam_peft.training.trackers.base import TrackedRun, Tracker


class Wandb(Tracker[WandbConfig]):
    """Offline runs in ``<output>/<name>/wandb``, named by the recipe and the held-out domain, with the whole recipe as
    their config. ``wandb sync`` uploads them.

    A run that is resumed becomes a further offline run, which begins after the checkpoint.
    """

    package = "wandb"

    def place(self, run: TrackedRun) -> Path:
        return run.folder.parent / "wandb"

    def hint(self, run: TrackedRun) -> str:
        return f"wandb sync {self.place(run) / 'offline-run-*'} uploads it"

    def open(self, run: TrackedRun) -> GeneralTracker:
        folder = self.place(run).parent
        folder.mkdir(parents=True, exist_ok=True)  # wandb would turn to a temporary folder if it were missing
        return WandBTracker(
            self.config.project, mode="offline", dir=str(folder), name=run.name, config=dict(run.settings)
        )
