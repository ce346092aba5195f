"""The feature store: the output of a model's frozen part for every image, so that each image is encoded once.

Its numbers depend on the weights, the split, the precision, the transform and the data, which make up its key. It is
built in chunks, and each finished chunk is ticked off in a file: after a kill, building goes on where it stopped, with
any number of processes. The numbers are memory-mapped. N images, V views of each.
"""

from __future__ import annotations

import hashlib
import shutil
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
from disam_peft.common.progress import track
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.loader import make_train_loader
from disam_peft.data.stores.store import StoreKey, read_record, require_room, store_folder, write_record
from disam_peft.errors import UserError

FORMAT = 2  # 1: numbers of before the last block's products were reordered, other in their last digits
CHUNK = 64  # images: what is encoded at once, and what a kill can cost
SPARE_DISK = 0.05
BLANK = 64

Item = TypeVar("Item")


@dataclass(frozen=True)
class FeatureKey(StoreKey):
    """Everything that stored numbers depend on."""

    backbone: str
    """sha256 of the base weights."""
    split: int | None
    """Frozen blocks of the image tower; None: all of it."""
    precision: str
    """Of the weights and of autocast, e.g. ``float32/no``."""
    transform: str
    """What turns an image into pixels, with its seed."""
    data: str
    """``data_identity`` of the dataset."""
    views: int
    """V."""
    format: int = FORMAT


def data_identity(dataset: DomainDataset) -> str:
    """sha256, hex, over the names and contents of all samples. Contents are the hashes of the data check or, where it
    has not run, sizes and times of change; embedded images have no times, so the table's own fingerprint is taken."""
    digest = hashlib.sha256(dataset.fingerprint.encode())
    if dataset.hashes is not None:
        digest.update("".join(dataset.hashes).encode())
    else:
        times_N = dataset.sizes_and_times[1]
        digest.update(times_N.tobytes())
        if (times_N == 0).any():
            digest.update(getattr(dataset.images, "_fingerprint", "").encode())
    return digest.hexdigest()


class FeatureStore:
    """A complete store, for reading with ``rows``. The views of a training set are its augmented versions."""

    def __init__(self, folder: Path, key: FeatureKey) -> None:
        header = _read_header(folder, key)
        if header is None:
            raise UserError(f"{folder} is no complete feature store for this model and data; build it first")
        self.views, self.count = key.views, int(header["count"])
        self._shape, self._dtype = tuple(header["shape"]), getattr(torch, header["dtype"])
        self._bytes = np.memmap(folder / "features.bin", np.uint8, "r", shape=(self.views * self.count, header["row"]))

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | int = 0) -> Tensor:
        """The stored tensors (B, ...) of these images. View numbers are taken modulo V, so an epoch may be given."""
        stored = self._bytes[self.places(indices, views)]
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
    share of the images, into one folder that they all see.

    Args:
        transform: image, index and view to pixels.
        encode: pixels (B, 3, H, W) on the CPU to the frozen part's output (B, ...), on any device.
        folder: of all stores; the default is ``features`` in the package's cache.

    Raises:
        UserError: not enough room on the disk (says how much is needed and what would need less).
        BadImage: an image that cannot be decoded.
    """
    place = store_folder(key, "features", folder)
    if _read_header(place, key) is None:
        # The output for a blank image: only its shape, dtype and device matter, and no file is decoded for them.
        sample = encode(transform(Image.new("RGB", (BLANK, BLANK)), 0, 0)[None])[0]
        processes.on_main(lambda: _prepare(place, key, len(dataset), sample))
        _fill(place, key, dataset, transform, encode, sample, workers)
        processes.wait()
        processes.on_main(lambda: _finish(place, key, len(dataset), sample))
    return FeatureStore(place, key)


def _row_bytes(sample: Tensor) -> int:
    return sample.numel() * sample.element_size()


def _prepare(place: Path, key: FeatureKey, count: int, sample: Tensor) -> None:
    """Create a file of the right size and a list of chunks, none of them done. What an earlier try of the same size has
    left is kept."""
    place.mkdir(parents=True, exist_ok=True)
    needed = key.views * count * _row_bytes(sample)
    data, done = place / "features.bin", place / "chunks.done"
    chunks = -(-key.views * count // CHUNK)
    if data.exists() and done.exists() and (data.stat().st_size, done.stat().st_size) == (needed, chunks):
        return
    data.unlink(missing_ok=True)  # of another size: of no use, and its room is needed
    try:
        require_room(
            place,
            round(needed / (1 - SPARE_DISK)),
            f"a feature store of {count} images x {key.views} views",
            "use fewer features.views, train fewer blocks, or set features.folder",
        )
    except UserError:
        shutil.rmtree(place)
        raise
    for path, size in ((data, needed), (done, chunks)):
        with open(path, "wb") as file:
            file.truncate(size)


def _fill(
    place: Path,
    key: FeatureKey,
    dataset: DomainDataset,
    transform: Callable[[Image.Image, int, int], Tensor],
    encode: Callable[[Tensor], Tensor],
    sample: Tensor,
    workers: Any,
) -> None:
    """Encode this process's share of the chunks that are not done yet."""
    count, total = len(dataset), key.views * len(dataset)
    rows = np.memmap(place / "features.bin", np.uint8, "r+", shape=(total, _row_bytes(sample)))
    done = np.memmap(place / "chunks.done", np.uint8, "r+")
    mine = [chunk for chunk in range(processes.rank(), len(done), processes.world_size()) if not done[chunk]]
    spans = [range(chunk * CHUNK, min(total, (chunk + 1) * CHUNK)) for chunk in mine]
    batches: Any = [[(row % count, row // count) for row in span] for span in spans]
    on_gpu = sample.device.type == "cuda"
    loader = make_train_loader(dataset, batches, transform, workers=workers, pin_memory=on_gpu)
    copies = (_start_copy(encode(batch["pixels"]).to(sample.dtype)) for batch in loader)
    todo = zip(mine, spans, _one_behind(copies) if on_gpu else copies, strict=True)
    for chunk, span, copy in track(todo, "storing features", total=len(mine)):
        rows[span.start : span.stop] = copy().reshape(len(span), -1).contiguous().view(torch.uint8).numpy()
        rows.flush()  # the features reach the disk before the tick that says so
        done[chunk] = 1
        done.flush()


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


def _finish(place: Path, key: FeatureKey, count: int, sample: Tensor) -> None:
    header = {
        "key": asdict(key),
        "count": count,
        "shape": list(sample.shape),
        "dtype": str(sample.dtype).removeprefix("torch."),
        "row": _row_bytes(sample),
    }
    write_record(place / "store.json", header)
    (place / "chunks.done").unlink(missing_ok=True)


def _read_header(place: Path, key: FeatureKey) -> dict[str, Any] | None:
    """The header of a complete, matching store; None otherwise."""
    header = read_record(place / "store.json")
    try:
        size = (place / "features.bin").stat().st_size
        fits = header["key"] == asdict(key) and size == key.views * header["count"] * header["row"]
    except (OSError, KeyError, TypeError):
        return None
    return header if fits else None
