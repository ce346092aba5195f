"""The twelve classes of DomainShapes as polygons.

Corners count in 1/1024 of the object's radius, y downwards. A polygon that runs the other way round is a hole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from disam_peft.data.sources.shapes.raster import cosine, sine

Point = tuple[int, int]

_R: Final = 1024
_LONGEST: Final = 360
"""Longer edges are divided, so that a trembling hand bends them."""


def _arc(radius: int, start: int, stop: int, count: int, centre: Point = (0, 0)) -> list[Point]:
    """``count`` points from ``start`` to ``stop`` degrees, both included; 0 points right, 90 down."""
    angles = [start + (stop - start) * k // (count - 1) for k in range(count)]
    return [(centre[0] + (cosine(a) * radius >> 14), centre[1] + (sine(a) * radius >> 14)) for a in angles]


def _regular(corners: int, start: int, radius: int = _R) -> list[Point]:
    return _arc(radius, start, start + 360 - 360 // corners, corners)


def _star() -> list[Point]:
    outer, inner = _regular(5, -90), _regular(5, -54, 430)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _cross() -> list[Point]:
    a, b = 330, 980
    return [
        *[(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)],
        *[(a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)],
    ]


def _heart() -> list[Point]:
    return [
        (0, 960),
        *_arc(500, 145, 340, 11, (-480, -330)),
        *_arc(500, 200, 395, 11, (480, -330)),
    ]


def _crescent() -> list[Point]:
    return [*_arc(_R, 40, 320, 21), *_arc(740, 305, 55, 13, (360, 0))]


def _house() -> list[Point]:
    return [
        *[(0, -980), (360, -620), (360, -900), (600, -900), (600, -380), (900, -80), (660, -80), (660, 880)],
        *[(-660, 880), (-660, -80), (-900, -80)],
    ]


_OUTLINES: Final[dict[str, list[list[Point]]]] = {
    "arrow": [[(1000, 0), (240, -720), (240, -290), (-960, -290), (-960, 290), (240, 290), (240, 720)]],
    "circle": [_regular(36, 0, 960)],
    "crescent": [_crescent()],
    "cross": [_cross()],
    "diamond": [[(0, -1024), (620, 0), (0, 1024), (-620, 0)]],
    "heart": [_heart()],
    "hexagon": [_regular(6, 0)],
    "house": [_house(), [(-170, 880), (170, 880), (170, 330), (-170, 330)]],
    "ring": [_regular(36, 0), _arc(540, 360, 15, 24)],
    "square": [[(-800, -800), (800, -800), (800, 800), (-800, 800)]],
    "star": [_star()],
    "triangle": [[(0, -960), (960, 720), (-960, 720)]],
}


def _divided(corners: Sequence[Point]) -> np.ndarray:
    points = np.asarray(corners, dtype=np.int64)
    out = []
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        parts = max(1, int(np.abs(end - start).max()) // _LONGEST)
        out += [start + (end - start) * k // parts for k in range(parts)]
    return np.stack(out)


OUTLINES: Final = {name: tuple(_divided(polygon) for polygon in polygons) for name, polygons in _OUTLINES.items()}
"""Class -> its polygons, (N, 2) int64 each."""
