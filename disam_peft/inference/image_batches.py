"""Batches of images that need not all be readable, in order, over any number of workers and processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from disam_peft.common import processes
from disam_peft.data.loading.loader import resolve_workers
from disam_peft.data.sources.samples import MAX_FILE_BYTES
from disam_peft.data.transforms.decode import BadImage, decode_image, to_picture

ImageLike = Any
"""A path, the bytes of an image file, a PIL image, or an array (H, W, 3) of uint8."""


@dataclass(frozen=True)
class ImageBatch:
    """B images, of which the R readable ones have pixels.

    Attributes:
        paths: (B,) where they come from; None for images that were given as such.
        errors: (B,) why one cannot be read; None where it can.
        pixels_RCHW: of the readable ones, in their order.
    """

    paths: tuple[str | None, ...]
    errors: tuple[str | None, ...]
    pixels_RCHW: Tensor


def batches(
    images: Sequence[ImageLike],
    transform: Callable[[Any], Tensor],
    batch_size: int,
    *,
    first: int = 0,
    workers: int | Literal["auto"] = 0,
) -> Iterator[ImageBatch | None]:
    """This process's batches of ``images[first:]``. Batch number b has the same images however many processes there
    are: process r of w has the batches r, r + w, ... All processes get as many; None stands for one that is not there.
    """
    starts = range(first, len(images), batch_size)
    rank, world = processes.rank(), processes.world_size()
    own = [list(range(start, min(start + batch_size, len(images)))) for start in starts[rank::world]]
    loader: DataLoader[Any] = DataLoader(
        _Images(images, transform),
        batch_sampler=own,
        num_workers=resolve_workers(workers),
        collate_fn=_collated,
        generator=torch.Generator(),
    )
    yield from loader
    for _ in range(len(own), -(-len(starts) // world)):
        yield None


class _Images(Dataset[Any]):
    def __init__(self, images: Sequence[ImageLike], transform: Callable[[Any], Tensor]) -> None:
        self._images, self._transform = images, transform

    def __getitem__(self, index: int) -> tuple[str | None, str | None, Tensor | None]:
        image = self._images[index]
        path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        try:
            picture = read_picture(image, path or f"number {index}")
            return path, None, self._transform(picture)
        except BadImage as error:
            return path, error.reason, None


def _collated(samples: list[tuple[str | None, str | None, Tensor | None]]) -> ImageBatch:
    paths, errors, pixels = zip(*samples, strict=True)
    readable = [one for one in pixels if one is not None]
    return ImageBatch(paths, errors, torch.stack(readable) if readable else torch.empty(0))


def read_picture(image: ImageLike, source: str) -> Any:
    """An image as an upright RGB picture of PIL.

    Raises:
        BadImage: it cannot be read or decoded, or is of a kind that is not known.
    """
    if isinstance(image, bytes):
        return decode_image(image, source)
    if isinstance(image, str | os.PathLike):
        try:
            with open(image, "rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise BadImage.of(source, f"larger than {MAX_FILE_BYTES} bytes, which no usable image is")
                return decode_image(file.read(), source)
        except OSError as error:
            raise BadImage.of(source, f"cannot be read ({error.strerror or error})") from error
    return to_picture(np.asarray(image) if isinstance(image, Tensor) else image, source)
