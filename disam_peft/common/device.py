"""From the host's memory to a device's, without one waiting for the other.

A copy from ordinary memory makes the host wait until the device has done all that it was given before. From pinned
memory it is queued like any other work. On a CPU nothing here copies anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host does not wait for it to arrive."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sent_ahead(
    batches: Iterable[dict[str, Tensor]], device: torch.device, names: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """The same batches, with the tensors of these names on ``device``.

    On a GPU they travel on a stream of their own. A host that does not wait asks for a batch while the device is still
    busy with the one before it, so the copy runs beside that work and not after it.
    """
    travel = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        if travel is None:
            yield {**batch, **{name: sent(batch[name], device) for name in names}}
            continue
        with torch.cuda.stream(travel):
            arriving = {name: sent(batch[name], device) for name in names}
        work = torch.cuda.current_stream(device)
        work.wait_stream(travel)
        for tensor in arriving.values():
            tensor.record_stream(work)  # its memory is given to the next batch only when the work on it is done
        yield {**batch, **arriving}


@cache
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers on ``device``, sent once. Read only: everybody gets the same tensor."""
    return torch.tensor(values, dtype=dtype, device=device)
