"""L2-SP: the distance of the trained tensors to where they started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disam_peft.config.anchors import WeightsAnchorConfig
from disam_peft.objectives.anchors.base import ModelAnchor
from disam_peft.objectives.base import Outputs


def l2_sp(params: Sequence[Tensor], start: Sequence[Tensor]) -> Tensor:
    """``1/2 sum ||w - w0||^2`` over the tensors, shape (): the penalty of L2-SP for alpha = 1 (arXiv 1802.01483).

    Args:
        params: w; at least one.
        start: w0, of the same shapes.
    """
    terms = [(w - w0).square().sum() for w, w0 in zip(params, start, strict=True)]
    return 0.5 * torch.stack(terms).sum()


class WeightsAnchor(ModelAnchor):
    """See ``l2_sp``. The start is saved with the state of a run, since a resumed one cannot draw it again."""

    def __init__(self, config: WeightsAnchorConfig) -> None:
        super().__init__(config)
        self._params: Sequence[Tensor] = ()
        self._start: list[Tensor] = []

    def value(self, outputs: Outputs) -> Tensor:
        """
        Raises:
            ValueError: nobody said which tensors are trained.
        """
        if not self._params:
            raise ValueError(
                "the anchor 'weights' does not know where the trained tensors started; call "
                "Objective.remember_start(params) before the first step"
            )
        return l2_sp(self._params, self._start)

    def remember_start(self, params: Sequence[Tensor]) -> None:
        self._params = list(params)
        self._start = [p.detach().clone() for p in params]

    def state_dict(self) -> dict[str, Any]:
        return {"start": [tensor.clone() for tensor in self._start]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._start = [saved.to(p) for saved, p in zip(state["start"], self._params, strict=True)]
