"""The feature store: the output of a model's frozen part for every image, so that each image is encoded once.

Its numbers depend on the weights, the split, the precision, the transform and the data, which make up its key. It is
built in chunks by all processes of one run, each with its share, and after a kill building goes on where it stopped.
Another run that needs the same store waits. The numbers are memory-mapped and checked when a chunk is first read; a
damaged chunk is encoded again. N images, V views of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from disam_peft.common import processes
from disam_peft.common.cache import use
from disam_peft.common.locks import one_run_at_a_time
from disam_peft.common.progress import track
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.loader import make_train_loader
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
from disam_peft.data.stores.stored_rows import Damaged, DraftRows, Remake, StoredRows, chunk_rows
from disam_peft.errors import UserError

FORMAT = 2  # 1: numbers of before the last block's products were reordered, other in their last digits
CHUNK = 64  # images: what is encoded at once, and what a kill can cost
SPARE_DISK = 0.05
BLANK = 64
ROWS = "features.bin"
_REMEDY = "set features.folder, or DISAM_PEFT_CACHE, to a folder that can be written, or leave out features.store"

Item = TypeVar("Item")


@dataclass(frozen=True)
class FeatureKey(StoreKey):
    """Everything that stored numbers depend on."""

    backbone: str
    """``ClipBackbone.identity``: sha256 of the base weights and of all else that its output depends on."""
    split: int | None
    """Frozen blocks of the image tower; None: all of it."""
    precision: str
    """Of the weights and of autocast, e.g. ``float32/no``."""
    transform: str
    """What turns an image into pixels, with its seed."""
    data: str
    """``content_identity`` of the dataset."""
    views: int
    """V."""
    format: int = FORMAT


class FeatureStore:
    """A complete store, for reading with ``rows``. The views of a training set are its augmented versions.

    Args:
        remake: encodes the rows of a damaged chunk again; without it, damage is an error.

    Raises:
        UserError: there is no such store in ``folder``, or it is damaged as a whole.
    """

    def __init__(self, folder: Path, key: FeatureKey, remake: Remake | None = None) -> None:
        header = _read_header(folder, key)
        try:
            if header is None:
                raise Damaged("no header")
            self.views, self.count = key.views, int(header["count"])
            self._shape, self._dtype = tuple(header["shape"]), getattr(torch, header["dtype"])
            total, row_bytes = self.views * self.count, header["row"]
            chunk, checksums = header.get("chunk", CHUNK), header.get("checksums")
            self._rows = StoredRows(folder / ROWS, total, row_bytes, chunk, checksums)
        except (Damaged, OSError) as error:
            text = f"{folder} is no complete feature store for this model and data; build it first"
            raise UserError(text) from error
        self._remake = remake

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | int = 0) -> Tensor:
        """The stored tensors (B, ...) of these images. View numbers are taken modulo V, so an epoch may be given.

        Raises:
            UserError: a chunk is damaged, and the store does not know how to encode it again.
        """
        try:
            stored = self._rows.read(self.places(indices, views), self._remake)
        except Damaged as error:
            raise UserError(f"{error}; delete {self._rows.file.parent}, and it will be built again") from error
        return torch.from_numpy(stored).view(self._dtype).reshape(-1, *self._shape)

    def places(self, indices: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | int = 0) -> np.ndarray:
        """The numbers of these rows in the file, (B,). It holds the first view of every image, then the second."""
        return np.asarray(indices, dtype=np.int64) + self.count * (np.asarray(views, dtype=np.int64) % self.views)


def open_or_build(
    key: FeatureKey,
    dataset: DomainDataset,
    transform: Callable[[Image.Image, int, int], Tensor],
    encode: Callable[[Tensor], Tensor],
    *,
    folder: Path | None = None,
    workers: int | str = "auto",
) -> FeatureStore:
    """The store of ``key``, built first if it is not there. All processes of a run call this together: each encodes its
    share of the images, into one folder that they all see. While another run builds the store, this one waits.

    Args:
        transform: image, index and view to pixels.
        encode: pixels (B, 3, H, W) on the CPU to the frozen part's output (B, ...), on any device. It is kept with the
            store, for chunks that turn out to be damaged.
        folder: of all stores; the default is ``features`` in the package's cache.

    Raises:
        UserError: not enough room on the disk (says how much is needed and what would need less), or a folder that
            cannot be written.
        BadImage: an image that cannot be decoded.
    """
    place = store_folder(key, "features", folder)
    use(place, dataset.origin)  # before it is looked for: from now on nobody removes it
    work = _Encoding(key, dataset, transform, encode)
    # decided by one process: another run may finish the store between two looks
    if not processes.on_main(lambda: _is_complete(place, key)):
        with claimed(place, "feature store", _REMEDY, turns=one_run_at_a_time):
            if not processes.on_main(lambda: _is_complete(place, key)):
                _build(place, work, workers)
    return FeatureStore(place, key, work.rows)


class _Encoding:
    """How the rows of a store are made."""

    def __init__(
        self,
        key: FeatureKey,
        dataset: DomainDataset,
        transform: Callable[[Image.Image, int, int], Tensor],
        encode: Callable[[Tensor], Tensor],
    ) -> None:
        self.key, self.dataset, self.transform, self.encode = key, dataset, transform, encode

    @property
    def total(self) -> int:
        return self.key.views * len(self.dataset)

    def blank(self) -> Tensor:
        """The output for a blank image: only its shape, dtype and device matter, and no file is decoded for them."""
        return self.encode(self.transform(Image.new("RGB", (BLANK, BLANK)), 0, 0)[None])[0]

    def batches(self, spans: Sequence[range], workers: Any, *, pin: bool = False) -> Iterator[Tensor]:
        """The frozen part's output of the rows of each span, (B, ...)."""
        count = len(self.dataset)
        places: Any = [[(row % count, row // count) for row in span] for span in spans]
        loader = make_train_loader(self.dataset, places, self.transform, workers=workers, pin_memory=pin)
        return (self.encode(batch["pixels"]) for batch in loader)

    def rows(self, span: range) -> np.ndarray:
        """The rows of a chunk that is damaged."""
        [encoded] = self.batches([span], workers=0)
        return _as_bytes(encoded.cpu(), len(span))


def _build(place: Path, work: _Encoding, workers: Any) -> None:
    """Build the store in its draft folder, all processes of this run together. The store is claimed."""
    sample = work.blank()
    row_bytes = sample.numel() * sample.element_size()
    draft = draft_folder(place)
    rows = DraftRows(draft / ROWS, work.total, row_bytes, CHUNK)

    def prepare() -> list[int]:
        discard_damaged(place, "feature store")
        _require_room(draft, rows, work.key)
        draft.mkdir(exist_ok=True)
        rows.prepare()
        return rows.todo()

    todo = processes.on_main(prepare)
    processes.all_or_none(lambda: _fill(rows, todo, work, sample, workers))
    processes.on_main(lambda: _finish(draft, place, work, rows, sample))


def _require_room(draft: Path, rows: DraftRows, key: FeatureKey) -> None:
    written = sum(file.stat().st_blocks * 512 for file in draft.glob("*") if hasattr(file.stat(), "st_blocks"))
    images = rows.count // key.views
    require_room(
        draft.parent,
        round((rows.count * rows.row_bytes - written) / (1 - SPARE_DISK)),
        f"a feature store of {images} images x {key.views} views",
        "use fewer features.views, train fewer blocks, or set features.folder",
    )


def _fill(rows: DraftRows, todo: list[int], work: _Encoding, sample: Tensor, workers: Any) -> None:
    """Encode this process's share of the chunks that are not done yet."""
    mine = todo[processes.rank() :: processes.world_size()]
    spans = [chunk_rows(rows, chunk) for chunk in mine]
    on_gpu = sample.device.type == "cuda"
    copies = (_start_copy(encoded.to(sample.dtype)) for encoded in work.batches(spans, workers, pin=on_gpu))
    batches = zip(mine, spans, _one_behind(copies) if on_gpu else copies, strict=True)
    for chunk, span, copy in track(batches, "storing features", total=len(mine)):
        rows.write(chunk, _as_bytes(copy(), len(span)))


def _as_bytes(encoded: Tensor, count: int) -> np.ndarray:
    return encoded.reshape(count, -1).contiguous().view(torch.uint8).numpy()


def _start_copy(encoded: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU. The function that is returned waits until the copy is there and gives it."""
    if encoded.device.type != "cuda":
        return encoded.cpu
    copy = torch.empty(encoded.shape, dtype=encoded.dtype, pin_memory=True)
    copy.copy_(encoded, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(encoded.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def _one_behind(items: Iterator[Item]) -> Iterator[Item]:
    """Give each item only when the next one has been taken. So a device has its next work queued while the result of
    the work before is written."""
    return (item for item, _ in pairwise(chain(items, [None])))  # type: ignore[misc]


def _finish(draft: Path, place: Path, work: _Encoding, rows: DraftRows, sample: Tensor) -> None:
    header = {
        "key": asdict(work.key),
        "count": len(work.dataset),
        "shape": list(sample.shape),
        "dtype": str(sample.dtype).removeprefix("torch."),
        "row": rows.row_bytes,
        "chunk": rows.chunk,
        "checksums": rows.finished(),
    }
    write_record(draft / "store.json", {**header, "digest": record_digest(header)})
    publish(draft, place)


def _is_complete(place: Path, key: FeatureKey) -> bool:
    try:
        FeatureStore(place, key)
    except UserError:
        return False
    return True


def _read_header(place: Path, key: FeatureKey) -> dict[str, Any] | None:
    """The header of a matching store; None where it is missing, damaged or another store's."""
    header = read_record(place / "store.json")
    if not isinstance(header, dict) or header.get("key") != asdict(key):
        return None
    digest = header.pop("digest", None)
    if digest is None:  # version 0.1
        return header if {"count", "shape", "dtype", "row"} <= set(header) else None
    return header if digest == record_digest(header) else None
