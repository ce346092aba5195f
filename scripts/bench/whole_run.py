"""A whole run, from files to the accuracy on the held-out domain, against the loop that one writes first.

The naive loop decodes and encodes every image in every epoch and runs everything in both passes; ours is
``run.train`` with a feature store. Ours finds nothing done before: it checks every file, builds its stores, and besides
judges zero-shot and validates after each epoch, none of which the naive loop does.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.backbone import BackboneConfig
from disam_peft.config.data import AugmentConfig, DataConfig, FeatureConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.peft_adapters import LoraAdapterConfig
from disam_peft.config.prompt_adapters import CoOpConfig
from disam_peft.config.protocol import ProtocolConfig
from disam_peft.config.recipe import Recipe
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.data.splits import leave_out, split_train_validation
from disam_peft.experiments import run

from .coop import CONTEXT, PromptLearner
from .lora import ALPHA, RANK, peer_logits, peer_lora
from .measure import Row
from .models import our_backbone, peer_model
from .steps import RHO, VARIANCE_WEIGHT, sam_optimizer

EPOCHS = 3
BATCH = 32
LAST = 4
TARGET = 0.45
CACHE = "DISAM_PEFT_CACHE"
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


def our_seconds(folder: Path, adapter: AdapterConfig, data: DataConfig, held_out: str, epoch: int) -> float:
    """Of ``run.train`` with an empty cache: data check, zero-shot, feature stores, training with a validation after
    each epoch of so many steps, held-out evaluation, saving."""
    with tempfile.TemporaryDirectory() as name, _cache(Path(name) / "cache"):
        recipe = Recipe(
            name="whole-run",
            output=Path(name) / "runs",
            backbone=BackboneConfig(family="transformers", name=str(folder)),
            adapter=adapter,
            method=MethodConfig(rho=RHO, variance_weight=VARIANCE_WEIGHT),
            data=data,
            augment=AugmentConfig(kind="none"),
            features=FeatureConfig(store=True),
            protocol=ProtocolConfig(held_out=held_out),
            train=TrainConfig(steps=EPOCHS * epoch, batch_size=BATCH, validate_every=epoch),
        )
        start = time.perf_counter()
        run.train(recipe)
        return time.perf_counter() - start


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """The package's cache, for findings of the data check and stores, is ``folder``."""
    before = os.environ.get(CACHE)
    os.environ[CACHE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE]
        else:
            os.environ[CACHE] = before


def rows(folder: Path, data_root: Path, held_out: str) -> list[Row]:
    """The section's part of the table; each run once. Says on standard error when one has ended: they take minutes."""
    data = DataConfig(root=data_root)
    sources, target = leave_out(load(data), held_out)
    training, _ = split_train_validation(sources, 0.2, 0)
    epoch = -(-len(training) // BATCH)
    suffix = f"whole run, {len(training)} images, {EPOCHS} epochs"
    found, ours, naive = [], [], []
    for name, adapter in adapters().items():
        ours.append(_said(f"{name}, ours", our_seconds(folder, adapter, data, held_out, epoch)))
        naive.append(_said(f"{name}, naive loop", naive_seconds(folder, adapter, training, target)))
        found += [
            Row(f"{name}, {suffix}: ours / naive loop", [ours[-1] / naive[-1]], TARGET),
            Row(f"{name}, {suffix}: ours", [ours[-1]], unit="s"),
            Row(f"{name}, {suffix}: naive loop", [naive[-1]], unit="s"),
        ]
    both = " and ".join(adapters())
    return [*found, Row(f"{both}, {suffix}: ours / naive loop", [sum(ours) / sum(naive)], TARGET)]


def _said(what: str, seconds: float) -> float:
    print(f"  {what}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return seconds
