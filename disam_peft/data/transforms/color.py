"""Colour changes of a batch with a strength for each image. Images and results are (B, 3, H, W) floats from 0 to 1.

Each function does what torchvision's ``adjust_*`` does to one image, without rounding to whole levels in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disam_peft.common.device import constant

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow weighs them
# Where red, green and blue are full on the circle of hues, as turns to add before folding.
_PHASES = (0.0, 4 / 6, 2 / 6)


def brightness(images: Tensor, factor_B: Tensor) -> Tensor:
    """Scaled: 0 is black, 1 the image itself."""
    return images.mul(_wide(factor_B)).clamp_(0, 1)


def contrast(images: Tensor, factor_B: Tensor) -> Tensor:
    """Spread about the mean grey of the image: 0 is plain grey, 1 the image itself."""
    mean_B3 = images.mean((2, 3))
    grey_B = mean_B3 @ constant(_LUMA, images.dtype, images.device)
    return images.mul(_wide(factor_B)).add_(_wide(grey_B * (1 - factor_B))).clamp_(0, 1)


def saturation(images: Tensor, factor_B: Tensor) -> Tensor:
    """Spread about each pixel's own grey: 0 is the grey image, 1 the image itself."""
    return torch.lerp(grey(images), images, _wide(factor_B)).clamp_(0, 1)


def hue(images: Tensor, turn_B: Tensor) -> Tensor:
    """Every pixel's hue turned by this share of the circle; lightest and darkest channel keep their values."""
    red, green, blue = images.unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = top - low
    # Sixths of the circle, times chroma; which channel is on top is chosen by arithmetic, `where` being far slower.
    if_green = torch.add(blue - red, chroma, alpha=2)
    if_blue = torch.add(red - green, chroma, alpha=4)
    sixths = torch.lerp(if_green, if_blue, (top - green).sign_())
    sixths = torch.lerp(green - blue, sixths, (top - red).sign_())
    turns = sixths.div_(chroma.clamp(min=1e-12)).mul_(1 / 6).add_(turn_B.view(-1, 1, 1))
    phase = turns[:, None] + constant(_PHASES, images.dtype, images.device).view(1, 3, 1, 1)
    share = phase.sub_(phase.floor()).mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return share.mul_(chroma[:, None]).add_(low[:, None])


def grey(images: Tensor) -> Tensor:
    """(B, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _wide(value_B: Tensor) -> Tensor:
    return value_B.view(-1, 1, 1, 1)
