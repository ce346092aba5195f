"""DomainShapes: a benchmark of twelve shapes in six styles that is painted on demand, without a download.

Every image is a pure function of (seed, split, domain, class, index), computed in whole numbers: the same bytes on
every machine. The names below are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CLASSES": "names",
    "DOMAINS": "names",
    "HUES": "raster",
    "STYLES": "styles",
    "Draws": "raster",
    "OverlapConfig": "config",
    "Scene": "scene",
    "ShapeSample": "source",
    "ShapesConfig": "config",
    "blended": "styles",
    "draw_scene": "scene",
    "list_shapes": "source",
    "paint": "scene",
    "paint_shape": "source",
    "read_shapes": "source",
    "write_shapes": "source",
}
__all__ = [
    "CLASSES",
    "DOMAINS",
    "HUES",
    "STYLES",
    "Draws",
    "OverlapConfig",
    "Scene",
    "ShapeSample",
    "ShapesConfig",
    "blended",
    "draw_scene",
    "list_shapes",
    "paint",
    "paint_shape",
    "read_shapes",
    "write_shapes",
]

if TYPE_CHECKING:
    from disam_peft.data.shapes.config import OverlapConfig, ShapesConfig
    from disam_peft.data.shapes.names import CLASSES, DOMAINS
    from disam_peft.data.shapes.raster import HUES, Draws
    from disam_peft.data.shapes.scene import Scene, draw_scene, paint
    from disam_peft.data.shapes.source import ShapeSample, list_shapes, paint_shape, read_shapes, write_shapes
    from disam_peft.data.shapes.styles import STYLES, blended


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'disam_peft.data.shapes' has no attribute {name!r}")
    return getattr(importlib.import_module(f"disam_peft.data.shapes.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
