"""What a tracker is: a config's way to one of Accelerate's trackers, which ``accelerator.log`` then writes to."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from accelerate.tracking import GeneralTracker

from disam_peft.config.base import Config
from disam_peft.errors import UserError

SomeConfig = TypeVar("SomeConfig", bound=Config)


@dataclass(frozen=True)
class TrackedRun:
    """The run whose numbers are tracked.

    Attributes:
        folder: of the run, ``<output>/<name>/<held-out domain>``.
        settings: the resolved recipe as plain values, for trackers that show settings beside the numbers.
    """

    folder: Path
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"


class Tracker(ABC, Generic[SomeConfig]):
    """One kind of tracker. A new one is a subclass in a file of its own, a config class, and a line in ``TRACKERS``."""

    package: ClassVar[str | None] = None
    """The module that must be installed; the optional extra of ``disam_peft`` that installs it has the same name."""

    def __init__(self, config: SomeConfig) -> None:
        self.config = config

    def require_installed(self) -> None:
        """Pass if the package is there, which is not imported.

        Raises:
            UserError: it is not; says what to type.
        """
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            kind = getattr(self.config, "kind", self.package)
            raise UserError(f'train.tracker={kind} needs a package: pip install "disam_peft[{self.package}]"')

    @abstractmethod
    def place(self, run: TrackedRun) -> Path:
        """The file or folder that the numbers of this run are written to."""

    @abstractmethod
    def hint(self, run: TrackedRun) -> str:
        """What shows, reads or uploads the numbers, as the end of a sentence."""

    @classmethod
    def forget(cls, run: TrackedRun) -> None:
        """Remove what an earlier run in the same folder wrote outside of it, which is about to be started again."""

    @abstractmethod
    def open(self, run: TrackedRun) -> GeneralTracker:
        """Accelerate's tracker for this run, not started yet."""
