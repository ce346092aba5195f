"""Everything in a step but the two forward-backward passes: domain sums, weights, norm, perturbation, restore."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from disam_peft import DISAM
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.objectives.cross_entropy import cross_entropy

from .measure import Row, finish
from .models import class_prompts, our_backbone
from .steps import DOMAINS, RHO, VARIANCE_WEIGHT, Batch

CLASSES = 7


def rows(folder: Path, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """LoRA on q and v of all blocks: the most tensors that are perturbed in everyday use."""
    backbone, prompts = our_backbone(folder, device), class_prompts(CLASSES)
    adapter = build_adapter(LoraAdapterConfig(seed=0), backbone, prompts)
    classifier = ClipClassifier(backbone, adapter, prompts).to(device).train()
    params = list(classifier.trainable().values())
    batch = Batch.draw(batch_size, backbone, CLASSES)
    frozen = classifier.encode_frozen(batch.pixels_BCHW)
    in_passes = 0.0

    def seconds_since(start: float) -> float:
        finish(device)
        return time.perf_counter() - start

    def timed_loss() -> Tensor:
        nonlocal in_passes
        finish(device)
        start = time.perf_counter()
        loss_B = cross_entropy(classifier.logits(frozen), batch.labels_B)
        in_passes += seconds_since(start)
        return loss_B

    def timed_backward(loss: Tensor) -> None:
        nonlocal in_passes
        finish(device)
        start = time.perf_counter()
        loss.backward(inputs=params)
        in_passes += seconds_since(start)

    disam = DISAM(params, RHO, VARIANCE_WEIGHT, num_domains=DOMAINS, backward=timed_backward)
    shares, milliseconds = [], []
    for number in range(rounds + 1):
        in_passes = 0.0
        start = time.perf_counter()
        disam.backward(timed_loss, batch.domains_B)
        whole = seconds_since(start)
        if number > 0:
            shares.append(100 * (whole - in_passes) / in_passes)
            milliseconds.append(1e3 * (whole - in_passes))
    what = f"bookkeeping of a step, {len(params)} tensors, {sum(p.numel() for p in params):,} parameters"
    return [
        Row(f"{what} / its two passes", shares, 1.0, unit="%"),
        Row(what, milliseconds, unit="ms"),
    ]
