"""How the six domains look. One renderer paints them all; a style gives a range for each of its settings."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Generic, TypeVar

from disam_peft.data.sources.shapes.raster import HUES, Draws

T = TypeVar("T")
Range = tuple[int, int]


@dataclass(frozen=True)
class Knobs(Generic[T]):
    """The renderer's settings; opacities, saturations and values from 0 to 256, the rest as said."""

    ground_hue: T
    ground_saturation: T
    ground_value: T
    gradient: T
    """Rise of the ground's value over the picture."""
    grid: T
    """Opacity of ruled lines."""
    clutter: T
    """Number of stray pieces behind the object."""
    clutter_opacity: T
    clutter_thin: T
    """Share of the pieces that are lines, in 1/256."""
    in_front: T
    """Number of stray pieces before the object."""
    fill: T
    """Opacity of the object's surface."""
    fill_saturation: T
    fill_value: T
    contrast: T
    """Least distance between the values of object and ground."""
    shading: T
    """Difference of light over the object."""
    hatch: T
    """Opacity of the strokes on the object."""
    outline: T
    """Opacity of the object's outline."""
    outline_width: T
    """0 to 512: a thin line to one of three pixels."""
    ink_saturation: T
    ink_value: T
    wobble: T
    """How far each corner strays, in 1/256 pixel."""
    shadow: T
    smear: T
    """How far brush strokes drag the pixels, in 1/256 pixel."""
    coarse: T
    """Strength of cloudy texture."""
    fine: T
    """Strength of fine texture."""
    blur: T
    """0 to 512: up to two passes."""
    grain: T
    """Strength of the noise of single pixels."""


Style = Knobs[Range]
Look = Knobs[int]
NAMES: Final = tuple(field.name for field in fields(Knobs))

STYLES: Final[dict[str, Style]] = {
    "blueprint": Knobs(
        ground_hue=(960, 1080), ground_saturation=(140, 220), ground_value=(80, 160), gradient=(0, 50),
        grid=(40, 130), clutter=(1, 5), clutter_opacity=(50, 150), clutter_thin=(190, 256), in_front=(0, 1),
        fill=(0, 70), fill_saturation=(40, 160), fill_value=(120, 220), contrast=(20, 60), shading=(0, 40),
        hatch=(0, 110), outline=(150, 256), outline_width=(0, 160), ink_saturation=(0, 60), ink_value=(200, 256),
        wobble=(0, 70), shadow=(0, 0), smear=(0, 50), coarse=(0, 40), fine=(0, 30), blur=(0, 160), grain=(0, 20),
    ),
    "cartoon": Knobs(
        ground_hue=(0, HUES - 1), ground_saturation=(40, 180), ground_value=(150, 256), gradient=(0, 40),
        grid=(0, 0), clutter=(1, 5), clutter_opacity=(80, 256), clutter_thin=(0, 90), in_front=(0, 1),
        fill=(256, 256), fill_saturation=(120, 256), fill_value=(130, 256), contrast=(0, 40), shading=(0, 50),
        hatch=(0, 60), outline=(170, 256), outline_width=(100, 420), ink_saturation=(0, 120), ink_value=(0, 70),
        wobble=(20, 130), shadow=(0, 60), smear=(0, 120), coarse=(0, 20), fine=(0, 10), blur=(0, 100), grain=(0, 8),
    ),
    "painting": Knobs(
        ground_hue=(0, HUES - 1), ground_saturation=(60, 180), ground_value=(60, 210), gradient=(0, 80),
        grid=(0, 0), clutter=(2, 6), clutter_opacity=(90, 220), clutter_thin=(0, 120), in_front=(0, 1),
        fill=(190, 256), fill_saturation=(60, 200), fill_value=(60, 230), contrast=(40, 80), shading=(20, 100),
        hatch=(0, 130), outline=(0, 110), outline_width=(60, 300), ink_saturation=(0, 140), ink_value=(10, 110),
        wobble=(60, 220), shadow=(0, 70), smear=(200, 620), coarse=(10, 60), fine=(20, 60), blur=(40, 200),
        grain=(0, 24),
    ),
    "photo": Knobs(
        ground_hue=(0, HUES - 1), ground_saturation=(10, 120), ground_value=(40, 220), gradient=(20, 110),
        grid=(0, 40), clutter=(3, 8), clutter_opacity=(110, 240), clutter_thin=(30, 150), in_front=(0, 2),
        fill=(256, 256), fill_saturation=(50, 220), fill_value=(60, 240), contrast=(36, 70), shading=(80, 190),
        hatch=(0, 40), outline=(0, 60), outline_width=(0, 120), ink_saturation=(0, 60), ink_value=(0, 90),
        wobble=(0, 50), shadow=(50, 150), smear=(0, 60), coarse=(10, 50), fine=(0, 36), blur=(60, 340),
        grain=(6, 26),
    ),
    "silhouette": Knobs(
        ground_hue=(0, 420), ground_saturation=(30, 200), ground_value=(110, 250), gradient=(40, 150),
        grid=(0, 0), clutter=(1, 6), clutter_opacity=(60, 230), clutter_thin=(60, 200), in_front=(0, 2),
        fill=(230, 256), fill_saturation=(0, 90), fill_value=(0, 60), contrast=(50, 80), shading=(0, 40),
        hatch=(0, 0), outline=(0, 50), outline_width=(0, 200), ink_saturation=(0, 60), ink_value=(0, 60),
        wobble=(0, 90), shadow=(0, 40), smear=(0, 160), coarse=(0, 60), fine=(0, 30), blur=(40, 300), grain=(0, 24),
    ),
    "sketch": Knobs(
        ground_hue=(100, 260), ground_saturation=(0, 40), ground_value=(200, 256), gradient=(0, 30),
        grid=(0, 30), clutter=(1, 5), clutter_opacity=(40, 140), clutter_thin=(130, 256), in_front=(0, 1),
        fill=(0, 80), fill_saturation=(0, 50), fill_value=(120, 220), contrast=(10, 60), shading=(0, 60),
        hatch=(30, 200), outline=(120, 256), outline_width=(0, 180), ink_saturation=(0, 30), ink_value=(0, 100),
        wobble=(60, 220), shadow=(0, 40), smear=(0, 130), coarse=(0, 30), fine=(10, 50), blur=(0, 140), grain=(0, 28),
    ),
}  # fmt: skip


def blended(own: Style, other: Style, share: float) -> Style:
    """``own`` with every range moved towards that of ``other``: fully at share 1. At 0.5, two styles become one.

    The share counts in steps of 1/256.
    """
    part = round(256 * share)

    def between(a: int, b: int) -> int:
        return a * (256 - part) + b * part >> 8

    ranges = {}
    for name in NAMES:
        (low, high), (other_low, other_high) = getattr(own, name), getattr(other, name)
        ranges[name] = (between(low, other_low), between(high, other_high))
    return Knobs(**ranges)


def draw_look(style: Style, draws: Draws) -> Look:
    """A random value from the range of every setting."""
    return Knobs(**{name: draws.between(*getattr(style, name)) for name in NAMES})
