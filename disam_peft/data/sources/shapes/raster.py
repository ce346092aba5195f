"""Drawing with whole numbers, so that the results are the same on every machine, to the last bit.

Coordinates count in 1/256 of a pixel, opacities and colours from 0 to 256 (colours reach 255 on output). Letters:
H, W rows and columns of the picture (both SIZE), N points.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import numpy as np

SIZE: Final = 64
UNIT: Final = 256
"""Subpixels in a pixel; also the opacity of something opaque."""
HUES: Final = 6 * 256
"""Steps of the hue circle; 0 is red, 512 green, 1024 blue."""

_ROWS_PER_PIXEL: Final = 4
_ONE: Final = 1 << 14
# Rounded, so that the last bit of the machine's cosine does not matter: no entry lies near a tie.
_COSINES: Final = tuple(round(_ONE * math.cos(math.radians(degree))) for degree in range(360))


class Draws:
    """Random whole numbers from a key: the same (seed, split, ...) gives the same numbers everywhere.

    Only the raw output of the Philox generator is used, which NumPy does not change from version to version. Its
    distributions may change.
    """

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
        self._source = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
        self._ready: list[int] = []

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound - 1``."""
        if not self._ready:
            self._ready = (self._source.random_raw(64) >> np.uint64(32)).tolist()
        return self._ready.pop() * bound >> 32

    def between(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def noise(self, *shape: int) -> np.ndarray:
        """int32 values from -128 to 127."""
        count = math.prod(shape)
        words = self._source.random_raw(-(-count // 8)).astype("<u8")
        return words.view(np.int8)[:count].astype(np.int32).reshape(shape)


def cosine(degrees: int) -> int:
    """In units of 1/16384."""
    return _COSINES[degrees % 360]


def sine(degrees: int) -> int:
    """In units of 1/16384."""
    return _COSINES[(degrees - 90) % 360]


def place(points_N2: np.ndarray, degrees: int, scale: tuple[int, int], centre: tuple[int, int]) -> np.ndarray:
    """Stretch, turn and move points that count in 1/1024 of a radius; ``scale`` and ``centre`` are in subpixels."""
    x_N = points_N2[:, 0] * scale[0]
    y_N = points_N2[:, 1] * scale[1]
    c, s = cosine(degrees), sine(degrees)
    shift = 10 + 14  # 1/1024 of a radius times 1/16384 of a cosine
    return np.stack([(c * x_N - s * y_N >> shift) + centre[0], (s * x_N + c * y_N >> shift) + centre[1]], axis=1)


def coverage(polygons: Sequence[np.ndarray]) -> np.ndarray:
    """How much of each pixel lies inside, (H, W) int32 from 0 to 256.

    Exact across a row and sampled at four heights per pixel. A polygon that runs the other way round cuts a hole.

    Args:
        polygons: (N, 2) int64 corners (x, y) in subpixels, closed by themselves.
    """
    starts = np.concatenate(polygons)
    ends = np.concatenate([np.concatenate([polygon[1:], polygon[:1]]) for polygon in polygons])
    up = ends[:, 1] < starts[:, 1]
    top, bottom = np.where(up[:, None], ends, starts), np.where(up[:, None], starts, ends)
    step = UNIT // _ROWS_PER_PIXEL
    heights = np.arange(SIZE * _ROWS_PER_PIXEL, dtype=np.int64) * step + step // 2
    edge, row = np.nonzero((heights >= top[:, 1:]) & (heights < bottom[:, 1:]))
    slope_x, slope_y = (bottom - top).T
    x = top[edge, 0] + slope_x[edge] * (heights[row] - top[edge, 1]) // slope_y[edge]
    x = np.clip(x, 0, SIZE * UNIT)
    column, part = x >> 8, x & 255
    sign = np.where(up[edge], -1, 1)
    # What lies right of a crossing is covered: all of the later columns, a part of its own.
    cell = (row // _ROWS_PER_PIXEL) * (SIZE + 2) + column
    cells = np.concatenate([cell, cell + 1])
    amounts = np.concatenate([sign * (UNIT - part), sign * part])
    # bincount adds in float64, which holds whole numbers of this size exactly
    jumps = np.bincount(cells, amounts, minlength=SIZE * (SIZE + 2)).reshape(SIZE, SIZE + 2)
    total = np.abs(np.cumsum(jumps, axis=1)[:, :SIZE]).astype(np.int32) // _ROWS_PER_PIXEL
    return np.minimum(total, UNIT)


def mix(below: np.ndarray, above: np.ndarray | Sequence[int], opacity_HW: np.ndarray) -> np.ndarray:
    """``above`` (a picture or one colour) laid over ``below``, both (H, W, 3) int32."""
    return below + ((np.asarray(above, dtype=np.int32) - below) * opacity_HW[:, :, None] >> 8)


def grown(mask_HW: np.ndarray) -> np.ndarray:
    """The mask, a pixel wider on each of the four sides."""
    wide = np.pad(mask_HW, 1)
    out = np.maximum(wide[:-2, 1:-1], wide[2:, 1:-1])
    np.maximum(out, wide[1:-1, :-2], out=out)
    np.maximum(out, wide[1:-1, 2:], out=out)
    return np.maximum(out, mask_HW)


def shrunk(mask_HW: np.ndarray) -> np.ndarray:
    """The mask, a pixel narrower on each of the four sides."""
    return UNIT - grown(UNIT - mask_HW)


def shifted(mask_HW: np.ndarray, down: int, right: int) -> np.ndarray:
    """The mask moved by whole pixels, 0 to SIZE; empty where nothing came from."""
    out = np.zeros_like(mask_HW)
    out[down:, right:] = mask_HW[: SIZE - down, : SIZE - right]
    return out


def blurred(picture_HWC: np.ndarray) -> np.ndarray:
    """Means of three by three pixels, weighted 1 2 1 in each direction; borders repeat."""
    wide = np.pad(picture_HWC, ((1, 1), (0, 0), (0, 0)), mode="edge")
    rows = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    wide = np.pad(rows, ((0, 0), (1, 1), (0, 0)), mode="edge")
    return wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:] >> 4


def clouds(draws: Draws, cells: int) -> np.ndarray:
    """Smooth noise, (H, W) int32 from -128 to 127: a grid of ``cells`` by ``cells`` random heights, interpolated."""
    weights = _INTERPOLATION[cells]
    heights = draws.noise(cells + 1, cells + 1).astype(np.float64)
    # Products and sums of small whole numbers: exact in float64, and much faster there.
    return (weights @ heights @ weights.T).astype(np.int32) >> 12


def hsv(hue: int, saturation: int, value: int) -> tuple[int, int, int]:
    """Red, green and blue from 0 to 256, of a hue on a circle of HUES steps."""
    sector, part = divmod(hue % HUES, 256)
    low = value * (256 - saturation) >> 8
    falling = value * (65536 - saturation * part) >> 16
    rising = value * (65536 - saturation * (256 - part)) >> 16
    return (
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    )[sector]


def _interpolation(cells: int) -> np.ndarray:
    """(H, cells + 1) weights of the grid's lines in 1/64."""
    weights = np.zeros((SIZE, cells + 1))
    for row in range(SIZE):
        line, part = divmod(row * cells, SIZE)
        weights[row, line] += SIZE - part
        weights[row, line + 1] += part
    return weights


_INTERPOLATION: Final = {cells: _interpolation(cells) for cells in (6, 24)}
