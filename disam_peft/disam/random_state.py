"""torch's random state, so that both passes draw the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of the CPU generator and of those of the accelerators in play."""

    cpu: Tensor
    accelerators: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> RandomState:
        """The present state, of the CPU and of every accelerator that ``tensors`` live on."""
        devices = {t.device: None for t in tensors if t.device.type not in ("cpu", "meta")}
        states = tuple((device, torch.get_device_module(device).get_rng_state(device)) for device in devices)
        return cls(torch.get_rng_state(), states)

    def restore(self) -> None:
        """Wind back to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.accelerators:
            torch.get_device_module(device).set_rng_state(state, device)
