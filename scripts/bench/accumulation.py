"""What a step costs in micro-batches, against the same step on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from disam_peft import DISAM
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.disam.passes import Mode
from disam_peft.objectives.cross_entropy import cross_entropy

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone
from .steps import DOMAINS, RHO, VARIANCE_WEIGHT, Batch, Step, difference

CLASSES = 7
PIECES = 4


def accumulation_steps(folder: Path, batch_size: int, device: torch.device) -> dict[str, Step]:
    """LoRA on all blocks: the whole batch at once, in pieces of mixed domains, and in pieces of one domain each."""
    backbone, prompts = our_backbone(folder, device), class_prompts(CLASSES)
    adapter = build_adapter(LoraAdapterConfig(seed=0), backbone, prompts)
    classifier = ClipClassifier(backbone, adapter, prompts).to(device).train()
    trainable = classifier.trainable()
    with torch.no_grad():
        for name, p in trainable.items():
            if "lora_B" in name:
                p.normal_(std=0.02, generator=torch.Generator(device).manual_seed(2))
    batch = Batch.draw(batch_size, backbone, CLASSES)
    frozen = classifier.encode_frozen(batch.pixels_BCHW)
    disam = DISAM(trainable.values(), RHO, VARIANCE_WEIGHT, num_domains=DOMAINS)

    def losses(rows_B: Tensor) -> Callable[[], Tensor]:
        return lambda: cross_entropy(classifier.logits(frozen[rows_B]), batch.labels_B[rows_B])

    def step(pieces: list[Tensor], mode: Mode) -> Step:
        domains = [batch.domains_B[rows_B] for rows_B in pieces]
        return Step(
            lambda: disam.backward_accumulated([losses(rows_B) for rows_B in pieces], domains, mode=mode), trainable
        )

    everything_B = torch.arange(batch_size, device=device)
    return {
        "whole": step([everything_B], "two_phase"),
        "mixed": step(list(everything_B.tensor_split(PIECES)), "two_phase"),
        "by domain": step([everything_B[batch.domains_B == d] for d in range(DOMAINS)], "per_domain"),
    }


def rows(folder: Path, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table."""
    steps = accumulation_steps(folder, batch_size, device)
    whole = steps["whole"].gradients()
    exact = {name: difference(steps[name].gradients(), whole) for name in ("mixed", "by domain")}
    seconds = interleaved({name: step.run for name, step in steps.items()}, rounds, device)
    return [
        Row(
            f"DISAM in {PIECES} micro-batches, two-phase / whole batch",
            ratios(seconds["mixed"], seconds["whole"]),
            1.35,
            exact["mixed"],
        ),
        Row(
            f"DISAM in {DOMAINS} micro-batches of one domain each / whole batch",
            ratios(seconds["by domain"], seconds["whole"]),
            None,
            exact["by domain"],
        ),
    ]
