"""The contract of an average of trained weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from disam_peft.config.base import Config


class Average(ABC):
    """An average of the trained tensors over the optimizer steps of a run.

    A new average is one file with a subclass of this, one config class in ``config/average.py``, and one line in
    ``weight_averages.AVERAGES``. It averages the trained tensors themselves. For LoRA that is the average of the
    factors, not of their products: mean(B) mean(A) is not mean(BA).

    Args:
        config: its settings.
        params: the trained tensors as they are before the first step; they are not kept.
    """

    kind: ClassVar[str]
    """Its name in recipes, and the value of ``weights`` in the rows of results."""

    @abstractmethod
    def __init__(self, config: Config, params: Sequence[Tensor]) -> None: ...

    @abstractmethod
    def update(self, params: Sequence[Tensor], applied: Tensor) -> None:
        """Take the weights after one optimizer step into the average.

        Args:
            params: the trained tensors, in the order of the constructor.
            applied: shape (), bool, on the device of the parameters. False means that the step was skipped and the
                average must stay as it is. Reading it on the host would wait for the device: compute with it.
        """

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The averaged tensors, in the order of the constructor. Read only."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the average depends on, as tensors, numbers, strings and lists or dicts of them."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, to the same bits."""
