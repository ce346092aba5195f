"""From which segment of a run to which its weights are averaged, by the validation loss at the end of each (SWAD).

A segment is what lies between two validations. All of this is on the host, and its numbers are the same on all ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """The iterates of the steps between two validations.

    Attributes:
        first_step, last_step: of the run.
        loss: validation loss of the weights after ``last_step``; infinity where it is not finite.
        count: number of iterates.
        mean: of the iterates, as flat buffers on the host; empty where it is no longer of use.
        last: the weights after ``last_step``; empty where they are no longer of use.
    """

    first_step: int
    last_step: int
    loss: float
    count: int
    mean: list[Tensor]
    last: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Window:
    """What is averaged so far: ``count`` things of equal weight from ``start_step`` to ``end_step``."""

    mean: list[Tensor]
    start_step: int = -1
    end_step: int = -1
    count: int = 0

    def with_mean(self, segment: Segment, *, times: int, start_step: int | None = None) -> Window:
        """The window with the mean of a segment added, ``times`` as heavy as one thing. Tensors are not changed."""
        first = segment.first_step if start_step is None else start_step
        if self.count == 0:
            return Window([tensor.clone() for tensor in segment.mean], first, segment.last_step, times)
        count = self.count + times
        mean = [torch.lerp(ours, new, times / count) for ours, new in zip(self.mean, segment.mean, strict=True)]
        return Window(mean, self.start_step, segment.last_step, count)


class LossValley(ABC):
    """The search for the window.

    Args:
        n_converge: the window is found at the first of so many segments in a row, if no loss of them is lower than its
            own (of equals it must be the first). They must all be finite.
        n_tolerance: it ends before so many segments in a row with losses above the threshold.
        tolerance_ratio: the threshold is (1 + this) times the mean of the ``n_converge`` losses.
    """

    _averages_iterates: ClassVar[bool]
    """Whether the window begins with the last iterate of a segment; otherwise it is made of whole segments."""

    def __init__(self, n_converge: int, n_tolerance: int, tolerance_ratio: float) -> None:
        self._n_converge, self._n_tolerance, self._ratio = n_converge, n_tolerance, tolerance_ratio
        self._recent: list[Segment] = []
        self._window: Window | None = None
        self.converge_step: int | None = None
        self.threshold: float | None = None
        self.dead_at_step: int | None = None

    def close(self, segment: Segment) -> None:
        """The next segment has ended."""
        loss = segment.loss if math.isfinite(segment.loss) else math.inf
        last = segment.last if self.threshold is None and self._averages_iterates else []
        self._recent.append(replace(segment, loss=loss, last=last))
        if self.threshold is not None:
            self._goes_on(segment.last_step)
            return
        self._recent = self._recent[-max(self._n_converge, self._n_tolerance) :]
        # In a segment before those the window of iterates cannot begin any more: its loss alone still counts.
        for number, old in enumerate(self._recent[: -self._n_converge] if self._averages_iterates else []):
            self._recent[number] = replace(old, mean=[], last=[])
        latest = self._recent[-self._n_converge :]
        losses = [found.loss for found in latest]
        if len(latest) == self._n_converge and math.isfinite(max(losses)) and losses[0] == min(losses):
            self.converge_step = latest[0].last_step
            self.threshold = (1 + self._ratio) * float(np.mean(losses))
            self._window = self._begins(latest)
            self._recent = [replace(found, last=[]) for found in self._recent]

    @abstractmethod
    def _begins(self, latest: Sequence[Segment]) -> Window:
        """The window where it was just found: ``latest`` are the ``n_converge`` segments, the first is its own."""

    @abstractmethod
    def _goes_on(self, step: int) -> None:
        """One more segment stands at the end of ``_recent``: take what surely belongs to the window, or see its end."""

    @abstractmethod
    def _with_the_rest(self, window: Window) -> Window:
        """The window with what is added to it where the run ends before the window does."""

    def window(self) -> Window | None:
        """The average as it is if the run ends here; None before the first segment. Where the loss never stopped to
        fall it is the last segment."""
        if self._window is not None:
            return self._window if self.dead_at_step is not None else self._with_the_rest(self._window)
        if not self._recent:
            return None
        last = self._recent[-1]
        return Window(last.mean, last.first_step, last.last_step, last.count)

    def _above(self, segments: Sequence[Segment]) -> bool:
        assert self.threshold is not None
        return min(segment.loss for segment in segments) > self.threshold

    def state_dict(self) -> dict[str, Any]:
        window = self._window
        return {
            "recent": [_saved(segment) for segment in self._recent],
            "window": None if window is None else _saved(window),
            "converge_step": self.converge_step,
            "threshold": self.threshold,
            "dead_at_step": self.dead_at_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent = [Segment(**_restored(saved)) for saved in state["recent"]]
        self._window = None if state["window"] is None else Window(**_restored(state["window"]))
        self.converge_step, self.dead_at_step = state["converge_step"], state["dead_at_step"]
        self.threshold = state["threshold"]


class CleanValley(LossValley):
    """The paper's window: every iterate from the one with the lowest loss to the last before the loss had risen."""

    _averages_iterates = True

    def _begins(self, latest: Sequence[Segment]) -> Window:
        lowest = latest[0]
        return Window(lowest.last, lowest.last_step, lowest.last_step, 1)

    def _goes_on(self, step: int) -> None:
        if len(self._recent) >= self._n_tolerance and self._above(self._recent[-self._n_tolerance :]):
            self._take_all_but(self._n_tolerance)
            self.dead_at_step, self._recent = step, []
        else:
            # Whatever comes, the end of the window lies no more than n_tolerance segments before the next one.
            self._take_all_but(self._n_tolerance - 1)

    def _take_all_but(self, count: int) -> None:
        assert self._window is not None
        taken = self._recent[: max(len(self._recent) - count, 0)]
        for segment in taken:
            self._window = self._added(self._window, segment)
        self._recent = self._recent[len(taken) :]

    def _added(self, window: Window, segment: Segment) -> Window:
        assert self.converge_step is not None
        is_later = segment.last_step > self.converge_step
        return window.with_mean(segment, times=segment.count) if is_later else window

    def _with_the_rest(self, window: Window) -> Window:
        for segment in self._recent:
            window = self._added(window, segment)
        return window


class PublishedValley(LossValley):
    """What the published code does (khanrc/swad, ``LossValley``): means of segments, each with weight 1.

    The window begins up to ``n_tolerance - n_converge - 1`` segments before that of the lowest loss, but after each one
    above the threshold. Where ``n_tolerance`` is not larger than ``n_converge`` it begins with the segment after it,
    and that of the lowest loss is averaged only if nothing else ever is. While the queue of ``n_tolerance`` segments is
    not full, its oldest stays where it is and is added again at each validation.
    """

    _averages_iterates = False

    @property
    def _queue(self) -> list[Segment]:
        return self._recent[-self._n_tolerance :]

    def _begins(self, latest: Sequence[Segment]) -> Window:
        window = Window(latest[0].mean)
        more = self._n_tolerance - self._n_converge
        if more < 0:
            added = latest[1 : 1 - more]
        elif more == 0:
            added = []
        else:
            oldest = self._queue[: more + 1]
            above = [place for place, segment in enumerate(oldest) if self._above([segment])]
            begin = 1 + above[-1] if above else 0
            added = oldest[begin + 1 :]
        for segment in added:
            window = window.with_mean(segment, times=1)
        return window

    def _goes_on(self, step: int) -> None:
        assert self._window is not None and self.converge_step is not None
        self._recent = self._queue
        if self._recent[0].last_step < self.converge_step:
            return
        if self._above(self._recent):
            self.dead_at_step, self._recent = step, []
        else:
            self._window = self._window.with_mean(self._recent[0], times=1)

    def _with_the_rest(self, window: Window) -> Window:
        rest = self._queue[1:]
        while rest and not self._above(rest):
            window = window.with_mean(rest[0], times=1, start_step=rest[0].last_step)
            rest = rest[1:]
        return window


def _saved(found: Segment | Window) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    if isinstance(found, Segment):
        values["loss"] = torch.tensor(found.loss, dtype=torch.float64)  # JSON has no infinity
    return values


def _restored(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if name == "loss" else value for name, value in saved.items()}
