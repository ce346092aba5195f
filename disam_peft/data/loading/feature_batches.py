"""Training batches from a feature store. N images, V views of each, B samples of a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from disam_peft.common.device import prefetch_to_device, to_device
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.loading.sampler import DomainBatches
from disam_peft.data.stores.features import FeatureStore

RESIDENT_SHARE = 0.05  # of the device's free memory, most of which the training itself will want
LOADED_AT_ONCE = 1024  # rows
Item = TypeVar("Item")
_END: Any = object()


def feature_batches(
    store: FeatureStore, dataset: DomainDataset, batches: DomainBatches, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """``{"frozen": (B, ...), "labels", "domains", "indices": (B,)}`` of every step; an epoch is a view.

    On a GPU, ``frozen`` and ``labels`` are on the device. A small store is copied there as a whole, once. From a larger
    store, a thread reads the rows of the next batches ahead. On a CPU, training itself keeps the cores busy, and rows
    are read when they are needed.
    """
    if device.type != "cuda":
        return _read(store, dataset, batches)
    if _fits(store, batches, device):
        return _picked(_resident(store, device), store, dataset, batches, device)
    pinned = ({name: tensor.pin_memory() for name, tensor in batch.items()} for batch in _read(store, dataset, batches))
    # a thread begins on the first device, whichever its process works on
    number = torch.cuda.current_device() if device.index is None else device.index
    return prefetch_to_device(
        read_ahead(pinned, in_thread=partial(torch.cuda.set_device, number)), device, ("frozen", "labels")
    )


def _read(store: FeatureStore, dataset: DomainDataset, batches: DomainBatches) -> Iterator[dict[str, Tensor]]:
    for indices, epochs in _columns(batches):
        yield {"frozen": store.rows(indices, epochs), **_names(dataset, indices)}


def _picked(
    rows: Tensor, store: FeatureStore, dataset: DomainDataset, batches: DomainBatches, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    for indices, epochs in _columns(batches):
        rows_B = to_device(torch.from_numpy(store.places(indices, epochs)), device)
        batch = _names(dataset, indices)
        yield {**batch, "frozen": rows.index_select(0, rows_B), "labels": to_device(batch["labels"], device)}


def _columns(batches: DomainBatches) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for batch in batches:
        indices, epochs = (np.array(column, dtype=np.int64) for column in zip(*batch, strict=True))
        yield indices, epochs


def _names(dataset: DomainDataset, indices: np.ndarray) -> dict[str, Tensor]:
    return {
        "labels": torch.from_numpy(dataset.labels[indices]),
        "domains": torch.from_numpy(dataset.domain_ids[indices]),
        "indices": torch.from_numpy(indices),
    }


def _fits(store: FeatureStore, batches: DomainBatches, device: torch.device) -> bool:
    """Whether the store is small for the device, and no larger than what the run will read from it anyway."""
    rows, read = store.views * len(store), len(batches) * batches.batch_size // batches.world_size
    free, _ = torch.cuda.mem_get_info(device)
    return rows <= read and rows * store.rows([0]).nbytes <= RESIDENT_SHARE * free


def _resident(store: FeatureStore, device: torch.device) -> Tensor:
    """All rows, (V * N, ...), in the order of ``FeatureStore.places``."""
    one = store.rows([0])
    rows = torch.empty((store.views * len(store), *one.shape[1:]), dtype=one.dtype, device=device)
    for view in range(store.views):
        for start in range(0, len(store), LOADED_AT_ONCE):
            indices = np.arange(start, min(start + LOADED_AT_ONCE, len(store)))
            first = view * len(store) + start
            rows[first : first + len(indices)] = store.rows(indices, view).to(device)
    return rows


def read_ahead(
    items: Iterable[Item], *, depth: int = 2, in_thread: Callable[[], object] = lambda: None
) -> Iterator[Item]:
    """The same items in the same order; up to ``depth`` of them are made before they are asked for.

    One thread makes all items. It ends with the iteration, also where the iteration is left early. An error in the
    thread is raised here when the turn of its item has come. The thread must not draw from torch's own random streams,
    because nobody could say when it draws.

    Args:
        in_thread: called in the thread before the first item.
    """
    iterator = iter(items)
    pool = ThreadPoolExecutor(1, "ahead", initializer=in_thread)
    try:
        waiting: deque[Future[Item]] = deque(pool.submit(next, iterator, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, iterator, _END))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
