"""What an average of the weights costs: taking them in after a DISAM step, against the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from disam_peft import DISAM
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.average import BmaConfig, EmaConfig, KeptAverageConfig, SwaConfig, SwadConfig
from disam_peft.config.full_adapter import FullConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.averages.weight_averages import WeightAverages
from disam_peft.training.guarded_optimizer import StepOutcome
from disam_peft.training.micro_batching import MicroBatches, StepGradient

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone
from .steps import DOMAINS, RHO, VARIANCE_WEIGHT, Batch

CLASSES = 7
ADAPTERS: dict[str, AdapterConfig] = {
    "LoRA all 12": LoraAdapterConfig(rank=4, alpha=8, seed=0),
    "whole image tower": FullConfig(),
}
AVERAGES: dict[str, KeptAverageConfig] = {
    "EMA": EmaConfig(),
    "SWA": SwaConfig(start=0.0),
    "BMA": BmaConfig(),
    "SWAD": SwadConfig(),
}
MOST = {("LoRA all 12", "EMA"): 1.0}
"""Per cent of the step."""


def rows(folder: Path, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table: whole steps from pixels, in one micro-batch."""
    found = []
    accelerator = start_accelerator("no")
    for adapter_name, config in ADAPTERS.items():
        backbone, prompts = our_backbone(folder, device), class_prompts(CLASSES)
        classifier = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).to(device).train()
        params = list(classifier.trainable().values())
        batch = Batch.draw(batch_size, backbone, CLASSES)
        data = {"pixels": batch.pixels_BCHW, "labels": batch.labels_B, "domains": batch.domains_B.cpu()}
        disam = DISAM(params, RHO, VARIANCE_WEIGHT, num_domains=DOMAINS)
        gradient = StepGradient(classifier, disam, MicroBatches(1, batch_size, "whole"), accelerator, Objective())
        taken = StepOutcome(torch.tensor(True, device=device))
        for name, average in AVERAGES.items():
            averages = WeightAverages([average], params, steps=10_000)
            # Each is timed right after a step, with what the step left in the caches.
            variants: dict[str, Callable[[], object]] = {
                "step": partial(gradient, data),
                "average": partial(averages.update, taken),
            }
            seconds = interleaved(variants, rounds, device)
            shares = [100 * share for share in ratios(seconds["average"], seconds["step"])]
            what = f"{adapter_name}, {sum(p.numel() for p in params):,} parameters: {name} / DISAM step"
            found.append(Row(what, shares, MOST.get((adapter_name, name)), unit="%"))
    return found
