"""Warnings of terms of an objective that depend on nothing that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from disam_peft.objectives.anchors.base import Anchor
from disam_peft.objectives.base import Penalty


class NoEffect:
    """Warns once of each penalty and each anchor without a graph."""

    def __init__(self) -> None:
        self._warned_of: set[str] = set()

    def of_anchor(self, anchor: Anchor, distance: Tensor) -> Tensor:
        """``distance``, after a warning if it depends on nothing that is trained."""
        kind = anchor.config.kind
        if torch.is_grad_enabled() and not distance.requires_grad and kind not in self._warned_of:
            self._warned_of.add(kind)
            warnings.warn(
                f"the anchor {kind!r} depends on nothing that is trained here (with this adapter what it compares is "
                "frozen), so it has no effect; remove it, or train what it is about",
                stacklevel=3,
            )
        return distance

    def of_penalty(self, penalty: Penalty, statistics: Sequence[Tensor]) -> None:
        """Warn where none of its statistics depends on what is trained."""
        if not torch.is_grad_enabled() or not statistics or any(tensor.requires_grad for tensor in statistics):
            return
        if type(penalty).__name__ not in self._warned_of:
            self._warned_of.add(type(penalty).__name__)
            warnings.warn(
                f"the penalty {type(penalty).__name__} depends on nothing that is trained here (with this adapter the "
                "image features are frozen), so it has no effect; remove it, or train an adapter of the image tower",
                stacklevel=3,
            )
