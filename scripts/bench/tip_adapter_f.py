"""Tip-Adapter-F on stored features, against an epoch that encodes its images, as the authors' loop does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from disam_peft.adapters.tip_adapter import TipAdapter
from disam_peft.config.feature_adapters import TipAdapterConfig
from disam_peft.objectives.cross_entropy import cross_entropy

from .measure import Row, interleaved, ratios
from .models import peer_model
from .steps import DOMAINS, difference

CLASSES = 65
IMAGES = 10_000
BATCH = 256
"""That of the authors."""
SHOTS = (16, "all")
ALPHA, BETA, SCALE = 1.0, 5.5, 100.0


class Epochs:
    """Both ways of an epoch for a cache of so many shots, of images nobody looks at."""

    def __init__(self, shots: int | str, width: int, images: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features_ME = torch.randn(images, width, generator=generator).to(device)
        self.labels_M = torch.randint(CLASSES, (images,), generator=generator).to(device)
        self.batches = torch.randperm(images, generator=generator).to(device).split(BATCH)
        text_CE = torch.randn(CLASSES, width, generator=generator).to(device)
        self.text_CE, self.scale = nn.functional.normalize(text_CE, dim=-1), torch.tensor(SCALE, device=device)
        config = TipAdapterConfig.model_validate({"trained": "keys", "shots": shots, "alpha": ALPHA, "beta": BETA})
        self.adapter = TipAdapter(config, CLASSES, torch.zeros(width, device=device))
        with torch.no_grad():
            self.adapter.fit_start(self.features_ME, self.labels_M, torch.arange(images, device=device) % DOMAINS)
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), lr=1e-3, fused=True)
        self.linear = nn.Linear(width, len(self.adapter.keys), bias=False, device=device)
        with torch.no_grad():
            self.linear.weight.copy_(self.adapter.keys)
        self.values_NC = nn.functional.one_hot(self.adapter.labels, CLASSES).float()
        self.peer_optimizer = torch.optim.AdamW(self.linear.parameters(), lr=1e-3, eps=1e-4)

    def our_loss(self, rows_B: Tensor) -> Tensor:
        logits_BC = self.adapter.logits(self.features_ME[rows_B], self.text_CE, self.scale, None)
        return cross_entropy(logits_BC, self.labels_M[rows_B]).mean()

    def ours(self) -> None:
        """All steps of an epoch."""
        for rows_B in self.batches:
            self.optimizer.zero_grad()
            self.our_loss(rows_B).backward()
            self.optimizer.step()

    def peer_loss(self, features_BE: Tensor, labels_B: Tensor) -> Tensor:
        features_BE = features_BE / features_BE.norm(dim=-1, keepdim=True)
        affinity_BN = self.linear(features_BE)
        cached_BC = ((-1) * (BETA - BETA * affinity_BN)).exp() @ self.values_NC
        return nn.functional.cross_entropy(SCALE * features_BE @ self.text_CE.T + ALPHA * cached_BC, labels_B)

    def gradient_difference(self) -> float:
        """On the first batch, from the same keys."""
        rows_B = self.batches[0]
        self.our_loss(rows_B).backward()
        self.peer_loss(self.features_ME[rows_B], self.labels_M[rows_B]).backward()
        ours, theirs = self.adapter.keys.grad, self.linear.weight.grad
        assert ours is not None and theirs is not None
        return difference({"keys": ours}, {"keys": theirs})


def encoding_step(folder: Path, device: torch.device, epochs: Epochs) -> Callable[[], None]:
    """One step of the authors' loop: encode the batch without a graph, then train the keys."""
    clip = peer_model(folder).to(device)
    size = clip.config.vision_config.image_size
    pixels_BCHW = torch.randn(BATCH, 3, size, size, device=device)
    labels_B = torch.randint(CLASSES, (BATCH,), device=device)

    def run() -> None:
        with torch.no_grad():
            features_BE = clip.get_image_features(pixel_values=pixels_BCHW).pooler_output
        epochs.peer_optimizer.zero_grad()
        epochs.peer_loss(features_BE, labels_B).backward()
        epochs.peer_optimizer.step()

    return run


def rows(folder: Path, rounds: int, device: torch.device, images: int = IMAGES) -> list[Row]:
    """The section's part of the table."""
    width = peer_model(folder).config.projection_dim
    found = []
    for shots in SHOTS:
        epochs = Epochs(shots, width, images, device)
        exact = epochs.gradient_difference()
        seconds = interleaved({"ours": epochs.ours, "encoding": encoding_step(folder, device, epochs)}, rounds, device)
        steps = len(epochs.batches)
        encoded: Sequence[float] = [value * steps for value in seconds["encoding"]]
        what = f"Tip-Adapter-F, {CLASSES} classes, {images} stored images, {len(epochs.adapter.keys)} in the cache"
        value = ratios(seconds["ours"], encoded)
        found.append(Row(f"{what}: epoch / epoch that encodes (one step x {steps})", value, 0.01, exact))
    return found
