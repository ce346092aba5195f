"""How a model wants its images, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preprocessing:
    """What the checkpoint was trained to see; training augmentation ends in the same size and normalisation."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]
