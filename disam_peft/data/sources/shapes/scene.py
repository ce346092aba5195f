"""One image of DomainShapes. First its content is drawn at random, then the content is painted."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from disam_peft.data.sources.shapes.outlines import OUTLINES
from disam_peft.data.sources.shapes.raster import (
    HUES,
    SIZE,
    UNIT,
    Draws,
    blurred,
    clouds,
    coverage,
    grown,
    hsv,
    mix,
    place,
    shifted,
    shrunk,
)
from disam_peft.data.sources.shapes.styles import STYLES, Look, Style, draw_look

_ANGLE = 18
_SMALLEST, _LARGEST = 15 * UNIT, 27 * UNIT


@dataclass(frozen=True)
class Scene:
    """The content of an image. Its texture and clutter are drawn from ``key``."""

    class_name: str
    hue: int
    """Of the object, of HUES."""
    radius: int
    """Subpixels."""
    centre: tuple[int, int]
    """Subpixels, (x, y)."""
    degrees: int
    stretch: tuple[int, int]
    """Width and height in 1/256."""
    look: Look
    key: tuple[int | str, ...]


def draw_scene(
    seed: int,
    split: str,
    domain: str,
    class_name: str,
    index: int,
    *,
    style: Style | None = None,
    hue: int | None = None,
) -> Scene:
    """The scene number ``index``; a pure function of its arguments.

    Args:
        domain, class_name: of DOMAINS and CLASSES.
        style: another style than the domain's own.
        hue: the object's colour, of HUES; it then shows in every domain, also where objects are grey.
    """
    key = (seed, split, domain, class_name, index)
    draws = Draws("scene", *key)
    radius = draws.between(_SMALLEST, _LARGEST)
    room = (SIZE * UNIT) // 2 - radius + 2 * UNIT  # an object may lean over the border by two pixels
    centre = (SIZE * UNIT // 2 + draws.between(-room, room), SIZE * UNIT // 2 + draws.between(-room, room))
    degrees = draws.between(-_ANGLE, _ANGLE)
    stretch = (draws.between(218, 256), draws.between(218, 256))
    own_hue = draws.below(HUES)
    look = draw_look(STYLES[domain] if style is None else style, draws)
    if hue is not None:
        look = replace(
            look,
            fill=max(look.fill, 170),
            fill_saturation=max(look.fill_saturation, 170),
            fill_value=max(look.fill_value, 110),
        )
    return Scene(class_name, own_hue if hue is None else hue, radius, centre, degrees, stretch, look, key)


def paint(scene: Scene) -> np.ndarray:
    """The picture, (64, 64, 3) uint8."""
    draws = Draws("picture", *scene.key)
    look = scene.look
    ground = _ground(look, draws)
    picture = _clutter(ground, look, look.clutter, draws)
    mask, ink_mask = _object_masks(scene, draws)
    if look.shadow:
        soft = blurred(shifted(mask, 3, 2)[:, :, None])[:, :, 0]
        picture = mix(picture, (0, 0, 0), soft * look.shadow >> 8)
    value = _apart(look.fill_value, look.ground_value, look.contrast)
    surface = np.broadcast_to(np.asarray(hsv(scene.hue, look.fill_saturation, value), dtype=np.int32), picture.shape)
    if look.shading:
        surface = surface + (_slope(draws) * look.shading >> 8)[:, :, None]
    picture = mix(picture, surface, mask * look.fill >> 8)
    ink = hsv(scene.hue, look.ink_saturation, look.ink_value)
    if look.hatch:
        picture = mix(picture, ink, (mask * _hatching(draws) >> 8) * look.hatch >> 8)
    if look.outline:
        picture = mix(picture, ink, ink_mask * look.outline >> 8)
    picture = _clutter(picture, look, look.in_front, draws)
    return _finish(picture, look, draws)


def _ground(look: Look, draws: Draws) -> np.ndarray:
    colour = np.asarray(hsv(look.ground_hue, look.ground_saturation, look.ground_value), dtype=np.int32)
    picture = np.broadcast_to(colour, (SIZE, SIZE, 3))
    if look.gradient:
        picture = picture + (_slope(draws) * look.gradient >> 8)[:, :, None]
    if look.grid:
        pitch, offset = draws.between(6, 12), draws.below(12)
        lines = (np.arange(SIZE) + offset) % pitch == 0
        opacity = np.where(lines[:, None] | lines[None, :], look.grid, 0).astype(np.int32)
        picture = mix(picture, hsv(look.ground_hue, look.ink_saturation, look.ink_value), opacity)
    return picture


def _clutter(picture: np.ndarray, look: Look, count: int, draws: Draws) -> np.ndarray:
    """Stray lines and pieces at random places, on the object as well as elsewhere."""
    for _ in range(count):
        is_line = draws.below(256) < look.clutter_thin
        centre = (draws.below(SIZE * UNIT), draws.below(SIZE * UNIT))
        degrees = draws.below(360)
        if is_line:
            corners = _BAR
            scale = (draws.between(5 * UNIT, 24 * UNIT), draws.between(90, 260))
            colour = hsv(draws.below(HUES), look.ink_saturation, look.ink_value)
        else:
            corners = _PIECE + draws.noise(4, 2) * 3
            scale = (draws.between(3 * UNIT, 11 * UNIT), draws.between(3 * UNIT, 11 * UNIT))
            value = (look.ground_value + 3 * draws.between(0, 256) + look.fill_value) // 5
            colour = hsv(draws.below(HUES), look.fill_saturation * 3 // 4, value)
        piece = coverage([place(corners, degrees, scale, centre)])
        picture = mix(picture, colour, piece * look.clutter_opacity >> 8)
    return picture


def _object_masks(scene: Scene, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Opacity of the surface and of its outline, (H, W) int32 each."""
    look = scene.look
    scale = (scene.radius * scene.stretch[0] >> 8, scene.radius * scene.stretch[1] >> 8)
    polygons = []
    for corners in OUTLINES[scene.class_name]:
        placed = place(corners, scene.degrees, scale, scene.centre)
        polygons.append(placed + (draws.noise(*placed.shape) * look.wobble >> 7))
    mask = coverage(polygons)
    inner = shrunk(mask)
    wide = look.outline_width
    line = mask - inner
    if wide:
        line = line + ((grown(mask) - mask) * min(wide, 256) >> 8)
    if wide > 256:
        line = line + ((inner - shrunk(inner)) * (wide - 256) >> 8)
    return mask, np.minimum(line, UNIT)


def _apart(value: int, other: int, distance: int) -> int:
    if abs(value - other) >= distance:
        return value
    return other + distance if other < 128 else other - distance


def _slope(draws: Draws) -> np.ndarray:
    """A slope in a random direction, (H, W) int32 from about -180 to 180."""
    down, right = draws.between(-128, 128), draws.between(-128, 128)
    steps = 2 * np.arange(SIZE, dtype=np.int32) - (SIZE - 1)
    return (down * steps[:, None] + right * steps[None, :]) // (SIZE - 1) * 11 >> 3


def _hatching(draws: Draws) -> np.ndarray:
    """Parallel strokes, (H, W) int32 from 0 to 256."""
    down, right = draws.between(1, 3), draws.between(-3, 3)
    pitch = draws.between(8, 14)
    ramp = down * np.arange(SIZE, dtype=np.int32)[:, None] + right * np.arange(SIZE, dtype=np.int32)[None, :]
    return np.where(ramp % pitch < 1 + pitch // 4, UNIT, 0).astype(np.int32)


def _finish(picture: np.ndarray, look: Look, draws: Draws) -> np.ndarray:
    if look.coarse or look.fine:
        texture = clouds(draws, 6) * look.coarse + clouds(draws, 24) * look.fine
        picture = picture + (texture >> 7)[:, :, None]
    if look.smear:
        down, right = (_PLACES + (clouds(draws, cells) * look.smear >> 15) for cells in (24, 24))
        rows = np.clip(down.T, 0, SIZE - 1)
        columns = np.clip(right, 0, SIZE - 1)
        picture = picture[rows, columns]
    for strength in (min(look.blur, 256), look.blur - 256):
        if strength > 0:
            picture = picture + ((blurred(picture) - picture) * strength >> 8)
    if look.grain:
        picture = picture + (draws.noise(SIZE, SIZE, 3) * look.grain >> 7)
    return np.clip(picture, 0, 255).astype(np.uint8)


_BAR = np.asarray([(-1024, -1024), (1024, -1024), (1024, 1024), (-1024, 1024)], dtype=np.int64)
_PIECE = np.asarray([(-700, -700), (700, -700), (700, 700), (-700, 700)], dtype=np.int64)
_PLACES = np.arange(SIZE, dtype=np.int32)[None, :]
