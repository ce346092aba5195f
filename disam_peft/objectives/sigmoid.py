"""SigLIP's loss of each sample: a yes or a no for each class. Shapes in this file: B samples, C classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from disam_peft.config.losses import SigmoidConfig
from disam_peft.objectives.base import Loss, Outputs


def sigmoid(logits_BC: Tensor, labels_B: Tensor, bias: float | Tensor = 0.0) -> Tensor:
    """``-sum_j log sigmoid(z_j (logit_j + bias))`` of each sample, (B,); z is 1 for its label, -1 for other classes.

    SigLIP's ``sigmoid_loss`` (arXiv 2303.15343, algorithm 1) on classes instead of texts: summed over them, in float32
    or better whatever the logits are.
    """
    logits_BC = logits_BC if logits_BC.dtype.itemsize >= 4 else logits_BC.float()
    sign_BC = torch.full_like(logits_BC, -1.0).scatter(1, labels_B[:, None], 1.0)
    return -nn.functional.logsigmoid(sign_BC * (logits_BC + bias)).sum(dim=1)


def from_their_mean(logits_BC: Tensor) -> Tensor:
    """``logit_j - mean_k logit_k - log(C - 1)``, (B, C): without a preference each image says yes to one class of C."""
    return logits_BC - logits_BC.mean(dim=1, keepdim=True) - math.log(max(1, logits_BC.shape[1] - 1))


class Sigmoid(Loss):
    """See ``sigmoid``; the bias is the setting's, or the model's own, or stands in for one (``from_their_mean``)."""

    config: SigmoidConfig

    def __call__(self, outputs: Outputs) -> Tensor:
        logits_BC = outputs.logits_BC
        if self.config.bias is not None:
            own = torch.zeros_like(logits_BC[0, 0]) if outputs.bias is None else outputs.bias.to(logits_BC)
            return sigmoid(logits_BC - own, outputs.labels_B, self.config.bias)
        if outputs.bias is None:
            logits_BC = from_their_mean(logits_BC)
        return sigmoid(logits_BC, outputs.labels_B)
