"""Focal loss of each sample. Shapes in this file: B samples, C classes."""

from __future__ import annotations

import torch
from torch import Tensor

from disam_peft.config.losses import FocalConfig
from disam_peft.objectives.base import Loss, Outputs


def focal(logits_BC: Tensor, labels_B: Tensor, gamma: float = 2.0, label_smoothing: float = 0.0) -> Tensor:
    """``(1 - p_y)^gamma (-log p_y)`` of each sample, (B,), computed in float32 or better (arXiv 1708.02002).

    With label smoothing eps every class j adds ``(1 - p_j)^gamma (-log p_j)`` times its share of the label, which is
    ``(1 - eps) one_hot(y) + eps / C``.
    """
    logits_BC = logits_BC if logits_BC.dtype.itemsize >= 4 else logits_BC.float()
    log_p_BC = logits_BC.log_softmax(dim=1)
    if label_smoothing == 0:
        return _focal(log_p_BC.gather(1, labels_B[:, None])[:, 0], gamma)
    term_BC = _focal(log_p_BC, gamma)
    of_label_B = term_BC.gather(1, labels_B[:, None])[:, 0]
    return (1 - label_smoothing) * of_label_B + label_smoothing * term_BC.mean(dim=1)


def _focal(log_p: Tensor, gamma: float) -> Tensor:
    # 1 - p from log p without another cancellation; never 0, where a power below 1 has no derivative
    not_p = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return -(not_p**gamma) * log_p


class Focal(Loss):
    """See ``focal``."""

    config: FocalConfig

    def __call__(self, outputs: Outputs) -> Tensor:
        return focal(outputs.logits_BC, outputs.labels_B, self.config.gamma, self.config.label_smoothing)
