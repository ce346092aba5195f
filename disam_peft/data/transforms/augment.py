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
        size, resampling = preprocessing.size, InterpolationMode(preprocessing.interpolation)
        steps: list[Any]
        if config.kind == "none":
            steps = [_Cover(size, resampling), v2.CenterCrop(list(size))]
        else:
            steps = [v2.RandomResizedCrop(list(size), scale=config.scale, interpolation=resampling)]
            if config.flip > 0:
                steps.append(v2.RandomHorizontalFlip(config.flip))
            if config.color_jitter > 0:
                steps.append(v2.ColorJitter(*[config.color_jitter] * 4))
            if config.grayscale > 0:
                steps.append(v2.RandomGrayscale(config.grayscale))
        steps += [v2.PILToTensor(), _to_unit, v2.Normalize(list(preprocessing.mean), list(preprocessing.std))]
        self._steps = v2.Compose(steps)
        self.deterministic = config.kind == "none"
        """Whether the result is the same in every epoch, so that one view of each image can be stored."""

    def __call__(self, image: Image, index: int, epoch: int) -> Tensor:
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
