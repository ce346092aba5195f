"""Copies from the host's memory to a device, without the host and the device waiting for each other.

A copy from ordinary memory makes the host wait until the device has finished all the work that it was given before. A
copy from pinned memory is queued like any other work. On a CPU, these functions copy nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``. The host does not wait until it has arrived."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prefetch_to_device(
    batches: Iterable[dict[str, Tensor]], device: torch.device, names: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """The same batches, in which the tensors of these names are on ``device``.

    On a GPU they are copied on a stream of their own. A host that does not wait asks for a batch while the device still
    works on the batch before it, so the copy runs at the same time as that work and not after it.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        if copies is None:
            yield {**batch, **{name: to_device(batch[name], device) for name in names}}
            continue
        with torch.cuda.stream(copies):
            copied = {name: to_device(batch[name], device) for name in names}
        work = torch.cuda.current_stream(device)
        work.wait_stream(copies)
        for tensor in copied.values():
            tensor.record_stream(work)  # its memory is given to the next batch only when the work on it is done
        yield {**batch, **copied}


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers as a tensor on ``device``, copied there once. All callers share it, so it must not be changed."""
    return torch.tensor(values, dtype=dtype, device=device)
