"""The pixel store: every image is decoded and resized once and kept as uint8, so that training decodes nothing.

| what                  | rule                                                                                       |
|-----------------------|--------------------------------------------------------------------------------------------|
| shape                 | squeezed into S x S with Pillow's filter; height and width from before are kept, and the   |
|                       | augmentation draws its boxes in them, so nothing of the picture is cut off or distorted    |
| beyond 2:1            | the ends are cut off first, evenly: squeezing them in would cost the rest its sharpness    |
| sharpness             | an image larger than S x S loses detail that a small random crop would have shown          |
| key                   | the data's content and order, S, the filter, Pillow's version                              |
| a kill while building | costs at most one chunk; the folder gets its name only when it is complete                 |
| damage                | chunks have checksums; a damaged one is decoded again when it is first read                |

Stores are memory-mapped. They lie in ``pixels/`` of the package's cache folder and may be deleted at any time. N images
of side S.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image
from torch import Tensor, from_numpy

from disam_peft.common.cache import use
from disam_peft.common.progress import track
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.stores.store import (
    StoreKey,
    claimed,
    discard_damaged,
    draft_folder,
    publish,
    read_record,
    record_digest,
    require_room,
    store_folder,
    write_record,
)
from disam_peft.data.stores.stored_rows import Damaged, DraftRows, StoredRows, chunk_rows
from disam_peft.data.transforms.resize import Interpolation
from disam_peft.errors import UserError

FORMAT = 1
MAX_ASPECT = 2.0
CHUNK = 256  # images: what a kill can cost
_RECORDS, _HEADER = "records.bin", "header.json"
_REMEDY = "make room or set DISAM_PEFT_CACHE to a folder that can be written, or leave out data.pixel_store"


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
            UserError: there is none in ``folder``, or it is damaged as a whole or belongs to another key.
        """
        self.folder, self.key = folder, key
        header = _read_header(folder, key)
        try:
            if header is None:
                raise Damaged("no header")
            chunk, checksums = header.get("chunk", CHUNK), header.get("checksums")
            self._rows = StoredRows(folder / _RECORDS, key.count, key.record.itemsize, chunk, checksums)
        except (Damaged, OSError) as error:
            raise UserError(f"{folder} is no complete pixel store of these images; build it first") from error

    def __len__(self) -> int:
        return self.key.count

    def read(self, places: Sequence[int] | np.ndarray, whole: DomainDataset | None = None) -> tuple[Tensor, np.ndarray]:
        """(B, 3, S, S) uint8, channels last in memory, and (B, 2) height and width from before squeezing.

        Args:
            whole: the dataset of the store, from which damaged chunks are decoded again; without it, damage is an
                error.

        Raises:
            UserError: a chunk is damaged, or a record was never written.
        """
        remake = None if whole is None else _Decoding(whole, self.key).rows
        try:
            rows = self._rows.read(np.asarray(places, dtype=np.int64), remake)
        except Damaged as error:
            raise UserError(f"{error}: {self._damaged}") from error
        records = rows.view(self.key.record)[:, 0]
        if not records["size"].all():
            raise UserError(self._damaged)
        return from_numpy(records["pixels"]).permute(0, 3, 1, 2), records["size"]

    @property
    def _damaged(self) -> str:
        return f"the pixel store {self.folder} is damaged; delete it, and it will be built again"


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
    use(place, dataset.origin)  # before it is looked for: from now on nobody removes it
    if not _is_complete(place, key):
        with claimed(place, "pixel store", _REMEDY):
            if not _is_complete(place, key):
                _build(place, key, dataset)
    return PixelStore(place, key)


class _Decoding:
    """How the records of a store are made."""

    def __init__(self, dataset: DomainDataset, key: PixelKey) -> None:
        self.dataset, self.key = dataset, key

    def record(self, index: int) -> bytes:
        pixels, size = squeezed(self.dataset.image(index), self.key.side, self.key.interpolation)
        return pixels.tobytes() + np.asarray(size, dtype="<i4").tobytes()

    def rows(self, span: range) -> np.ndarray:
        """The records of a chunk that is damaged."""
        return np.frombuffer(b"".join(map(self.record, span)), np.uint8)


def _build(place: Path, key: PixelKey, dataset: DomainDataset) -> None:
    """Build the store in its draft folder. The store is claimed."""
    discard_damaged(place, "pixel store")
    draft = draft_folder(place)
    draft.mkdir(exist_ok=True)
    rows = DraftRows(draft / _RECORDS, key.count, key.record.itemsize, CHUNK)
    rows.prepare()
    todo = rows.todo()
    missing = sum(len(chunk_rows(rows, chunk)) for chunk in todo)
    require_room(
        draft,
        missing * key.record.itemsize,
        f"storing {missing} images of {key.side} x {key.side} pixels",
        "make room, set DISAM_PEFT_CACHE to a larger disk, choose a smaller data.pixel_store, or leave it out",
    )
    _fill(rows, todo, _Decoding(dataset, key), missing)
    header = {"key": asdict(key), "digest": key.digest, "chunk": rows.chunk, "checksums": rows.finished()}
    write_record(draft / _HEADER, {**header, "header": record_digest(header)})
    publish(draft, place)


def _fill(rows: DraftRows, todo: list[int], work: _Decoding, missing: int) -> None:
    # Threads: Pillow decodes and resizes without the interpreter's lock, and nothing has to be sent to a process.
    with ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        # chunk by chunk: a future per image of a large set would fill memory
        chunks = (pool.map(work.record, chunk_rows(rows, chunk)) for chunk in todo)
        records = track(chain.from_iterable(chunks), "storing pixels", total=missing)
        for chunk in todo:
            data = b"".join(islice(records, len(chunk_rows(rows, chunk))))
            rows.write(chunk, np.frombuffer(data, np.uint8))


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
    try:
        PixelStore(place, key)
    except UserError:
        return False
    return True


def _read_header(place: Path, key: PixelKey) -> dict[str, Any] | None:
    """The header of a store of this key; None where it is missing, damaged or another store's."""
    header = read_record(place / _HEADER)
    if not isinstance(header, dict) or header.get("key") != asdict(key) or header.get("digest") != key.digest:
        return None
    digest = header.pop("header", None)
    if digest is None:  # version 0.1
        return header if header.keys() == {"key", "digest"} else None
    return header if digest == record_digest(header) else None
