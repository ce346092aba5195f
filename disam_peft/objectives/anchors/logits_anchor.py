"""Distance of the logits to those of zero-shot classification. Shapes in this file: B samples, C classes."""

from __future__ import annotations

import torch
from torch import Tensor

from disam_peft.config.anchors import LogitsAnchorConfig
from disam_peft.objectives.anchors.base import SampleAnchor
from disam_peft.objectives.base import Outputs


def kl_to_reference(logits_BC: Tensor, reference_BC: Tensor) -> Tensor:
    """``KL(p || q) = sum_c p_c (log p_c - log q_c)`` of each sample in nats, (B,), with the probabilities p of the
    reference and q of ``logits_BC``; the same for logits that differ by a constant per sample.

    The mean over samples and classes of PromptSRC's code (arXiv 2307.06948) is the mean of these divided by C.
    """
    log_p_BC = reference_BC.log_softmax(dim=1)
    return (log_p_BC.exp() * (log_p_BC - logits_BC.log_softmax(dim=1))).sum(dim=1)


def l1_to_reference(logits_BC: Tensor, reference_BC: Tensor) -> Tensor:
    """``(1/C) sum_c |z_c - z0_c|`` of each sample, (B,)."""
    return (logits_BC - reference_BC).abs().mean(dim=1)


class LogitsAnchor(SampleAnchor):
    """See ``kl_to_reference`` and ``l1_to_reference``."""

    config: LogitsAnchorConfig

    def __call__(self, outputs: Outputs) -> Tensor:
        distance = kl_to_reference if self.config.distance == "kl" else l1_to_reference
        wide = torch.promote_types(outputs.zero_shot.logits_BC.dtype, outputs.logits_BC.dtype)
        return distance(outputs.logits_BC.to(wide), outputs.zero_shot.logits_BC.to(wide))
