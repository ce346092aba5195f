"""The augmentation of a batch of images at once, on the device where the batch is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from disam_peft.common.device import constant, to_device
from disam_peft.common.preprocessing import Preprocessing
from disam_peft.config.data import AugmentConfig
from disam_peft.data.transforms import color as colors
from disam_peft.data.transforms.augment_params import AugmentParams, draw_params, middle_boxes
from disam_peft.data.transforms.resize import Interpolation, crop_resize
from disam_peft.errors import UserError

_CHANGES = (colors.brightness, colors.contrast, colors.saturation, colors.hue)


class BatchAugment:
    """``augment(images, indices, epochs)``: uint8 images to normalised float32 pixels.

    The kinds of change and their strengths are those of ``TrainTransform``, the random numbers are not: torchvision
    draws once for a whole batch, and here each image has draws of its own.

    The draws for an image depend on its (seed, epoch, index) alone, so its result is the same in any batch, order and
    process: to the bit on a CPU, elsewhere up to the rounding of the device's matrix products.

    Args:
        preprocessing, config, seed: as for ``TrainTransform``.

    Raises:
        UserError: a model whose images are padded, or resized by another filter than bicubic and bilinear.
    """

    def __init__(self, preprocessing: Preprocessing, config: AugmentConfig, seed: int) -> None:
        filters: dict[str, Interpolation] = {"bicubic": "bicubic", "bilinear": "bilinear"}
        if preprocessing.resize in ("longest", "none") or preprocessing.interpolation not in filters:
            raise UserError(
                "data.pixel_store keeps resized images, which this model's transform cannot begin from (resize "
                f"'{preprocessing.resize}', {preprocessing.interpolation} filter): it takes resize 'shortest' or "
                "'squash' and a bicubic or bilinear filter; leave out data.pixel_store"
            )
        self.preprocessing, self.config, self.seed = preprocessing, config, seed
        self.filter: Interpolation = filters[preprocessing.interpolation]

    def __call__(
        self, images: Tensor, indices: Sequence[int], epochs: Sequence[int], sizes_B2: np.ndarray | None = None
    ) -> Tensor:
        """(B, 3, H, W) uint8 to (B, 3, h, w) float32.

        Args:
            sizes_B2: height and width of each image before it was squeezed into (H, W); boxes have the aspect that
                they would have had there. Unset: nothing was squeezed.
        """
        grid, wanted = (images.shape[2], images.shape[3]), self.preprocessing
        if wanted.resize == "squash":  # evaluation gives every picture this aspect
            sizes_B2 = np.tile(wanted.target, (len(images), 1))
        elif sizes_B2 is None:
            sizes_B2 = np.tile(grid, (len(images), 1))
        if self.config.kind == "none":
            params, boxes_B4 = None, middle_boxes(grid, sizes_B2, wanted.size, wanted.target)
        else:
            params = draw_params(self.config, self.seed, indices, epochs)
            boxes_B4 = params.boxes(grid, sizes_B2)
        if images.device.type != "cpu":
            return self._augment_part(images, boxes_B4, params, slice(None))
        # One by one: an image and the values computed from it fit into the processor's cache, those of a batch do not.
        result = torch.empty((len(images), 3, *self.preprocessing.size))
        for i in range(len(images)):
            result[i] = self._augment_part(images, boxes_B4, params, slice(i, i + 1))[0]
        return result

    def _augment_part(self, images: Tensor, boxes_B4: np.ndarray, params: AugmentParams | None, part: slice) -> Tensor:
        wanted, boxes = self.preprocessing, boxes_B4[part]
        flip_B = np.zeros(len(boxes), dtype=bool) if params is None else params.flip_B[part]
        pixels = crop_resize(images[part], boxes, flip_B, wanted.size, self.filter).div_(255)
        if params is not None:
            pixels = self._recolored(pixels, params.order_B4[part], params.strength_B4[part], params.grey_B[part])
        if wanted.scale != 1 / 255:
            pixels = pixels.mul_(255 * wanted.scale)
        mean, std = (constant(v, pixels.dtype, pixels.device).view(1, 3, 1, 1) for v in (wanted.mean, wanted.std))
        return pixels.sub_(mean).div_(std)

    def _recolored(self, pixels: Tensor, order_B4: np.ndarray, strength_B4: np.ndarray, grey_B: np.ndarray) -> Tensor:
        if self.config.color_jitter > 0:
            for turn_B in order_B4.T:
                for number, change in enumerate(_CHANGES):
                    pixels = _changed(pixels, turn_B == number, change, strength_B4[:, number])
        return _changed(pixels, grey_B, colors.saturation, np.zeros(len(grey_B)))


def _changed(
    pixels: Tensor, chosen_B: np.ndarray, change: Callable[[Tensor, Tensor], Tensor], strength_B: np.ndarray
) -> Tensor:
    """``pixels`` in which ``change`` was applied to the images where ``chosen_B`` is true."""
    indices = np.flatnonzero(chosen_B)
    if len(indices) == 0:
        return pixels
    strength = to_device(torch.from_numpy(strength_B[indices]).to(pixels.dtype), pixels.device)
    if len(indices) == len(pixels):
        return change(pixels, strength)
    rows = to_device(torch.from_numpy(indices), pixels.device)
    return pixels.index_copy_(0, rows, change(pixels[rows], strength))
