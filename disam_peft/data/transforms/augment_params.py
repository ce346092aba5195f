"""The random parameters of the augmentation of each image, drawn from (seed, epoch, index) alone. B images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from disam_peft.common.random import keyed_uniforms
from disam_peft.config.data import AugmentConfig

ATTEMPTS = 10
ASPECTS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class AugmentParams:
    """What is done to each image of a batch. Only the crop box depends on the size of the image, see ``boxes``."""

    area_BA: np.ndarray
    """(B, attempts) share of the image's area that the box covers."""
    aspect_BA: np.ndarray
    """(B, attempts) width / height of the box."""
    place_B2: np.ndarray
    """(B, 2) where the box lies, as a share in [0, 1) of the height and width that it leaves free."""
    flip_B: np.ndarray
    """(B,) bool: mirrored left to right."""
    order_B4: np.ndarray
    """(B, 4) which change comes first, second, ...: 0 is brightness, 1 contrast, 2 saturation, 3 hue."""
    strength_B4: np.ndarray
    """(B, 4) by the same numbers: three factors, and the share of the circle by which the hue is turned."""
    grey_B: np.ndarray
    """(B,) bool: without colour."""

    def boxes(self, grid: tuple[int, int], sizes_B2: np.ndarray) -> np.ndarray:
        """(B, 4) top, left, height and width of the boxes, in whole pixels of the grid.

        The first attempt that fits into the image is taken. Where none fits, it is the largest box in the middle whose
        aspect is allowed, as in torchvision's RandomResizedCrop.

        Args:
            grid: height and width of the stored image.
            sizes_B2: height and width that it had before it was squeezed into the grid.
        """
        height_B, width_B = np.asarray(sizes_B2, dtype=np.float64).T
        image_B = width_B / height_B
        relative_BA = self.aspect_BA / image_B[:, None]
        # Shares of height and width, not pixels: the same attempt fits whatever the grid.
        high_BA, wide_BA = np.sqrt(self.area_BA / relative_BA), np.sqrt(self.area_BA * relative_BA)
        fits_BA = np.logical_and(high_BA <= 1, wide_BA <= 1)
        first_B1 = fits_BA.argmax(1)[:, None]
        found_B = fits_BA.any(1)
        allowed_B = np.clip(image_B, *ASPECTS)
        high_B = np.where(found_B, np.take_along_axis(high_BA, first_B1, 1)[:, 0], np.minimum(1, image_B / allowed_B))
        wide_B = np.where(found_B, np.take_along_axis(wide_BA, first_B1, 1)[:, 0], np.minimum(1, allowed_B / image_B))
        high_B, wide_B = _whole(high_B, grid[0]), _whole(wide_B, grid[1])
        room_B2 = np.stack([grid[0] - high_B, grid[1] - wide_B], axis=1)
        corner_B2 = np.where(found_B[:, None], np.floor(self.place_B2 * (room_B2 + 1)), room_B2 // 2)
        return np.column_stack([corner_B2, high_B, wide_B]).astype(np.int64)


def draw_params(config: AugmentConfig, seed: int, indices: Sequence[int], epochs: Sequence[int]) -> AugmentParams:
    """The parameters of these samples; each sample's depend on its own key and on nothing else in the batch."""
    count = 2 * ATTEMPTS + 2 + 1 + 4 + 4 + 1
    uniform = np.stack(
        [keyed_uniforms(count, seed, epoch, index) for index, epoch in zip(indices, epochs, strict=True)]
    )
    area_BA, aspect_BA, place_B2, flip_B1, order_B4, strength_B4, grey_B1 = np.split(
        uniform, np.cumsum([ATTEMPTS, ATTEMPTS, 2, 1, 4, 4]), axis=1
    )
    low, high = config.scale
    narrow, wide = (math.log(aspect) for aspect in ASPECTS)
    strength_B4 = config.color_jitter * (2 * strength_B4 - 1)
    return AugmentParams(
        area_BA=low + (high - low) * area_BA,
        aspect_BA=np.exp(narrow + (wide - narrow) * aspect_BA),
        place_B2=place_B2,
        flip_B=flip_B1[:, 0] < config.flip,
        order_B4=order_B4.argsort(1, kind="stable"),
        strength_B4=strength_B4 + np.array([1, 1, 1, 0]),  # no change is factor 1, turn 0
        grey_B=grey_B1[:, 0] < config.grayscale,
    )


def middle_boxes(
    grid: tuple[int, int], sizes_B2: np.ndarray, size: tuple[int, int], resized: tuple[int, int] | None = None
) -> np.ndarray:
    """(B, 4) the box in the middle that becomes ``size``, in whole pixels of the grid.

    Args:
        resized: height and width that an image is resized to cover before ``size`` is cut out of it. Unset: ``size``,
            and the box is the largest one with its aspect.
    """
    resized = resized or size
    height_B, width_B = np.asarray(sizes_B2, dtype=np.float64).T
    relative_B = (resized[1] / resized[0]) / (width_B / height_B)
    high_B = _whole(np.minimum(1, np.minimum(1, 1 / relative_B) * (size[0] / resized[0])), grid[0])
    wide_B = _whole(np.minimum(1, np.minimum(1, relative_B) * (size[1] / resized[1])), grid[1])
    return np.column_stack([(grid[0] - high_B) // 2, (grid[1] - wide_B) // 2, high_B, wide_B]).astype(np.int64)


def _whole(share: np.ndarray, pixels: int) -> np.ndarray:
    return np.maximum(1, np.round(share * pixels))
