"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from disam_peft.config.average import EmaConfig
from disam_peft.disam.perturbation import by_device_and_dtype, flatten, unflatten
from disam_peft.training.averages.base import Average


class Ema(Average):
    """``average <- decay * average + (1 - decay) * w`` after each step that was taken.

    The first step copies the weights, and there is no bias correction, as in ``torch.optim.swa_utils``.
    """

    kind: ClassVar[str] = "ema"

    def __init__(self, config: EmaConfig, params: Sequence[Tensor]) -> None:
        self._decay = config.decay
        self._like = [p.detach() for p in params]
        self._groups = [[_index_of(params, p) for p in group] for group in by_device_and_dtype(params)]
        # One flat buffer per device and dtype: an adapter is many small tensors, and a GPU step counts its kernels.
        self._flat = [flatten([self._like[i] for i in group]) for group in self._groups]
        self._updates = torch.zeros((), dtype=torch.int64, device=params[0].device)

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], applied: Tensor) -> None:
        for group, flat in zip(self._groups, self._flat, strict=True):
            # In the type of the average: a share in float32 would cost a float64 average half of its digits.
            share = flat.new_full((), 1.0 - self._decay)
            share = torch.where(self._updates.to(flat.device) == 0, torch.ones_like(share), share)
            averaged = torch.lerp(flat, flatten([params[i].detach() for i in group]), share)  # at 1 it copies every bit
            flat.copy_(torch.where(applied.to(flat.device), averaged, flat))
        self._updates += applied.to(self._updates.dtype)

    def tensors(self) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for group, flat in zip(self._groups, self._flat, strict=True):
            found.update(zip(group, unflatten(flat, [self._like[i] for i in group]), strict=True))
        return [found[i] for i in range(len(self._like))]

    def state_dict(self) -> dict[str, Any]:
        return {"average": [flat.clone() for flat in self._flat], "updates": self._updates.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for flat, saved in zip(self._flat, state["average"], strict=True):
            flat.copy_(saved)
        self._updates.copy_(state["updates"])


def _index_of(params: Sequence[Tensor], wanted: Tensor) -> int:
    """The position of a tensor in a list; tensors are compared by identity."""
    return next(number for number, p in enumerate(params) if p is wanted)
