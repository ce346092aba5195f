"""Margin metric softmax: margins between classes as far apart as their texts are.

Shapes in this file: B samples, C classes, E embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from disam_peft.config.losses import MarginSoftmaxConfig
from disam_peft.objectives.base import Loss, Outputs
from disam_peft.objectives.cross_entropy import cross_entropy


def margin_softmax(
    features_BE: Tensor,
    class_features_CE: Tensor,
    labels_B: Tensor,
    scale: float | Tensor = 100.0,
    margin: float = 0.3,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of each sample, (B,), of the logits ``scale (u_i . t_j - margin (t_y . t_j))``.

    Args:
        features_BE: image features; u_i are these, normalised here.
        class_features_CE: t_j, normalised; the gradient runs through the margins too.
        scale: the factor of the cosines, ``exp(logit_scale)``.
        margin: lambda.
    """
    logits_BC = scale * nn.functional.normalize(features_BE, dim=-1) @ class_features_CE.T
    return cross_entropy(
        margin_logits(logits_BC, class_features_CE, labels_B, scale, margin), labels_B, label_smoothing
    )


def margin_logits(
    logits_BC: Tensor, class_features_CE: Tensor, labels_B: Tensor, scale: float | Tensor = 100.0, margin: float = 0.3
) -> Tensor:
    """``logits_ij - scale margin (t_y . t_j)`` for the label y of sample i, (B, C).

    Up to a constant for each sample it is ``logits_ij + scale margin (1 - t_y . t_j)``: every class but the true one
    gains, the more the less it resembles it.
    """
    wide = torch.promote_types(logits_BC.dtype, torch.float32)
    with torch.autocast(logits_BC.device.type, enabled=False):
        text_CE = class_features_CE.to(wide)
        similarity_BC = text_CE[labels_B] @ text_CE.T
        return logits_BC.to(wide) - scale * margin * similarity_BC


class MarginSoftmax(Loss):
    """See ``margin_softmax``."""

    config: MarginSoftmaxConfig

    def __call__(self, outputs: Outputs) -> Tensor:
        logits_BC = margin_logits(
            outputs.logits_BC, outputs.class_features, outputs.labels_B, outputs.logit_scale, self.config.margin
        )
        return cross_entropy(logits_BC, outputs.labels_B, self.config.label_smoothing)
