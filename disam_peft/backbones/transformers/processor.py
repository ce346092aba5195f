"""What a transformers image processor does to a picture, as numbers, and its transform for one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from disam_peft.common.preprocessing import Preprocessing, Resampling, Resize
from disam_peft.errors import UserError

FILTERS: dict[int, Resampling] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers, as image processors store them."""
BLANK = (3, 50, 41)


class HfImageTransform:
    """A checkpoint's own image processor for one image: PIL image to (3, H, W) float32. Picklable for workers."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0].float()


def preprocessing(processor: Any) -> Preprocessing:
    """The numbers of an image processor, and its transform.

    Raises:
        UserError: its images have no single size, or are made by a rule that ``Preprocessing`` cannot say.
    """
    resize, resized = _resize(processor)
    cut = _pair(processor.crop_size) if processor.do_center_crop else None
    size = cut or (resized if resize == "squash" else None)
    if size is None:
        raise _not_understood(processor, "leaves images of different sizes")
    number = int(processor.resample) if processor.do_resize else 3
    if number not in FILTERS:
        raise _not_understood(processor, f"has an unknown filter, resample={number}")
    normalised = bool(processor.do_normalize)
    found = Preprocessing(
        size,
        _channels(processor, "image_mean") if normalised else (0.0, 0.0, 0.0),
        _channels(processor, "image_std") if normalised else (1.0, 1.0, 1.0),
        FILTERS[number],
        resize=resize,
        resized=None if resized == size else resized,
        scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        own=HfImageTransform(processor),
    )
    _try(processor, found)
    return found


def _resize(processor: Any) -> tuple[Resize, tuple[int, int] | None]:
    """The rule by which pictures are resized, and the height and width that it aims at."""
    if not processor.do_resize:
        return "none", None
    size = {name: value for name, value in dict(processor.size).items() if value is not None}
    if (shortest := size.get("shortest_edge")) is not None:
        return "shortest", (shortest, shortest)
    if (most := (size.get("max_height"), size.get("max_width"))) != (None, None):
        return "longest", most  # type: ignore[return-value]  # the trial finds one without the other
    if (pair := _pair(size)) is not None:
        return "squash", pair
    raise _not_understood(processor, f"has the size {size}")


def _pair(size: Mapping[str, Any] | None) -> tuple[int, int] | None:
    height, width = (None if size is None else size.get(side) for side in ("height", "width"))
    return None if height is None or width is None else (int(height), int(width))


def _channels(processor: Any, name: str) -> tuple[float, float, float]:
    value = getattr(processor, name)
    numbers = tuple(float(one) for one in value) if isinstance(value, list | tuple) else (float(value),) * 3
    if len(numbers) != 3:
        raise _not_understood(processor, f"has {name}={value}, not one number for each of three channels")
    return numbers


def _try(processor: Any, found: Preprocessing) -> None:
    """Transform a blank picture: a setting that the library refuses or reads otherwise is found before any image is."""
    assert found.own is not None
    try:
        pixels = found.own(torch.zeros(BLANK, dtype=torch.uint8))
    except (KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise _not_understood(processor, f"fails on a blank picture ({str(error).splitlines()[0]})") from error
    if tuple(pixels.shape) != (3, *found.size) or not torch.isfinite(pixels).all():
        raise _not_understood(processor, f"turns a blank picture into numbers of shape {tuple(pixels.shape)}")


def _not_understood(processor: Any, why: str) -> UserError:
    return UserError(
        f"the image processor ({type(processor).__name__}) {why}, which is not understood: in preprocessor_config.json "
        "give 'size' as shortest_edge with 'do_center_crop' and a 'crop_size', or 'size' as height and width; "
        "resampling bicubic (3), bilinear (2), lanczos (1) or nearest (0)"
    )
