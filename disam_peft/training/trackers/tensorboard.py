"""TensorBoard, through Accelerate."""

from __future__ import annotations

from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker

from disam_peft.config.trackers import TensorBoardConfig
from disam_peft.training.trackers.base import TrackedRun, Tracker


class TensorBoard(Tracker[TensorBoardConfig]):
    """Event files in ``<output>/<name>/tensorboard/<held-out domain>``, so that all runs of a name are shown together.

    A run that is resumed writes to a further event file, and TensorBoard shows the steps between the checkpoint and
    the interruption twice: what was written to an event file cannot be taken back.
    """

    package = "tensorboard"

    def place(self, run: TrackedRun) -> Path:
        return _place(run)

    @classmethod
    def forget(cls, run: TrackedRun) -> None:
        """Event files alone: TensorBoard would draw the old run and the new one as one line."""
        place = _place(run)
        if place.is_dir() and not place.is_symlink():
            for path in place.glob("events.out.tfevents.*"):
                path.unlink()

    def hint(self, run: TrackedRun) -> str:
        return f"tensorboard --logdir {self.place(run).parent} shows it"

    def open(self, run: TrackedRun) -> GeneralTracker:
        place = self.place(run)
        return TensorBoardTracker(place.name, place.parent)


def _place(run: TrackedRun) -> Path:
    return run.folder.parent / "tensorboard" / run.folder.name
