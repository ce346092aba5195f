"""The adapter's state with the highest score; the first of equals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from disam_peft.classification.classifier import ClipClassifier


class BestState:
    """Validates the classifier when told to, and remembers its best state.

    Attributes:
        step, score, tensors: of the best state so far; None before the first, and where nobody validates.
    """

    def __init__(
        self, classifier: ClipClassifier, validate: Callable[[], Any] | None, on_best: Callable[[], None] | None
    ) -> None:
        self._classifier, self._validate, self._on_best = classifier, validate, on_best
        self.step: int | None = None
        self.score: Any = None
        self.tensors: dict[str, Tensor] | None = None

    def offer(self, step: int) -> Any:
        """Validate the present state; its score, or None if nobody validates."""
        if self._validate is None:
            return None
        score = self._validate()
        self._classifier.train()
        if self.score is None or score > self.score:
            self.step, self.score = step, score
            self.tensors = {name: p.detach().clone() for name, p in self._classifier.trainable().items()}
            if self._on_best is not None:
                self._on_best()
        return score

    @torch.no_grad()
    def restore(self, *, announce: bool) -> None:
        """Put the classifier into its best state, in eval mode. ``announce``: let it be saved once more."""
        self._classifier.eval()
        if self.tensors is None:
            return
        for name, p in self._classifier.trainable().items():
            p.copy_(self.tensors[name])
        if announce and self._on_best is not None:
            self._on_best()
