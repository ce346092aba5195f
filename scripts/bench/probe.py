"""A linear probe on stored features: against encoding the images again, against a DataLoader with a SAM wrapper, and
sixteen settings at once against sixteen runs. One "step" below is one batch; an epoch is as many of them everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from disam_peft import DISAM
from disam_peft.adapters.linear_probe import LinearProbeAdapter
from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.feature_adapters import LinearProbeConfig
from disam_peft.config.training import TrainConfig
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.training.stacked_probes import ProbeSetting, ProbeStack, fit_probes, probe_features

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone, peer_model
from .pair import Pair
from .steps import DOMAINS, RHO, VARIANCE_WEIGHT, Step, difference, peer_sam, sam_optimizer

CLASSES = 65
IMAGES = 10_000
BATCH = 32
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RHOS = (0.05, 0.1)
WEIGHTS = (0.1, 0.5)


class Features:
    """Stored features of images nobody looks at."""

    def __init__(self, images: int, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features_NE = torch.randn(images, width, generator=generator)
        self.labels_N = torch.randint(CLASSES, (images,), generator=generator)
        self.domains_N = torch.arange(images) % DOMAINS
        self.batches = torch.randperm(images, generator=generator).split(BATCH)


def new_head(width: int) -> LinearProbeAdapter:
    """Starts from zero."""
    return LinearProbeAdapter(LinearProbeConfig(), torch.zeros(CLASSES, width), torch.zeros(CLASSES))


def our_epoch(stored: Features, settings: Sequence[ProbeSetting]) -> Callable[[], object]:
    """All of it: normalising the features, and every probe's steps."""

    def run() -> None:
        head = new_head(stored.features_NE.shape[1])
        features_NF = probe_features(stored.features_NE, head)
        config = TrainConfig(steps=len(stored.batches), batch_size=BATCH)
        stack = ProbeStack(head, settings)
        fit_probes(stack, features_NF, stored.labels_N, stored.domains_N, stored.batches, config)

    return run


def loop_epoch(stored: Features) -> Callable[[], object]:
    """What each of many runs would do: the general step, by autograd."""
    head = new_head(stored.features_NE.shape[1])
    params = list(head.parameters())
    disam = DISAM(params, RHO, VARIANCE_WEIGHT, num_domains=DOMAINS)
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    none = torch.zeros(())

    def run() -> None:
        for rows_B in stored.batches:
            features_BE, labels_B = stored.features_NE[rows_B], stored.labels_N[rows_B]

            def losses(features_BE: Tensor = features_BE, labels_B: Tensor = labels_B) -> Tensor:
                return cross_entropy(head.logits(features_BE, none, none, None), labels_B)

            disam.backward(losses, stored.domains_N[rows_B])
            optimizer.step()

    return run


def wrapper_epoch(stored: Features) -> Callable[[], object]:
    """DataLoader and SAM wrapper on the same features."""
    linear = nn.Linear(stored.features_NE.shape[1], CLASSES)
    loader = DataLoader(TensorDataset(stored.features_NE, stored.labels_N), batch_size=BATCH, shuffle=True)
    optimizer = sam_optimizer(linear.parameters(), lr=1e-3)

    def run() -> None:
        for features_BE, labels_B in loader:

            def closure(features_BE: Tensor = features_BE, labels_B: Tensor = labels_B) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(linear(nn.functional.normalize(features_BE, dim=-1)), labels_B)
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)

    return run


class EncoderWithHead(nn.Module):
    """A frozen image tower under a linear layer, as one first writes a linear probe. Images to logits (B, C)."""

    def __init__(self, encoder: Any, linear: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.linear = encoder, linear

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        with torch.no_grad():  # nobody would backpropagate through what is frozen
            image_BE = self.encoder.get_image_features(pixel_values=pixels_BCHW).pooler_output
        return self.linear(nn.functional.normalize(image_BE, dim=-1))


def probe_pair(folder: Path, classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Pair:
    """A linear probe that encodes its images, in both passes; ours once, or never."""
    backbone, prompts = our_backbone(folder, device, dtype), class_prompts(classes)
    adapter = build_adapter(LinearProbeConfig(), backbone, prompts)
    classifier = ClipClassifier(backbone, adapter, prompts).to(device).train()
    linear = nn.Linear(backbone.embed_dim, classes)
    linear.load_state_dict(adapter.state())
    peer = EncoderWithHead(peer_model(folder), linear).to(device, dtype)
    return Pair(classifier, peer, dict(linear.named_parameters()), peer)


def encoding_step(folder: Path, device: torch.device) -> Step:
    """One batch of an epoch that encodes its images, in both passes, as SAM around the whole model does."""
    clip = peer_model(folder)
    size = clip.config.vision_config.image_size
    pixels_BCHW = torch.randn(BATCH, 3, size, size, device=device)
    labels_B = torch.randint(CLASSES, (BATCH,), device=device)
    model = EncoderWithHead(clip, nn.Linear(clip.config.projection_dim, CLASSES)).to(device)
    return peer_sam(dict(model.linear.named_parameters()), lambda: model(pixels_BCHW), labels_B)


def gradient_difference(stored: Features) -> float:
    """Of the closed form from the wrapper's gradient, as SAM (lambda 0), on one batch."""
    rows_B = stored.batches[0]
    head = new_head(stored.features_NE.shape[1])
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
    features_BE, labels_B = stored.features_NE[rows_B], stored.labels_N[rows_B]
    none = torch.zeros(())
    theirs = peer_sam(
        dict(head.named_parameters()), lambda: head.logits(features_BE, none, none, None), labels_B
    ).gradients()
    stack = ProbeStack(head, [ProbeSetting(1e-3, RHO, 0.0)])
    one_hot_BD = nn.functional.one_hot(stored.domains_N[rows_B]).float()
    stack.gradient(probe_features(features_BE, head), labels_B, one_hot_BD)
    ours = {"weight": stack.gradients_SCF[0, :, :-1], "bias": stack.gradients_SCF[0, :, -1]}
    return difference(ours, theirs)


def rows(folder: Path, rounds: int, device: torch.device, images: int = IMAGES) -> list[Row]:
    """The section's part of the table."""
    encoding = encoding_step(folder, device)
    stored = Features(images, encoding.params["weight"].shape[1])
    one = [ProbeSetting(1e-3, RHO, VARIANCE_WEIGHT)]
    grid = [ProbeSetting(rate, rho, weight) for rate in RATES for rho in RHOS for weight in WEIGHTS]
    variants = {
        "one": our_epoch(stored, one),
        "wrapper": wrapper_epoch(stored),
        "loop": loop_epoch(stored),
        "grid": our_epoch(stored, grid),
        "encoding": encoding.run,
    }
    seconds = interleaved(variants, rounds, device)
    exact = gradient_difference(stored)
    steps = len(stored.batches)
    encoded = [value * steps for value in seconds["encoding"]]
    sixteen = [value * len(grid) for value in seconds["loop"]]
    what, at_once = f"linear probe, {CLASSES} classes, {images} stored images", f"{len(grid)} settings at once"
    return [
        Row(f"{what}: epoch / epoch that encodes (one step x {steps})", ratios(seconds["one"], encoded), 0.001, exact),
        Row(f"{what}: epoch / DataLoader + SAM", ratios(seconds["one"], seconds["wrapper"]), 0.5, exact),
        Row(
            f"{what}: {at_once} / {len(grid)} times the training loop's steps",
            ratios(seconds["grid"], sixteen),
            0.2,
            exact,
        ),
    ]
