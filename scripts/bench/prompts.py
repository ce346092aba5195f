"""Prompts in the towers, against passes of both whole towers: visual prompts, and MaPLe in its trainer's way."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.backbones.base import ClipBackbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.adapters import AdapterConfig
from disam_peft.config.prompt_adapters import MapleConfig, VisualPromptsConfig

from .coop import PromptLearner
from .flops import count_flops
from .lora import peer_logits
from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone, peer_model
from .pair import Pair
from .steps import Step, difference

CLASSES, LAST, TOKENS = 7, 4, 8
MAPLE_CLASSES, MAPLE_BATCH, MAPLE_TOKENS, DEPTH = 65, 4, 2, 9


class WithTokens(nn.Module):
    """A block that is handed tokens of its own.

    Args:
        first: position of the first, whose places they take; negative from the end, None: behind all others.
    """

    def __init__(self, block: nn.Module, tokens: Callable[[], Tensor], first: int | None) -> None:
        super().__init__()
        self.block, self.tokens, self.first = block, tokens, first

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        own, length = self.tokens().expand(len(hidden), -1, -1), hidden.shape[1]
        first = length if self.first is None else self.first % length
        tokens = torch.cat([hidden[:, :first], own, hidden[:, first + own.shape[1] :]], dim=1)
        return self.block(tokens, *args, **kwargs)


def visual_pair(folder: Path, last: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Pair:
    """Prompts of the last blocks of the image tower."""
    backbone, prompts = our_backbone(folder, device, dtype), class_prompts(CLASSES)
    classifier = _built(backbone, VisualPromptsConfig(tokens=TOKENS, blocks=LastBlocks(last=last), seed=0), CLASSES)
    tokens_CL = backbone.tokenize([prompts.templates[0].replace("{}", name) for name in prompts.class_names])
    peer = peer_model(folder).to(device, dtype)
    params = {name: nn.Parameter(p.detach().clone()) for name, p in classifier.trainable().items()}
    layers = peer.vision_model.encoder.layers
    for number, (name, parameter) in enumerate(params.items()):  # in the order of the blocks
        block = int(name.rpartition(".")[2])
        first = -TOKENS if number else None
        layers[block] = WithTokens(layers[block], partial(_itself, parameter), first)
    return Pair(classifier, peer, params, peer_logits(peer, tokens_CL))


def maple_pair(
    folder: Path, classes: int, depth: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Pair:
    """MaPLe; the peer runs every prompt at its full length, as the authors' trainer does."""
    backbone = our_backbone(folder, device, dtype)
    config = MapleConfig(context_tokens=MAPLE_TOKENS, init="a photo of a", depth=depth, seed=0)
    classifier = _built(backbone, config, classes)
    peer = peer_model(folder).to(device, dtype)
    params = {name: nn.Parameter(p.detach().clone()) for name, p in classifier.trainable().items()}
    tokens_CL = backbone.tokenize([f"a photo of a {name}." for name in classifier.class_names])
    text, vision = peer.text_model, peer.vision_model
    learner = PromptLearner(text.embeddings.token_embedding(tokens_CL), params["text.coop.context"].detach())
    learner.context = params["text.coop.context"]
    text.embeddings.token_embedding = learner

    def of_text(block: int) -> Tensor:
        return params["text.coop.context" if block == 0 else f"text.deep.{block}"]

    def of_image(block: int) -> Tensor:
        weight, bias = (params[f"projections.{block}.{part}"] for part in ("weight", "bias"))
        tokens = nn.functional.linear(of_text(block), weight, bias)
        return tokens if block else vision.pre_layrnorm(tokens)

    for block in range(depth):
        first = -MAPLE_TOKENS if block else None
        image, words = vision.encoder.layers, text.encoder.layers
        image[block] = WithTokens(image[block], partial(of_image, block), first)
        if block:  # the context is in the embeddings, and the start marker in front of it
            words[block] = WithTokens(words[block], partial(of_text, block), 1)

    def logits(pixels_BCHW: Tensor) -> Tensor:
        image_BE = peer.get_image_features(pixel_values=pixels_BCHW).pooler_output
        text_CE = peer.get_text_features(input_ids=tokens_CL).pooler_output
        cosine_BC = nn.functional.normalize(image_BE, dim=-1) @ nn.functional.normalize(text_CE, dim=-1).T
        return peer.logit_scale.exp() * cosine_BC

    return Pair(classifier, peer, params, logits)


def rows(folder: Path, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table. On a CPU with one thread it is CPU time, which other programs disturb less."""
    return [*_visual(folder, batch_size, rounds, device), *_maple(folder, rounds, device)]


def _visual(folder: Path, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    step = visual_pair(folder, LAST, device).steps(batch_size)
    exact, error = _differences(step, visual_pair(folder, LAST, device, torch.float64).steps(batch_size), ", stored")
    seconds = _timed(step, ("our disam, stored", "our erm, stored", "erm"), rounds, device)
    what = f"visual prompts ({TOKENS}) of the last {LAST}, store"
    return [
        Row(f"{what}: DISAM / plain ERM", ratios(seconds["our disam, stored"], seconds["erm"]), 0.85, exact, error),
        Row(f"{what}: our ERM / plain ERM", ratios(seconds["our erm, stored"], seconds["erm"])),
    ]


def _maple(folder: Path, rounds: int, device: torch.device) -> list[Row]:
    step = maple_pair(folder, MAPLE_CLASSES, DEPTH, device).steps(MAPLE_BATCH)
    exact, error = _differences(
        step, maple_pair(folder, MAPLE_CLASSES, DEPTH, device, torch.float64).steps(MAPLE_BATCH), ""
    )
    flops = {name: count_flops(step[name].run).total for name in ("our disam", "our erm", "erm")}
    seconds = _timed(step, ("our disam", "our erm", "erm"), rounds, device)
    what = f"MaPLe {MAPLE_CLASSES} classes, batch {MAPLE_BATCH}, depth {DEPTH}"
    found = []
    for name, label in (("our disam", "DISAM"), ("our erm", "our ERM")):
        bound = flops[name] / flops["erm"]
        against = ratios(seconds[name], seconds["erm"])
        found += [
            Row(f"{what}: {label} / plain ERM (of operations {bound:.3g})", against, 1.05 * bound, exact, error),
        ]
    return found


def _itself(tokens: Tensor) -> Tensor:
    return tokens


def _built(backbone: ClipBackbone, config: AdapterConfig, classes: int) -> ClipClassifier:
    prompts = class_prompts(classes)
    adapter = build_adapter(config, backbone, prompts)
    return ClipClassifier(backbone, adapter, prompts).to(backbone.device).train()


def _differences(step: dict[str, Step], wide: dict[str, Step], ending: str) -> tuple[float, float]:
    """Of our gradient from the peer's, and of the peer's from the same in float64."""
    sam = step["sam"].gradients()
    exact = difference(step[f"our sam{ending}"].gradients(), sam)
    return exact, difference(sam, wide[f"our sam{ending}"].gradients())


def _timed(step: dict[str, Step], names: tuple[str, ...], rounds: int, device: torch.device) -> dict[str, list[float]]:
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    return interleaved({name: step[name].run for name in names}, rounds, device, clock=clock)
