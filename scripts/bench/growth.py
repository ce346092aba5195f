"""How the price of a step grows with the number of domains (it should not) and of samples (it should in proportion)."""

from __future__ import annotations

from pathlib import Path

import torch

from disam_peft import DISAM
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.objectives.cross_entropy import cross_entropy

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone
from .steps import RHO, VARIANCE_WEIGHT, Batch, Step

DOMAINS = (2, 8, 64)
SAMPLES = (16, 64)
CLASSES = 65


def growth_step(folder: Path, samples: int, domains: int, device: torch.device) -> Step:
    """LoRA on the last block, from stored features: as little as there can be beside the bookkeeping."""
    backbone, prompts = our_backbone(folder, device), class_prompts(CLASSES)
    config = LoraAdapterConfig(blocks=LastBlocks(last=1))
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).to(device).train()
    batch = Batch.draw(samples, backbone, CLASSES)
    frozen = classifier.encode_frozen(batch.pixels_BCHW)
    domains_B = torch.arange(samples, device=device) % domains
    params = list(classifier.trainable().values())
    disam = DISAM(params, RHO, VARIANCE_WEIGHT, num_domains=domains)

    def run() -> None:
        disam.backward(lambda: cross_entropy(classifier.logits(frozen), batch.labels_B), domains_B)

    return Step(run, classifier.trainable())


def rows(folder: Path, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table."""
    most = SAMPLES[-1]
    step = {f"{n} domains": growth_step(folder, most, n, device).run for n in DOMAINS}
    step |= {f"{n} samples": growth_step(folder, n, DOMAINS[0], device).run for n in SAMPLES[:-1]}
    seconds = interleaved(step, rounds, device)
    few = seconds[f"{DOMAINS[0]} domains"]
    found = [
        Row(f"step of {most} samples: {n} domains / {DOMAINS[0]}", ratios(seconds[f"{n} domains"], few))
        for n in DOMAINS[1:]
    ]
    for n in SAMPLES[:-1]:
        found.append(Row(f"step: {most} samples / {n} samples", ratios(few, seconds[f"{n} samples"])))
    return found
