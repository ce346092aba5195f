"""DataLoaders that give the same batches whatever the number of workers and however they are started.

A batch is ``{"pixels": (B, 3, H, W) float32, "labels": (B,), "domains": (B,), "indices": (B,) int64}``; ``indices``
are positions in the dataset. All loaders give each rank its own share already and need no further sharding.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from disam_peft.common.device import prefetch_to_device
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.pixels import PixelStore, auto_side, open_or_build
from disam_peft.data.transforms.batch_augment import BatchAugment
from disam_peft.data.transforms.decode import BadImage
from disam_peft.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_WORKERS = 8
RETRY_SECONDS = 0.2
WORKER_GRACE_SECONDS = 30
StartMethod = Literal["fork", "spawn", "forkserver"]


class ImageLoader(DataLoader):
    """A DataLoader that raises a BadImage unchanged, where torch would wrap it in the traceback of a worker."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, BadImage):
                # Ends kept workers now; caught in the cycle of a traceback, they would take seconds to be ended.
                self._iterator = None
                raise batch
            yield batch


class StoredLoader(DataLoader):
    """Batches from the pixel store. Augmentation on a device other than a CPU happens here, not in the workers."""

    def __init__(self, samples: _StoredSamples, augment: BatchAugment, device: torch.device, **options: Any) -> None:
        super().__init__(samples, **options)
        self._augment, self._device = augment, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        for batch in prefetch_to_device(super().__iter__(), self._device, ("pixels", "labels")):
            sizes_B2, epochs_B = batch.pop("sizes"), batch.pop("epochs")
            if self._device.type != "cpu":
                of_images = batch["indices"].tolist(), epochs_B.tolist(), sizes_B2.numpy()
                batch["pixels"] = self._augment(batch["pixels"], *of_images)
            yield batch


def make_train_loader(
    dataset: DomainDataset,
    batches: DomainBatches,
    transform: Callable[[Image, int, int], Tensor],
    *,
    workers: int | Literal["auto"] = "auto",
    pin_memory: bool = False,
    start_method: StartMethod | None = None,
) -> ImageLoader:
    """The batches of one rank, from ``batches.first_step`` to the end of the run.

    Args:
        dataset: what ``batches`` was made for: its ``domain_ids`` are theirs.
        transform: image, index and epoch to pixels, a TrainTransform.
        workers: processes that decode; 0 decodes in this one.
        start_method: how workers start. Unset: Python's own choice.

    Raises:
        BadImage: while iterating, an image that twice could not be read or decoded.
    """
    return _loader(_TrainSamples(dataset, transform), batches, workers, pin_memory, start_method, reused=False)


def make_stored_loader(
    dataset: DomainDataset,
    batches: DomainBatches,
    augment: BatchAugment,
    *,
    device: torch.device | str = "cpu",
    workers: int | Literal["auto"] = "auto",
    pin_memory: bool = False,
    start_method: StartMethod | None = None,
) -> StoredLoader:
    """``make_train_loader`` for a dataset with a ``pixel_plan``: the same batches from the pixel store, built here if
    it is not there; ``pixels`` and ``labels`` come on ``device``.

    Args:
        augment: what is done to the stored images: in the workers on a CPU, else on the device, where only a quarter
            of the bytes has to go.

    Raises:
        UserError: the dataset has no plan, or a side below the model's input; as ``pixels.open_or_build``.
        BadImage: while building, an image that cannot be decoded.
    """
    plan = dataset.pixel_plan
    if plan is None:
        raise UserError(f"{dataset.origin} was loaded without data.pixel_store; set it, or use make_train_loader")
    wanted = augment.preprocessing
    side = auto_side(wanted.size) if plan.side == "auto" else plan.side
    if side < max(wanted.size):
        raise UserError(
            f"data.pixel_store={side} is smaller than the model's input of {max(wanted.size)} pixels; "
            f"use 'auto' ({auto_side(wanted.size)}) or more"
        )
    store = open_or_build(plan.whole, side, augment.filter)
    device = torch.device(device)
    samples = _StoredSamples(dataset, store, augment if device.type == "cpu" else None)
    options = _options(batches, workers, pin_memory, start_method, reused=False)
    return StoredLoader(samples, augment, device, collate_fn=_whole_batch, **options)


def make_eval_loader(
    dataset: DomainDataset,
    transform: Callable[[Image], Tensor],
    batch_size: int,
    *,
    workers: int | Literal["auto"] = "auto",
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    start_method: StartMethod | None = None,
) -> ImageLoader:
    """Samples ``rank``, ``rank + world_size``, ... in order; over all ranks each sample comes exactly once.

    Ranks may differ by one in their number of samples, and one may have none: nothing is padded.

    Args:
        transform: image to pixels, deterministic.
        batch_size: per rank.

    Raises:
        UserError: a batch size below 1.
        BadImage: while iterating, an image that twice could not be read or decoded.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    own = range(rank, len(dataset), world_size)
    batches = [list(own[start : start + batch_size]) for start in range(0, len(own), batch_size)]
    return _loader(_EvalSamples(dataset, transform), batches, workers, pin_memory, start_method, reused=True)


def resolve_workers(workers: int | Literal["auto"]) -> int:
    """The number of worker processes: ``auto`` shares the CPUs that this machine's processes may use, keeps one for
    the training itself, and stops at 8.

    Raises:
        UserError: neither ``auto`` nor a number from 0 on.
    """
    if workers == "auto":
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local_ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return max(0, min(MAX_WORKERS, cpus // local_ranks - 1))
    if not isinstance(workers, int) or workers < 0:
        raise UserError(f"workers={workers!r} must be 'auto' or a number from 0 on")
    return workers


def _loader(
    samples: Dataset, batches: Any, workers: int | Literal["auto"], pin: bool, start: StartMethod | None, reused: bool
) -> ImageLoader:
    return ImageLoader(samples, collate_fn=_collate, **_options(batches, workers, pin, start, reused))


def _options(
    batches: Any, workers: int | Literal["auto"], pin: bool, start: StartMethod | None, reused: bool
) -> dict[str, Any]:
    count = resolve_workers(workers)
    return {
        "batch_sampler": batches,
        "num_workers": count,
        "pin_memory": pin,
        # Training is one long pass; validation comes again and again and would start its workers anew each time.
        "persistent_workers": reused and count > 0,
        "multiprocessing_context": start if count > 0 else None,
        "worker_init_fn": _survive_signals,
        # A loader draws a seed for its workers, which need none: from the process's own stream the draw would give a
        # resumed run, which opens another number of loaders, other dropout masks.
        "generator": torch.Generator(),
    }


def _survive_signals(worker: int) -> None:
    """Let a worker outlive a signal that a terminal or a scheduler sends to all processes, because the main process
    needs its batches until the step has ended. Workers end with the main process; one that hangs ends a little after
    SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # whatever it means to the process that this one was forked from
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE_SECONDS))


class _TrainSamples(Dataset):
    def __init__(self, dataset: DomainDataset, transform: Callable[[Image, int, int], Tensor]) -> None:
        self._dataset, self._transform = dataset, transform

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any] | BadImage:
        index, epoch = place
        return _sample(self._dataset, index, lambda image: self._transform(image, index, epoch))


class _StoredSamples(Dataset):
    """Gives whole batches at once. With ``augment`` None, images stay as they are stored."""

    def __init__(self, dataset: DomainDataset, store: PixelStore, augment: BatchAugment | None) -> None:
        assert dataset.pixel_plan is not None
        self._labels, self._domains = torch.from_numpy(dataset.labels), torch.from_numpy(dataset.domain_ids)
        self._positions = _positions(dataset.rows, dataset.pixel_plan.whole.rows)
        self._store, self._augment, self._whole = store, augment, dataset.pixel_plan.whole

    def __getitems__(self, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
        indices, epochs = map(list, zip(*pairs, strict=True))
        images, sizes_B2 = self._store.read(self._positions[indices], self._whole)
        return {
            "pixels": images if self._augment is None else self._augment(images, indices, epochs, sizes_B2),
            "labels": self._labels[indices],
            "domains": self._domains[indices],
            "indices": torch.tensor(indices),
            "epochs": torch.tensor(epochs),
            "sizes": torch.from_numpy(sizes_B2.astype("int64")),
        }


def _positions(rows_N: np.ndarray, whole_rows_M: np.ndarray) -> np.ndarray:
    """(N,) the positions of the samples of a view in the whole dataset, found by their rows of the table."""
    order_M = np.argsort(whole_rows_M)
    return order_M[np.searchsorted(whole_rows_M, rows_N, sorter=order_M)]


def _whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


class _EvalSamples(Dataset):
    def __init__(self, dataset: DomainDataset, transform: Callable[[Image], Tensor]) -> None:
        self._dataset, self._transform = dataset, transform

    def __getitem__(self, index: int) -> dict[str, Any] | BadImage:
        return _sample(self._dataset, index, self._transform)


def _sample(dataset: DomainDataset, index: int, transform: Callable[[Image], Tensor]) -> dict[str, Any] | BadImage:
    try:
        image = dataset.image(index)
    except BadImage:
        time.sleep(RETRY_SECONDS)  # a network disk may need a moment
        try:
            image = dataset.image(index)
        except BadImage as error:
            return error
    return {
        "pixels": transform(image),
        "labels": int(dataset.labels[index]),
        "domains": int(dataset.domain_ids[index]),
        "indices": index,
    }


def _collate(samples: list[dict[str, Any] | BadImage]) -> dict[str, Tensor] | BadImage:
    for sample in samples:
        if isinstance(sample, BadImage):
            return sample
    return default_collate(samples)
