"""LoRA on the image tower, against transformers with peft and a SAM optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from disam_peft.adapters.registry import build_adapter
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.adapter_parts import LastBlocks
from disam_peft.config.peft_adapters import LoraAdapterConfig

from .measure import Row, interleaved, ratios
from .models import class_prompts, our_backbone, peer_model
from .pair import Pair
from .steps import Step, difference

CLASSES = 7
RANK, ALPHA = 4, 8


def lora_pair(folder: Path, last: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Pair:
    """LoRA on q and v of the last blocks of the CLIP in ``folder``."""
    backbone, prompts = our_backbone(folder, device, dtype), class_prompts(CLASSES)
    config = LoraAdapterConfig(blocks=LastBlocks(last=last), rank=RANK, alpha=ALPHA)
    classifier = ClipClassifier(backbone, build_adapter(config, backbone, prompts), prompts).to(device)
    tokens_CL = backbone.tokenize([prompts.templates[0].replace("{}", name) for name in prompts.class_names])

    peer = peer_lora(folder, last, device, dtype)
    assert classifier.adapter is not None
    classifier.adapter.load_state(get_peft_model_state_dict(peer, save_embedding_layers=False))
    classifier.train()
    return Pair(classifier, peer, _by_checkpoint_name(peer), peer_logits(peer, tokens_CL))


def lora_steps(
    folder: Path, last: int, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Step]:
    """Every variant of ``lora_pair`` at the same weights."""
    return lora_pair(folder, last, device, dtype).steps(batch_size)


def rows(folder: Path, blocks: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    """The section's part of the table for a tower of so many blocks."""
    return [*_last_third(folder, blocks, batch_size, rounds, device), *_all(folder, blocks, batch_size, rounds, device)]


def _last_third(folder: Path, blocks: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    last = blocks // 3
    step = lora_steps(folder, last, batch_size, device)
    sam, erm = step["sam"].gradients(), step["erm"].gradients()
    exact = {name: difference(step[f"our sam{name}"].gradients(), sam) for name in ("", ", stored")}
    exact_erm = {name: difference(step[f"our erm{name}"].gradients(), erm) for name in ("", ", stored")}
    wide = lora_steps(folder, last, batch_size, device, torch.float64)
    error = difference(sam, wide["our sam, stored"].gradients())
    error_erm = difference(erm, wide["our erm, stored"].gradients())
    del wide
    timed = ("sam", "our disam", "our disam, stored", "erm", "our erm", "our erm, stored")
    seconds = interleaved({name: step[name].run for name in timed}, rounds, device)
    what = f"LoRA last {last}"
    found = []
    for name, label, to_sam, to_erm in (("", "no store", 0.66, 1.25), (", stored", "store", 0.42, 0.85)):
        disam, plain = seconds[f"our disam{name}"], seconds[f"our erm{name}"]
        found += [
            Row(f"{what}, {label}: DISAM / naive SAM", ratios(disam, seconds["sam"]), to_sam, exact[name], error),
            Row(f"{what}, {label}: DISAM / PEFT ERM", ratios(disam, seconds["erm"]), to_erm, exact[name], error),
            Row(
                f"{what}, {label}: our ERM / PEFT ERM",
                ratios(plain, seconds["erm"]),
                None,
                exact_erm[name],
                error_erm,
            ),
            Row(f"{what}, {label}: DISAM / our ERM", ratios(disam, plain)),
        ]
    return found


def _all(folder: Path, blocks: int, batch_size: int, rounds: int, device: torch.device) -> list[Row]:
    step = lora_steps(folder, blocks, batch_size, device)
    sam = step["sam"].gradients()
    exact = difference(step["our sam"].gradients(), sam)
    wide = lora_steps(folder, blocks, batch_size, device, torch.float64)
    error = difference(sam, wide["our sam"].gradients())
    del wide
    seconds = interleaved({name: step[name].run for name in ("sam", "our disam", "erm")}, rounds, device)
    what = f"LoRA all {blocks}, no store"
    return [
        Row(f"{what}: DISAM / naive SAM", ratios(seconds["our disam"], seconds["sam"]), 0.92, exact, error),
        Row(f"{what}: DISAM / PEFT ERM", ratios(seconds["our disam"], seconds["erm"]), None, exact, error),
    ]


def peer_lora(folder: Path, last: int, device: torch.device, dtype: torch.dtype) -> Any:
    model = peer_model(folder)
    blocks = model.config.vision_config.num_hidden_layers
    trained = "|".join(str(block) for block in range(blocks - last, blocks))
    targets = rf"vision_model\.encoder\.layers\.({trained})\.self_attn\.(q_proj|v_proj)"
    torch.manual_seed(1)
    peer: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.02)  # at its initial 0 the gradient of every A would be 0 too
    return peer.to(device, dtype).train()  # drawn before: the same values in every dtype


def peer_logits(peer: Any, tokens_CL: Tensor) -> Callable[[Tensor], Tensor]:
    """Images to logits. Text features are computed once, as anybody would who trains the image tower alone."""
    with torch.no_grad():
        text_CE = nn.functional.normalize(peer.get_text_features(input_ids=tokens_CL).pooler_output, dim=-1)

    def logits(pixels_BCHW: Tensor) -> Tensor:
        image_BE = nn.functional.normalize(peer.get_image_features(pixel_values=pixels_BCHW).pooler_output, dim=-1)
        return peer.logit_scale.exp() * image_BE @ text_CE.T

    return logits


def _by_checkpoint_name(peer: nn.Module) -> dict[str, Tensor]:
    """Names as our adapters have them: without peft's prefix and its name for the adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): p
        for name, p in peer.named_parameters()
        if p.requires_grad
    }
