"""Per-sample losses: what the step averages, per domain and over the batch. B samples, C classes."""

from __future__ import annotations

from torch import Tensor, nn


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross entropy of each sample in nats, (B,), computed in float32 or better whatever the logits are."""
    logits_BC = logits_BC if logits_BC.dtype.itemsize >= 4 else logits_BC.float()
    return nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")
