"""Training augmentation. Its random numbers depend on (seed, epoch, index), not on a process or the order of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from disam_peft.common.preprocessing import Preprocessing
from disam_peft.common.random import keyed_seed
from disam_peft.config.data import AugmentConfig

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class TrainTransform:
    """``transform(image, index, epoch)``: an RGB image to a (3, H, W) float32 tensor, normalised.

    Without augmentation it is the model's own transform, so that training sees what evaluation sees, bit for bit.
    Augmentation crops what evaluation's resize makes of the picture, whose aspect it keeps, squashes or pads.

    One (seed, epoch, index) gives the same tensor, bit for bit, in any worker, process and order. The global random
    state is left as it was.

    Args:
        preprocessing: size and normalisation of the result, and how images are resized.
        config: which changes are made, and how strong they are.
        seed: of the run.
    """

    def __init__(self, preprocessing: Preprocessing, config: AugmentConfig, seed: int) -> None:
        from torchvision.transforms import InterpolationMode, v2

        self.preprocessing, self.config, self.seed = preprocessing, config, seed
        self.deterministic = config.kind == "none"
        """Whether the result is the same in every epoch, so that one view of each image can be stored."""
        self._own = preprocessing.own if self.deterministic else None
        size, resampling = preprocessing.size, InterpolationMode(preprocessing.interpolation)
        steps: list[Any]
        if self.deterministic:
            if self._own is None and (preprocessing.resize, preprocessing.target) != ("shortest", size):
                raise ValueError("a Preprocessing without its model's own transform must resize to cover its size")
            steps = [_Cover(size, resampling), v2.CenterCrop(list(size))]
        else:
            crop = v2.RandomResizedCrop(list(size), scale=config.scale, interpolation=resampling)
            steps = [crop if preprocessing.resize in ("shortest", "none") else _CanvasCrop(preprocessing, crop)]
            if config.flip > 0:
                steps.append(v2.RandomHorizontalFlip(config.flip))
            if config.color_jitter > 0:
                steps.append(v2.ColorJitter(*[config.color_jitter] * 4))
            if config.grayscale > 0:
                steps.append(v2.RandomGrayscale(config.grayscale))
        scaled = _to_unit if preprocessing.scale == 1 / 255 else _Scaled(preprocessing.scale)
        steps += [v2.PILToTensor(), scaled, v2.Normalize(list(preprocessing.mean), list(preprocessing.std))]
        self._steps = v2.Compose(steps)

    def __call__(self, image: Image, index: int, epoch: int) -> Tensor:
        if self._own is not None:
            return self._own(image)
        with _cpu_rng(keyed_seed(self.seed, epoch, index)):
            return self._steps(image)


class _Cover:
    """Resize to the smallest size of the same aspect that covers ``size``. For squares this is CLIP's own resize."""

    def __init__(self, size: tuple[int, int], interpolation: Any) -> None:
        self._size, self._interpolation = size, interpolation

    def __call__(self, image: Image) -> Image:
        from torchvision.transforms.v2 import functional

        height, width = self._size
        # The side that fits exactly is set and not computed, so that rounding cannot leave a pixel uncovered.
        if image.height * width <= image.width * height:
            size = [height, max(width, int(height * image.width / image.height))]
        else:
            size = [max(height, int(width * image.height / image.width)), width]
        return functional.resize(image, size, interpolation=self._interpolation)


class _CanvasCrop:
    """torchvision's RandomResizedCrop of what evaluation's resize would make of the picture: of the squashed picture,
    or of the picture with the fill around it. Both resizes are done at once, so no sharpness is lost between them.

    Args:
        crop: draws the box in the canvas; its output size and filter are the result's.
    """

    def __init__(self, preprocessing: Preprocessing, crop: Any) -> None:
        self._wanted, self._crop = preprocessing, crop

    def __call__(self, image: Image) -> Image:
        import torch
        from PIL import Image as pictures
        from torchvision.transforms.v2 import functional

        (height, width), (target_height, target_width) = (image.height, image.width), self._wanted.target
        high, wide = height, max(1, round(height * target_width / target_height))  # a canvas of the target's aspect
        if self._wanted.resize == "longest" and wide < width:
            high, wide = max(1, round(width * target_height / target_width)), width
        box = self._crop.make_params([torch.empty((1, high, wide), device="meta")])
        (top, bottom), (left, right) = (
            (box[start], box[start] + box[length]) for start, length in (("top", "height"), ("left", "width"))
        )
        options = {"interpolation": self._crop.interpolation, "antialias": True}
        if self._wanted.resize == "squash":
            left, right = round(left * width / wide), round(right * width / wide)
            place = [top, min(left, width - 1), bottom - top, max(1, right - left)]
            return functional.resized_crop(image, *place, list(self._wanted.size), **options)
        result = pictures.new("RGB", self._wanted.size[::-1], (self._wanted.fill,) * 3)
        rows = _shown(top, bottom, (high - height) // 2, height, self._wanted.size[0])
        columns = _shown(left, right, (wide - width) // 2, width, self._wanted.size[1])
        if rows is not None and columns is not None:
            place = [rows[0], columns[0], rows[1], columns[1]]
            shown = functional.resized_crop(image, *place, [rows[3], columns[3]], **options)
            result.paste(shown, (columns[2], rows[2]))
        return result


def _shown(start: int, end: int, margin: int, length: int, size: int) -> tuple[int, int, int, int] | None:
    """What a span of the canvas shows of a picture: where its part begins in the picture and its length, and both in
    the ``size`` pixels that the span becomes. None where it shows nothing.

    Args:
        margin: pixels of the canvas before the picture, which has ``length``.
    """
    first, last = max(start, margin), min(end, margin + length)
    if first >= last:
        return None
    begin = min(size - 1, round((first - start) * size / (end - start)))
    stop = max(begin + 1, round((last - start) * size / (end - start)))
    return first - margin, last - first, begin, stop - begin


class _Scaled:
    """Levels times a factor other than 1/255. A class, so that it can be sent to a worker."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().mul_(self._scale)


def _to_unit(pixels: Tensor) -> Tensor:
    # A division, as in the transforms that come with CLIP; torchvision v2 multiplies by 1/255 and rounds differently.
    return pixels.float().div_(255)


@contextmanager
def _cpu_rng(seed: int) -> Iterator[None]:
    """Set the CPU's random state from ``seed``, and restore it. ``torch.manual_seed`` would change every GPU's too."""
    import torch

    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
