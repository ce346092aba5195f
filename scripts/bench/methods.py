"""What a step of each method costs, against a step of plain DISAM."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from disam_peft import DISAM
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.micro_batching import MicroBatches, StepGradient

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone
from .objective_terms import ADAPTERS
from .steps import DOMAINS, RHO, VARIANCE_WEIGHT, Batch

METHODS: dict[str, dict[str, Any]] = {
    "erm": {"rho": 0.0},
    "sam": {"variance_weight": 0.0},
    "gsam": {"variance_weight": 0.0, "descent": "gsam"},
    "sagm": {"variance_weight": 0.0, "descent": "sagm"},
    "disam_gsam": {"descent": "gsam"},
    "disam_sagm": {"descent": "sagm"},
    "disam, relative": {"variance_scale": "relative"},
    "disam, entropic": {"variance_form": "entropic"},
    "disam, adaptive": {"adaptive": True},
    "disam, rho_factors": {},
}
"""Settings of ``DISAM`` in which each differs from plain DISAM. ``erm`` is also a step that ``from`` or ``every`` leave
without a perturbation."""


def rows(folder: Path, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table: the gradients of whole steps from pixels, in one micro-batch.

    On a CPU with one thread it is CPU time, which other programs disturb less; otherwise time on the wall.
    """
    found = []
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    accelerator = start_accelerator("no")
    for adapter_name, (config, classes) in ADAPTERS.items():
        backbone, prompts = our_backbone(folder, device), class_prompts(classes)
        classifier = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).to(device).train()
        params = list(classifier.trainable().values())
        batch = Batch.draw(batch_size, backbone, classes)
        data = {"pixels": batch.pixels_BCHW, "labels": batch.labels_B, "domains": batch.domains_B.cpu()}

        variants = {}
        for name, settings in {"disam": {}, **METHODS}.items():
            options = {"rho": RHO, "variance_weight": VARIANCE_WEIGHT, "num_domains": DOMAINS, **settings}
            disam = DISAM(params, **options)
            if name == "disam, rho_factors":
                disam.rho_factors = dict.fromkeys(params[::2], 0.5)
            whole = MicroBatches(1, batch_size, "whole")
            variants[name] = partial(StepGradient(classifier, disam, whole, accelerator), data)
        seconds = interleaved(variants, rounds, device, clock=clock)
        found += [
            Row(f"{adapter_name}: step of {name} / step of disam", ratios(seconds[name], seconds["disam"]))
            for name in METHODS
        ]
    return found
