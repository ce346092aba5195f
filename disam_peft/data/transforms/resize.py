"""Cut a box out of every image of a batch and resize it to one size, as Pillow does: the filter grows with the box.

There are two ways to the same result. On a CPU, torch's kernel for whole levels (uint8) is called for each image.
Elsewhere, the whole batch takes one matrix product per axis, whose result is not rounded to whole levels. The two
differ by about one level of 256.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from disam_peft.common.device import to_device

Interpolation = Literal["bicubic", "bilinear"]


def crop_resize(
    images: Tensor, boxes_B4: np.ndarray, flip_B: np.ndarray, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """(B, 3, H, W) uint8 to (B, 3, h, w) float32 in 0 to 255.

    Args:
        boxes_B4: top, left, height, width of the box in each image, whole pixels.
        flip_B: bool, which results to mirror left to right.
        size: h, w.
    """
    by_kernel = images.device.type == "cpu"
    return (_by_kernel if by_kernel else _by_product)(images, boxes_B4, flip_B, size, interpolation)


def _by_kernel(
    images: Tensor, boxes_B4: np.ndarray, flip_B: np.ndarray, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    result = torch.empty((len(images), 3, *size))
    for i, (top, left, height, width) in enumerate(boxes_B4.tolist()):
        box = images[i : i + 1, :, top : top + height, left : left + width]
        resized = functional.interpolate(box, size, mode=interpolation, antialias=True)
        result[i] = (resized.flip(-1) if flip_B[i] else resized)[0]
    return result


def _by_product(
    images: Tensor, boxes_B4: np.ndarray, flip_B: np.ndarray, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    boxes = to_device(torch.from_numpy(boxes_B4).float(), images.device)
    flip = to_device(torch.from_numpy(flip_B), images.device)
    rows = _weights(boxes[:, 0], boxes[:, 2], images.shape[2], size[0], interpolation)
    columns = _weights(boxes[:, 1], boxes[:, 3], images.shape[3], size[1], interpolation)
    columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    with torch.autocast(images.device.type, enabled=False):  # a caller's half precision is not meant for pixels
        wide = (images.float() @ columns[:, None].mT).clamp_(0, 255)  # clamped in between, as Pillow's levels are
        return (rows[:, None] @ wide).clamp_(0, 255)


def _weights(start_B: Tensor, length_B: Tensor, pixels: int, out: int, interpolation: Interpolation) -> Tensor:
    """(B, out, pixels): the weight of each pixel in each pixel of the result."""
    step_B = length_B / out
    places = torch.arange(out, device=start_B.device) + 0.5
    middles = torch.arange(pixels, device=start_B.device) + 0.5
    centre_BO1 = (start_B[:, None] + step_B[:, None] * places)[:, :, None]
    weight = _filter((middles - centre_BO1) / step_B.clamp(min=1)[:, None, None], interpolation)
    inside_B1P = ((middles > start_B[:, None]) & (middles < (start_B + length_B)[:, None]))[:, None]
    weight = weight * inside_B1P
    return weight / weight.sum(-1, keepdim=True)


def _filter(x: Tensor, interpolation: Interpolation) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    near = (1.5 * x - 2.5) * x * x + 1  # Keys' cubic with a = -1/2
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
