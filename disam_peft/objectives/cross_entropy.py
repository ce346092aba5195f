"""Cross entropy of each sample, with or without label smoothing. Shapes in this file: B samples, C classes."""

from __future__ import annotations

from torch import Tensor, nn

from disam_peft.config.losses import CrossEntropyConfig
from disam_peft.objectives.base import Loss, Outputs


def cross_entropy(logits_BC: Tensor, labels_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each sample in nats, (B,), computed in float32 or better whatever the logits are.

    With label smoothing eps the target of a sample is ``(1 - eps) one_hot(y) + eps / C`` (Szegedy et al. 2016,
    arXiv 1512.00567).
    """
    logits_BC = logits_BC if logits_BC.dtype.itemsize >= 4 else logits_BC.float()
    return nn.functional.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=label_smoothing)


class CrossEntropy(Loss):
    """See ``cross_entropy``."""

    def __init__(self, config: CrossEntropyConfig) -> None:
        super().__init__(config)
        self._label_smoothing = config.label_smoothing
        self.is_cross_entropy = config.label_smoothing == 0

    def __call__(self, outputs: Outputs) -> Tensor:
        return cross_entropy(outputs.logits_BC, outputs.labels_B, self._label_smoothing)
