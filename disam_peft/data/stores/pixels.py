"""The pixel store: every image is decoded and resized once and kept as uint8, so that training decodes nothing.

| what                  | rule                                                                                       |
|-----------------------|--------------------------------------------------------------------------------------------|
| shape                 | squeezed into S x S with Pillow's filter; height and width from before are kept, and the   |
|                       | augmentation draws its boxes in them, so nothing of the picture is cut off or distorted    |
| beyond 2:1            | the ends are cut off first, evenly: squeezing them in would cost the rest its sharpness    |
| sharpness             | an image larger than S x S loses detail that a small random crop would have shown          |
| key                   | the data's content and order, S, the filter, Pillow's version                              |
| a kill while building | costs at most one chunk; the folder gets its name only when it is complete                 |

Stores are memory-mapped. They lie in ``pixels/`` of the package's cache folder and may be deleted at any time. N images
of side S.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from PIL import Image
from torch import Tensor, from_numpy

from disam_peft.common.locks import one_at_a_time
from disam_peft.common.progress import track
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.stores.store import StoreKey, read_record, require_room, store_folder, write_record
from disam_peft.data.transforms.resize import Interpolation
from disam_peft.errors import UserError

FORMAT = 1
MAX_ASPECT = 2.0
CHUNK = 256  # images: what a kill can cost
_RECORDS, _HEADER, _PROGRESS = "records.bin", "header.json", "progress.json"


@dataclass(frozen=True)
class PixelKey(StoreKey):
    """Everything that stored pixels depend on."""

    data: str
    """``content_identity`` of the whole dataset."""
    count: int
    side: int
    """S."""
    interpolation: Interpolation
    pillow: str = PIL.__version__
    """Its decoders and filters may change a level between versions."""
    format: int = FORMAT

    @property
    def record(self) -> np.dtype:
        """One image in the file. The size comes last: a record that was never written to its end has none."""
        return np.dtype([("pixels", "u1", (self.side, self.side, 3)), ("size", "<i4", (2,))])


def auto_side(size: tuple[int, int]) -> int:
    """S for a model's input: 8/7 of its longer side (256 for 224), so that most crops are shrunk, not stretched."""
    return round(max(size) * 8 / 7)


class PixelStore:
    """A complete store, for reading; ``open_or_build`` gives it. It can be sent to another process."""

    def __init__(self, folder: Path, key: PixelKey) -> None:
        """
        Raises:
            UserError: there is none in ``folder``, or it is damaged or belongs to another key.
        """
        if not _is_complete(folder, key):
            raise UserError(f"{folder} is no complete pixel store of these images; build it first")
        self.folder, self.key = folder, key
        self._map: np.memmap | None = None

    def __len__(self) -> int:
        return self.key.count

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}  # a map would be sent as all of its bytes

    def read(self, places: Sequence[int] | np.ndarray) -> tuple[Tensor, np.ndarray]:
        """(B, 3, S, S) uint8, channels last in memory, and (B, 2) height and width from before squeezing.

        Raises:
            UserError: a record was never written.
        """
        if self._map is None:
            self._map = np.memmap(self.folder / _RECORDS, self.key.record, "r", shape=(self.key.count,))
        records = self._map[np.asarray(places, dtype=np.int64)]
        if not records["size"].all():
            raise UserError(f"the pixel store {self.folder} is damaged; delete it, and it will be built again")
        return from_numpy(records["pixels"]).permute(0, 3, 1, 2), records["size"]


def open_or_build(
    dataset: DomainDataset, side: int, interpolation: Interpolation, *, folder: Path | None = None
) -> PixelStore:
    """The store of all images of ``dataset``, in its order; built first if it is not there.

    Processes that want the same store at the same time wait for the one that builds it.

    Args:
        folder: of all stores; the default is ``pixels`` in the package's cache.

    Raises:
        UserError: too little room on the disk (says how much is needed), or a folder that cannot be written.
        BadImage: an image that cannot be decoded. What was built stays, and building goes on from there.
    """
    key = PixelKey(dataset.content_identity, len(dataset), side, interpolation)
    place = store_folder(key, "pixels", folder)
    if not _is_complete(place, key):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(place.with_suffix(".lock")):
                if not _is_complete(place, key):
                    _build(place, key, dataset)
        except OSError as error:
            raise UserError(_cannot_write(place, error)) from error
    return PixelStore(place, key)


def _build(place: Path, key: PixelKey, dataset: DomainDataset) -> None:
    if place.exists():
        warnings.warn(f"the pixel store {place} is damaged or incomplete and is built again", stacklevel=4)
        shutil.rmtree(place)
    draft = place.with_suffix(".partial")
    draft.mkdir(exist_ok=True)
    done = _progress(draft, key)
    missing = key.count - done
    require_room(
        draft,
        missing * key.record.itemsize,
        f"storing {missing} images of {key.side} x {key.side} pixels",
        "make room, set DISAM_PEFT_CACHE to a larger disk, choose a smaller data.pixel_store, or leave it out",
    )
    try:
        with open(draft / _RECORDS, "r+b" if done else "wb") as file:
            file.truncate(done * key.record.itemsize)  # what came after the last tick may be half written
            file.seek(0, os.SEEK_END)
            for written in _written(file, key, dataset, done):
                write_record(draft / _PROGRESS, {"digest": key.digest, "done": written})
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            shutil.rmtree(draft, ignore_errors=True)  # leave no full disk behind
        raise
    write_record(draft / _HEADER, {"key": asdict(key), "digest": key.digest})
    (draft / _PROGRESS).unlink()
    os.replace(draft, place)


def _written(file: BinaryIO, key: PixelKey, dataset: DomainDataset, done: int) -> Iterator[int]:
    """Write all records from ``done`` on; gives the number that is safe on the disk, chunk by chunk."""

    def record(index: int) -> bytes:
        pixels, size = squeezed(dataset.image(index), key.side, key.interpolation)
        return pixels.tobytes() + np.asarray(size, dtype="<i4").tobytes()

    # Threads: Pillow decodes and resizes without the interpreter's lock, and nothing has to be sent to a process.
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        starts = range(done, key.count, CHUNK)  # a future per image of a large set would fill memory
        chunks = (pool.map(record, range(start, min(start + CHUNK, key.count))) for start in starts)
        bar = track(chain.from_iterable(chunks), "storing pixels", total=key.count - done)
        for written, data in enumerate(bar, start=done + 1):
            file.write(data)
            if written % CHUNK == 0 or written == key.count:
                file.flush()
                os.fsync(file.fileno())
                yield written


def squeezed(image: Image.Image, side: int, interpolation: Interpolation) -> tuple[np.ndarray, tuple[int, int]]:
    """(S, S, 3) uint8 by the rule of this module, and the height and width that were squeezed."""
    longest = round(min(image.size) * MAX_ASPECT)
    width, height = (min(length, longest) for length in image.size)
    if (width, height) != image.size:
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    return np.asarray(image.resize((side, side), filters[interpolation])), (height, width)


# -- files ---------------------------------------------------------------------------------------------------


def _is_complete(place: Path, key: PixelKey) -> bool:
    """The header is ours and whole, and the records are as long as it says."""
    try:
        size = (place / _RECORDS).stat().st_size
    except OSError:
        return False
    expected = {"key": asdict(key), "digest": key.digest}  # the digest is the header's checksum, too
    return read_record(place / _HEADER) == expected and size == key.count * key.record.itemsize


def _progress(draft: Path, key: PixelKey) -> int:
    """How many records of an interrupted building are safe."""
    progress = read_record(draft / _PROGRESS)
    try:
        size = (draft / _RECORDS).stat().st_size
        done = int(progress["done"]) if progress["digest"] == key.digest else 0
    except (OSError, ValueError, TypeError, KeyError):
        return 0
    return done if 0 <= done <= key.count and size >= done * key.record.itemsize else 0


def _cannot_write(place: Path, error: OSError) -> str:
    return (
        f"the pixel store {place} cannot be written ({error.strerror or error}); make room or set DISAM_PEFT_CACHE to "
        "a folder that can be written, or leave out data.pixel_store"
    )
