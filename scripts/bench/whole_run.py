"""A whole run, from files to the accuracy on the held-out domain, against the loop that one writes first.

The naive loop decodes and encodes every image in every epoch and runs everything in both passes; ours is
``run.train`` with a feature store that it builds itself, and it validates ten times, which the naive loop does not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from disam_peft import run
from disam_peft.adapters import AdapterConfig, CoOpConfig, LastBlocks, LoraAdapterConfig
from disam_peft.backbones import BackboneConfig
from disam_peft.data import AugmentConfig, DataConfig, DomainDataset, leave_out, load, split_train_validation
from disam_peft.evaluation import ProtocolConfig
from disam_peft.frozen import FeatureConfig
from disam_peft.recipe import Recipe
from disam_peft.training import MethodConfig, TrainConfig

from .coop import CONTEXT, PromptLearner
from .lora import ALPHA, RANK, peer_logits, peer_lora
from .measure import Row
from .models import our_backbone, peer_model
from .steps import RHO, VARIANCE_WEIGHT, sam_optimizer

EPOCHS = 3
BATCH = 32
LAST = 4
TARGET = 0.45
CPU = torch.device("cpu")
Logits = Callable[[Tensor], Tensor]


def adapters() -> dict[str, AdapterConfig]:
    """What is compared, by its name in the table."""
    return {
        "CoOp": CoOpConfig(context_tokens=CONTEXT),
        f"LoRA last {LAST}": LoraAdapterConfig(blocks=LastBlocks(last=LAST), rank=RANK, alpha=ALPHA),
    }


class _Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    def __init__(self, dataset: DomainDataset, transform: Callable[[Any], Tensor]) -> None:
        self._dataset, self._transform = dataset, transform

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._dataset.image(index)), int(self._dataset.labels[index])


def naive_seconds(folder: Path, adapter: AdapterConfig, sources: DomainDataset, target: DomainDataset) -> float:
    """Of loading the model, three epochs of two full passes each, and the accuracy on the target."""
    start = time.perf_counter()
    backbone = our_backbone(folder, CPU)  # of which only the transform and the tokenizer are used
    params, logits = _naive_model(folder, adapter, sources, backbone)
    optimizer = sam_optimizer(params, lr=1e-3)
    images = _Images(sources, backbone.image_transform)
    for _ in range(EPOCHS):
        for pixels_BCHW, labels_B in DataLoader(images, BATCH, shuffle=True, num_workers=2):

            def closure(pixels_BCHW: Tensor = pixels_BCHW, labels_B: Tensor = labels_B) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(logits(pixels_BCHW), labels_B)
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)
    with torch.no_grad():
        for pixels_BCHW, _ in DataLoader(_Images(target, backbone.image_transform), BATCH, num_workers=2):
            logits(pixels_BCHW)
    return time.perf_counter() - start


def _naive_model(
    folder: Path, adapter: AdapterConfig, sources: DomainDataset, backbone: Any
) -> tuple[list[Tensor], Logits]:
    if isinstance(adapter, LoraAdapterConfig):
        peer = peer_lora(folder, LAST, CPU, torch.float32)
        tokens_CL = backbone.tokenize([f"a photo of a {name}." for name in sources.prompt_names])
        return [p for p in peer.parameters() if p.requires_grad], peer_logits(peer, tokens_CL)
    peer = peer_model(folder)
    filler = " ".join(["X"] * CONTEXT)
    tokens_CL = backbone.tokenize([f"{filler} {name}." for name in sources.prompt_names])
    embedding = peer.text_model.embeddings.token_embedding
    learner = PromptLearner(embedding(tokens_CL).detach(), 0.02 * torch.randn(CONTEXT, embedding.weight.shape[1]))
    peer.text_model.embeddings.token_embedding = learner

    def logits(pixels_BCHW: Tensor) -> Tensor:
        image_BE = nn.functional.normalize(peer.get_image_features(pixel_values=pixels_BCHW).pooler_output, dim=-1)
        text_CE = nn.functional.normalize(peer.get_text_features(input_ids=tokens_CL).pooler_output, dim=-1)
        return peer.logit_scale.exp() * image_BE @ text_CE.T

    return [learner.context], logits


def our_seconds(folder: Path, adapter: AdapterConfig, data: DataConfig, held_out: str, steps: int) -> float:
    """Of ``run.train``: zero-shot, feature stores, training, ten validations, held-out evaluation, saving."""
    with tempfile.TemporaryDirectory() as name:
        recipe = Recipe(
            name="whole-run",
            output=Path(name) / "runs",
            backbone=BackboneConfig(family="transformers", name=str(folder)),
            adapter=adapter,
            method=MethodConfig(rho=RHO, variance_weight=VARIANCE_WEIGHT),
            data=data,
            augment=AugmentConfig(kind="none"),
            features=FeatureConfig(store=True, folder=Path(name) / "features"),
            protocol=ProtocolConfig(held_out=held_out),
            train=TrainConfig(steps=steps, batch_size=BATCH),
        )
        start = time.perf_counter()
        run.train(recipe)
        return time.perf_counter() - start


def rows(folder: Path, data_root: Path, held_out: str) -> list[Row]:
    """The section's part of the table; each run once."""
    data = DataConfig(root=data_root)
    sources, target = leave_out(load(data), held_out)
    training, _ = split_train_validation(sources, 0.2, 0)
    steps = EPOCHS * -(-len(training) // BATCH)
    found = []
    for name, adapter in adapters().items():
        ours = our_seconds(folder, adapter, data, held_out, steps)
        naive = naive_seconds(folder, adapter, training, target)
        what = f"{name}, whole run, {len(training)} images, {EPOCHS} epochs"
        found += [
            Row(f"{what}: ours / naive loop", [ours / naive], TARGET),
            Row(f"{what}: ours", [ours], unit="s"),
            Row(f"{what}: naive loop", [naive], unit="s"),
        ]
    return found
