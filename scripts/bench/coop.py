"""CoOp, against its trainer's way: both towers in every pass, every prompt at its full length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.prompt_adapters import CoOpConfig

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone, peer_model
from .pair import Pair
from .steps import Step, difference

CONTEXT = 16


class PromptLearner(nn.Module):
    """Stands in for the token embedding and returns [start] context [name . end padding] of every class.

    Args:
        embeddings_CLW: of prompts with placeholders where the context goes.
        context_MW: initial values.
    """

    prefix: Tensor
    suffix: Tensor

    def __init__(self, embeddings_CLW: Tensor, context_MW: Tensor) -> None:
        super().__init__()
        self.context = nn.Parameter(context_MW.clone())
        self.register_buffer("prefix", embeddings_CLW[:, :1])
        self.register_buffer("suffix", embeddings_CLW[:, 1 + len(context_MW) :])

    def forward(self, _: Tensor) -> Tensor:
        return torch.cat([self.prefix, self.context.expand(len(self.prefix), -1, -1), self.suffix], dim=1)


def coop_classifier(backbone: ClipBackbone, classes: int, **options: Any) -> ClipClassifier:
    """Context shared by the classes, drawn as CoOp draws it."""
    prompts = class_prompts(classes)
    adapter = build_adapter(CoOpConfig(context_tokens=CONTEXT, seed=0, **options), backbone, prompts)
    return ClipClassifier(backbone, adapter, prompts).to(backbone.device).train()


def coop_pair(folder: Path, classes: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Pair:
    """CoOp; the peer is written as CoOp's trainer is."""
    backbone = our_backbone(folder, device, dtype)
    classifier = coop_classifier(backbone, classes)
    peer = peer_model(folder).to(device, dtype)
    filler = " ".join(["X"] * CONTEXT)
    tokens_CL = backbone.tokenize([f"{filler} {name}." for name in classifier.class_names])
    embedding = peer.text_model.embeddings.token_embedding
    learner = PromptLearner(embedding(tokens_CL), classifier.trainable()["context"].detach())
    peer.text_model.embeddings.token_embedding = learner

    def logits(pixels_BCHW: Tensor) -> Tensor:
        image_BE = peer.get_image_features(pixel_values=pixels_BCHW).pooler_output
        text_CE = peer.get_text_features(input_ids=tokens_CL).pooler_output
        cosine_BC = nn.functional.normalize(image_BE, dim=-1) @ nn.functional.normalize(text_CE, dim=-1).T
        return peer.logit_scale.exp() * cosine_BC

    return Pair(classifier, peer, {"context": learner.context}, logits)


def coop_steps(
    folder: Path, classes: int, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Step]:
    """Every variant of ``coop_pair`` at the same weights."""
    return coop_pair(folder, classes, device, dtype).steps(batch_size)


def few_classes(folder: Path, classes: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """Against two passes and against one."""
    step = coop_steps(folder, classes, batch_size, device)
    sam = step["sam"].gradients()
    exact, exact_stored = (difference(step[name].gradients(), sam) for name in ("our sam", "our sam, stored"))
    erm = step["erm"].gradients()
    exact_erm = difference(step["our erm, stored"].gradients(), erm)
    wide = coop_steps(folder, classes, batch_size, device, torch.float64)
    error = difference(sam, wide["our sam, stored"].gradients())
    error_erm = difference(erm, wide["our erm, stored"].gradients())
    del wide
    timed = ("sam", "our disam", "our disam, stored", "erm", "our erm, stored")
    seconds = interleaved({name: step[name].run for name in timed}, rounds, device)
    stored, plain = seconds["our disam, stored"], seconds["our erm, stored"]
    what = f"CoOp {classes} classes"
    return [
        Row(f"{what}, no store: DISAM / naive SAM", ratios(seconds["our disam"], seconds["sam"]), 0.09, exact, error),
        Row(f"{what}, store: DISAM / naive SAM", ratios(stored, seconds["sam"]), 0.05, exact_stored, error),
        Row(f"{what}, store: DISAM / plain CoOp ERM", ratios(stored, seconds["erm"]), 0.10, exact_stored, error),
        Row(f"{what}, store: our ERM / plain CoOp ERM", ratios(plain, seconds["erm"]), None, exact_erm, error_erm),
        Row(f"{what}, store: DISAM / our ERM", ratios(stored, plain)),
    ]


def many_classes(folder: Path, classes: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """Against two passes alone, which are slow here."""
    step = coop_steps(folder, classes, batch_size, device)
    sam = step["sam"].gradients()
    exact = difference(step["our sam, stored"].gradients(), sam)
    wide = coop_steps(folder, classes, batch_size, device, torch.float64)
    error = difference(sam, wide["our sam, stored"].gradients())
    del wide
    timed = {name: step[name].run for name in ("sam", "our disam, stored")}
    seconds = interleaved(timed, rounds, device, cold_rounds=0)  # the gradients have warmed both up
    against = ratios(seconds["our disam, stored"], seconds["sam"])
    return [Row(f"CoOp {classes} classes, store: DISAM / naive SAM", against, 0.04, exact, error)]
