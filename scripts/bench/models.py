"""CLIPs of the real sizes with random weights, which cost what trained ones cost, and class names of real lengths."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.config.backbone import BackboneConfig

START, END = "<|startoftext|>", "<|endoftext|>"
SHORT_NAME = 2
"""Tokens; most names of Office-Home and DomainNet have no more."""


def vit_b_32() -> CLIPConfig:
    """The sizes of openai/clip-vit-base-patch32, which are transformers' defaults, with its markers' true ids."""
    return clip_config({}, {})


def clip_config(vision: dict[str, Any], text: dict[str, Any], **top: Any) -> CLIPConfig:
    """Sizes other than ViT-B/32's; the vocabulary stays CLIP's."""
    markers = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return CLIPConfig(text_config={**markers, **text}, vision_config=vision, **top)


def write_clip(folder: Path, config: CLIPConfig, seed: int = 0) -> None:
    """A folder as ``save_pretrained`` of model, image processor and tokenizer leaves it."""
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    vision: Any = config.vision_config
    text: Any = config.text_config
    size = vision.image_size
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as stream:
        merges = stream.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, START, END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=text.max_position_embeddings)
    tokenizer.save_pretrained(folder)


def our_backbone(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> ClipBackbone:
    """The CLIP of a folder as this package loads it."""
    return load_backbone(BackboneConfig(family="transformers", name=str(folder))).to(device, dtype)


def peer_model(folder: Path) -> Any:
    """The same CLIP as any user of transformers loads it: frozen, in training mode."""
    model: Any = CLIPModel.from_pretrained(folder)
    return model.requires_grad_(False).train()


def class_prompts(classes: int) -> ClassPrompts:
    """ImageNet's class names, the short ones first."""
    return ClassPrompts(_names()[:classes], ("a photo of a {}.",))


@cache
def _names() -> tuple[str, ...]:
    names = list(open_clip.IMAGENET_CLASSNAMES)
    tokens_CL: Tensor = open_clip.SimpleTokenizer()(names)
    length_C = (tokens_CL != 0).sum(dim=1) - 2
    short = [name for name, length in zip(names, length_C, strict=True) if length <= SHORT_NAME]
    long = [name for name, length in zip(names, length_C, strict=True) if length > SHORT_NAME]
    return (*short, *long)
