"""Copies of the trained tensors in flat buffers, with which averages compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from disam_peft.disam.perturbation import by_device_and_dtype, flatten, unflatten


class FlatWeights:
    """A copy of the trained tensors, in one flat buffer per device and dtype.

    An adapter is many small tensors, and a step on a GPU counts its kernels.

    Args:
        params: the trained tensors; the copy begins with what they hold.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._like = [p.detach() for p in params]
        self._groups = [[_index_of(params, p) for p in group] for group in by_device_and_dtype(params)]
        self.buffers = self.flattened(params)

    def flattened(self, params: Sequence[Tensor]) -> list[Tensor]:
        """What these tensors hold, in new buffers of this layout."""
        return [flatten([params[i].detach() for i in group]) for group in self._groups]

    @torch.no_grad()
    def move(self, params: Sequence[Tensor], share: Tensor, moves: Tensor) -> None:
        """``copy <- copy + share * (params - copy)``; a share of 1 copies every bit.

        Args:
            share: shape ().
            moves: shape (), bool. False leaves every bit as it is, also where ``params`` are not finite.
        """
        for buffer, new in zip(self.buffers, self.flattened(params), strict=True):
            # In the type of the buffer: a share in float32 would cost a float64 average half of its digits.
            moved = torch.lerp(buffer, new, share.to(buffer.device, buffer.dtype))
            buffer.copy_(torch.where(moves.to(buffer.device), moved, buffer))

    def tensors(self, buffers: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The tensors in their order and shapes.

        Args:
            buffers: others of this layout, on any device, in place of the own ones.
        """
        found: dict[int, Tensor] = {}
        for group, buffer in zip(self._groups, self.buffers if buffers is None else buffers, strict=True):
            found.update(zip(group, unflatten(buffer, [self._like[i] for i in group]), strict=True))
        return [found[i] for i in range(len(self._like))]

    def state_dict(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.buffers]

    def load_state_dict(self, state: Sequence[Tensor]) -> None:
        for buffer, saved in zip(self.buffers, state, strict=True):
            buffer.copy_(saved)


def number_on(params: Sequence[Tensor], value: float) -> Tensor:
    """A number of shape () beside the parameters, in float64 where the device has it."""
    device = params[0].device
    return torch.tensor(value, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def count_on(params: Sequence[Tensor]) -> Tensor:
    """A counter of shape () beside the parameters."""
    return torch.zeros((), dtype=torch.int64, device=params[0].device)


def _index_of(params: Sequence[Tensor], wanted: Tensor) -> int:
    """The position of a tensor in a list; tensors are compared by identity."""
    return next(number for number, p in enumerate(params) if p is wanted)
