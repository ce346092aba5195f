"""What terms of the objective cost: a DISAM step with each of them, against the same step without."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from disam_peft import DISAM
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.objectives.objective import Objective
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.micro_batching import MicroBatches, StepGradient

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone
from .steps import DOMAINS, RHO, VARIANCE_WEIGHT, Batch

ADAPTERS: dict[str, tuple[AdapterConfig, int]] = {
    "LoRA last 4": (LoraAdapterConfig(blocks=LastBlocks(last=4), rank=4, alpha=8, seed=0), 7),
    "LoRA last 4 of both": (
        LoraAdapterConfig(towers=["image", "text"], blocks=LastBlocks(last=4), rank=4, alpha=8, seed=0),
        7,
    ),
    "LoRA all 12": (LoraAdapterConfig(rank=4, alpha=8, seed=0), 7),
    "CoOp 65 classes": (CoOpConfig(seed=0), 65),
}
"""Each with its number of classes."""

PENALTIES: dict[str, dict[str, object]] = {
    kind: {"penalties": [{"kind": kind, "anneal": 0}]} for kind in ("vrex", "groupdro", "irm", "coral", "mmd", "fishr")
}
LOSSES: dict[str, dict[str, object]] = {
    f"loss {kind}": {"loss": kind} for kind in ("focal", "margin_softmax", "sigmoid", "contrastive")
}
TERMS: dict[str, dict[str, dict[str, object]]] = {
    "LoRA last 4": {
        **LOSSES,
        "anchor logits": {"anchors": [{"kind": "logits"}]},
        "anchor image_features": {"anchors": [{"kind": "image_features"}]},
        "anchor weights": {"anchors": [{"kind": "weights"}]},
        **PENALTIES,
    },
    "LoRA last 4 of both": {"anchor class_features": {"anchors": [{"kind": "class_features"}]}},
    "LoRA all 12": {"anchor logits": {"anchors": [{"kind": "logits"}]}},
    "CoOp 65 classes": {
        "anchor logits": {"anchors": [{"kind": "logits"}]},
        "anchor class_features": {"anchors": [{"kind": "class_features"}]},
        "fishr": PENALTIES["fishr"],
    },
}
"""Adapter -> name of a term -> ``objective`` as a recipe has it."""
IN_MICRO_BATCHES = "LoRA last 4"
MICRO_BATCHES = 4
"""This adapter is measured in so many micro-batches, too."""


def rows(folder: Path, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table: whole steps from pixels, in one micro-batch and in several."""
    found = []
    divisions = [(name, MicroBatches(1, batch_size, "whole")) for name in TERMS]
    divisions.append((IN_MICRO_BATCHES, MicroBatches(MICRO_BATCHES, -(-batch_size // MICRO_BATCHES), "two_phase")))
    accelerator = start_accelerator("no")
    for adapter_name, micro_batches in divisions:
        terms, (config, classes) = TERMS[adapter_name], ADAPTERS[adapter_name]
        backbone, prompts = our_backbone(folder, device), class_prompts(classes)
        classifier = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).to(device).train()
        params = list(classifier.trainable().values())
        batch = Batch.draw(batch_size, backbone, classes)
        data = {"pixels": batch.pixels_BCHW, "labels": batch.labels_B, "domains": batch.domains_B.cpu()}

        variants = {}
        for name, settings in {"plain": {}, **terms}.items():
            objective = Objective(ObjectiveConfig.model_validate(settings))
            objective.remember_start(params)
            disam = DISAM(params, RHO, VARIANCE_WEIGHT, num_domains=DOMAINS)
            gradient = StepGradient(classifier, disam, micro_batches, accelerator, objective)
            variants[name] = partial(gradient, data)
        seconds = interleaved(variants, rounds, device)
        where = adapter_name if micro_batches.count == 1 else f"{adapter_name}, {micro_batches.count} micro-batches"
        found += [Row(f"{where}: DISAM with {name} / DISAM", ratios(seconds[name], seconds["plain"])) for name in terms]
    return found
