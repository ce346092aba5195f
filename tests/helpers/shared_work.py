"""For tests that call verbs hundreds of times on runs that differ little: what they have in common is done once."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from disam_peft.backbones import families
from disam_peft.backbones.base import ClipBackbone
from disam_peft.config.backbone import BackboneConfig
from disam_peft.report import drawing, groups, page
from disam_peft.report.runs import RunRecord


@contextmanager
def shared_work() -> Iterator[None]:
    """Load a backbone, and draw a figure, once for the same config and the same data.

    Both depend on files outside the run, or on data that were read from it before, and on nothing else. What a mutated
    file changes is loaded and drawn anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.BACKBONES, "open_clip", _kept_backbones(families.BACKBONES["open_clip"]))
        draw = _kept_drawings(drawing.draw)
        patch.setattr(page, "draw", draw)
        patch.setattr(groups, "draw", draw)
        yield


def _kept_backbones(load: Callable[[BackboneConfig], ClipBackbone]) -> Callable[[BackboneConfig], ClipBackbone]:
    loaded: dict[str, ClipBackbone] = {}

    def copied(config: BackboneConfig) -> ClipBackbone:
        key = config.model_dump_json()
        if key not in loaded:
            loaded[key] = load(config)
        tokenizer = loaded[key]._tokenizer  # type: ignore[attr-defined]
        return copy.deepcopy(loaded[key], {id(tokenizer): tokenizer})

    return copied


def _kept_drawings(draw: Callable[..., drawing.Drawing]) -> Callable[..., drawing.Drawing]:
    drawn: dict[bytes, drawing.Drawing] = {}

    def kept(name: str, alt: str, plot: Callable[[float], Any]) -> drawing.Drawing:
        buffer = io.BytesIO()
        _ByWhatIsDrawn(buffer).dump((name, alt, plot))
        key = buffer.getvalue()
        if key not in drawn:
            drawn[key] = draw(name, alt, plot)
        return drawn[key]

    return kept


class _ByWhatIsDrawn(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        """Figures show the steps and the method of a run, and of its other records what they are handed beside it."""
        return repr((value.steps, value.trained.method)) if isinstance(value, RunRecord) else None
