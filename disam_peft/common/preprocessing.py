"""The size and normalisation of the images that a model expects, and how a checkpoint makes them from pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Resize = Literal["shortest", "longest", "squash", "none"]
Resampling = Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]


@dataclass(frozen=True)
class Preprocessing:
    """How the images of the checkpoint's own training were made; augmented images end in the same form.

    A picture is resized by ``resize``, cut or padded in the middle to ``size``, and its levels v from 0 to 255 become
    (v * scale - mean) / std.
    """

    size: tuple[int, int]
    """Height and width in pixels of what the model sees."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Resampling
    resize: Resize = "shortest"
    """``shortest``: the picture keeps its aspect and covers ``resized``, what stands over is cut off. ``longest``: it
    keeps its aspect and fits into ``resized``, what is left free is filled. ``squash``: it is resized to ``resized``
    whatever its aspect. ``none``: it is not resized."""
    resized: tuple[int, int] | None = None
    """Height and width that ``resize`` aims at; None: ``size``."""
    fill: int = 0
    """The level of what a picture does not fill."""
    scale: float = 1 / 255
    own: Callable[[Any], Any] | None = field(default=None, compare=False, repr=False)
    """The checkpoint's own transform, an RGB picture to a (3, H, W) float32 tensor: what evaluation sees, and what
    training without augmentation sees. None only where no model is behind these numbers."""

    @property
    def target(self) -> tuple[int, int]:
        """Height and width that ``resize`` aims at."""
        return self.resized or self.size

    def describe(self) -> dict[str, Any]:
        """Every number of it; JSON types only."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "own"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
