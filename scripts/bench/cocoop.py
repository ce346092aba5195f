"""CoCoOp on stored image features, against its trainer's way: for every image all class prompts at their full length,
and all activations kept until backward. Without an optimizer: what is compared is the text tower.

Shapes in this file: B images, C classes, L tokens, M context tokens, W token width, E embedding width.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from disam_peft.adapters.coop.cocoop_adapter import CoCoOpAdapter, meta_token
from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.prompt_adapters import CoCoOpConfig

from .measure import Row, interleaved, ratios
from .memory import process_bytes
from .models import class_prompts, our_backbone, peer_model
from .steps import Step, difference

CONTEXT = 4
SMALL_BUDGET_GB = 0.03
"""Less than ViT-B/32's text tower keeps of two images with 65 classes."""
GB = 1e9
MEMORY_TARGET, TIME_TARGET = 0.25, 1.2
WAYS = ("authors", "ours", "ours, small budget")


def cocoop_classifier(backbone: ClipBackbone, classes: int, budget_gb: float | None) -> ClipClassifier:
    prompts = class_prompts(classes)
    config = CoCoOpConfig(context_tokens=CONTEXT, seed=0, memory_budget_gb=budget_gb)
    return ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).to(backbone.device).train()


class OfOneImage(nn.Module):
    """Stands in for the token embedding and returns the prompts (C, L, W) of the image that was set last."""

    prompts_CLW: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.prompts_CLW


def authors_logits(classifier: ClipClassifier, folder: Path) -> Callable[[Tensor], Tensor]:
    """The loop of their trainer over the images, on the library's own text tower, with the tensors of our adapter."""
    backbone, adapter = classifier.backbone, classifier.adapter
    assert isinstance(adapter, CoCoOpAdapter)
    peer = peer_model(folder).to(backbone.device, backbone.dtype)
    filler = " ".join(["X"] * CONTEXT)
    tokens_CL = backbone.tokenize([f"{filler} {name}." for name in classifier.class_names])
    embeddings_CLW = peer.text_model.embeddings.token_embedding(tokens_CL)
    before_CSW, after_CLW = embeddings_CLW[:, :1], embeddings_CLW[:, 1 + CONTEXT :]
    peer.text_model.embeddings.token_embedding = current = OfOneImage()
    layers = adapter.meta_down, adapter.meta_down_bias, adapter.meta_up, adapter.meta_up_bias

    def logits(features_BE: Tensor) -> Tensor:
        unit_BE = nn.functional.normalize(features_BE, dim=-1)
        context_BMW = adapter.context + meta_token(features_BE, *layers)[:, None]
        rows = []
        for unit_E, context_MW in zip(unit_BE, context_BMW, strict=True):
            context_CMW = context_MW.expand(len(tokens_CL), -1, -1)
            current.prompts_CLW = torch.cat([before_CSW, context_CMW, after_CLW], dim=1)
            text_CE = peer.get_text_features(input_ids=tokens_CL).pooler_output
            rows.append(peer.logit_scale.exp() * nn.functional.normalize(text_CE, dim=-1) @ unit_E)
        return torch.stack(rows)

    return logits


def cocoop_step(way: str, backbone: ClipBackbone, folder: Path, classes: int, batch_size: int) -> Step:
    """Forward and backward pass of the mean cross entropy, one of ``WAYS``."""
    budget = SMALL_BUDGET_GB if way == "ours, small budget" else 4.0
    classifier = cocoop_classifier(backbone, classes, budget)
    generator = torch.Generator().manual_seed(0)
    features_BE = torch.randn(batch_size, backbone.embed_dim, generator=generator).to(backbone.device, backbone.dtype)
    labels_B = torch.randint(classes, (batch_size,), generator=generator).to(backbone.device)
    logits = authors_logits(classifier, folder) if way == "authors" else classifier.logits
    params = classifier.trainable()

    def run() -> None:
        for parameter in params.values():
            parameter.grad = None
        nn.functional.cross_entropy(logits(features_BE), labels_B).backward()

    return Step(run, params)


def rows(folder: Path, classes: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table."""
    kept = {way: step_gb(way, folder, classes, batch_size, device) for way in WAYS}
    found = [Row(f"{_what(way, classes, batch_size)}: memory of a step", [kept[way]], unit="GB") for way in WAYS]
    for way in WAYS[1:]:
        share = [kept[way] / kept["authors"]]
        found.append(Row(f"{_what(way, classes, batch_size)}: memory / the authors' way", share, MEMORY_TARGET))
    return [*found, *times(folder, classes, batch_size, rounds, device)]


def times(folder: Path, classes: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The time of a step against the authors' way, and the difference of the gradients."""
    backbone = our_backbone(folder, device)
    step = {way: cocoop_step(way, backbone, folder, classes, batch_size) for way in WAYS}
    gradients = {way: one.gradients() for way, one in step.items()}
    # the gradients have warmed all up
    seconds = interleaved({way: one.run for way, one in step.items()}, rounds, device, cold_rounds=0)
    return [
        Row(
            f"{_what(way, classes, batch_size)}: time of a step / the authors' way",
            ratios(seconds[way], seconds["authors"]),
            TIME_TARGET,
            difference(gradients[way], gradients["authors"]),
        )
        for way in WAYS[1:]
    ]


def _what(way: str, classes: int, batch_size: int) -> str:
    of_way = {"authors": ", the authors' way", "ours": "", "ours, small budget": f", budget {SMALL_BUDGET_GB:g} GB"}
    return f"CoCoOp {classes} classes, batch {batch_size}{of_way[way]}"


def step_gb(way: str, folder: Path, classes: int, batch_size: int, device: torch.device) -> float:
    """By how much (10^9 bytes) the first step of a new process raises its peak memory."""
    job = {
        "way": way,
        "folder": str(folder),
        "classes": classes,
        "batch_size": batch_size,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", f"{__package__}.cocoop", json.dumps(job)]
    # The folder above this package is where `-m` finds it.
    result = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def _one_step(way: str, folder: str, classes: int, batch_size: int, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*RANDOM weights.*")
        # Drawn anew: a file of weights that is mapped while it loads would count as memory.
        backbone = load_backbone(BackboneConfig(family="transformers", name=folder, pretrained="none"))
    step = cocoop_step(way, backbone.to(device), Path(folder), classes, batch_size)
    if backbone.device.type == "cuda":
        before = torch.cuda.memory_allocated(backbone.device)
        step.run()
        return (torch.cuda.max_memory_allocated(backbone.device) - before) / GB
    before = process_bytes("VmRSS")
    step.run()
    return (process_bytes("VmHWM") - before) / GB


if __name__ == "__main__":
    print(_one_step(**json.loads(sys.argv[1])))
