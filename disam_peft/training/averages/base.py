"""The contract of an average of trained weights. T iterates, P parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
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
        steps: of the whole run; steps count from 1, and skipped steps count.
    """

    kind: ClassVar[str]
    """Its name in recipes, and the value of ``weights`` in the rows of results."""
    needs_validation_loss: ClassVar[bool] = False
    """Whether it is nothing without ``validated``: a run without validation is then refused."""

    @abstractmethod
    def __init__(self, config: Config, params: Sequence[Tensor], steps: int) -> None: ...

    @abstractmethod
    def update(self, params: Sequence[Tensor], applied: Tensor) -> None:
        """Take the weights after one optimizer step into the average.

        Args:
            params: the trained tensors, in the order of the constructor.
            applied: shape (), bool, on the device of the parameters. False means that the step was skipped and the
                average must stay as it is. Reading it on the host would wait for the device: compute with it.
        """

    def validated(self, step: int, loss: float, params: Sequence[Tensor]) -> None:  # noqa: B027 (a hook, not a duty)
        """The trained weights themselves were validated after ``step``. Here an average may wait for the device.

        Args:
            loss: the mean over the source domains of their mean cross entropy on held-back images; the same on all
                ranks. It may be infinite or NaN.
            params: the weights that were validated.
        """

    def is_judged(self, step: int) -> bool:
        """Whether the average is validated where the weights themselves are validated after ``step``. After the last
        step every average is."""
        return True

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """The averaged tensors, in the order of the constructor. Read only."""

    def about(self) -> dict[str, Any]:
        """What ``metrics.jsonl`` records of it at the end of the run."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the average depends on, as tensors, numbers, strings and lists or dicts of them."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave, to the same bits."""


def averages_of_rows(average: Average, params_TP: Tensor) -> Tensor:
    """(T, P): the average after each row of a history of weights, all of whose steps were taken."""
    taken, found = torch.ones((), dtype=torch.bool, device=params_TP.device), [params_TP[:0]]
    for params_P in params_TP:
        average.update([params_P], taken)
        found.append(average.tensors()[0].clone()[None])
    return torch.cat(found)
