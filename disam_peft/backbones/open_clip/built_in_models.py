"""The models that open_clip has by name, and what is known of each from its config alone.

``backbone.py`` decides by the modules of a built model; a test compares both for every name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import open_clip

from disam_peft.backbones.listed_model import ListedModel


@dataclass(frozen=True)
class _Kind:
    """Image towers of timm with names of one form."""

    name: str
    """A regular expression for its beginning."""
    projections: tuple[str, ...]
    splits: bool
    one_token: bool = False


_TIMM = (
    _Kind(r"vit_relpos_", ("qkv",), splits=False),
    _Kind(r"vit_.*_siglip_|vit_pe_core_|vit_.*_gap_|vitamin_", ("q", "v"), splits=True),  # they pool all tokens
    _Kind(r"vit_base_mci_|vit_.*_clip_|eva", ("q", "v"), splits=True, one_token=True),
    _Kind(r"fastvit_", ("q", "v"), splits=True),  # in the stages with attention
    _Kind(r"convnext", ("fc1", "fc2"), splits=True),
    _Kind(r"swin_", ("qkv",), splits=False),
)
"""The first that fits counts; a tower of any other name is run as a whole."""

_KNOWN_TEXTS = r"$|roberta-|xlm-roberta-|google/mt5-|facebook/nllb-"
"""open_clip's own text tower has no name; the others are models of transformers that ``hf_text.py`` knows."""


def built_in_models() -> list[ListedModel]:
    """All names of open_clip, in its order."""
    return [_listed(name, open_clip.get_model_config(name) or {}) for name in open_clip.list_models()]


def _listed(name: str, config: Mapping[str, Any]) -> ListedModel:
    vision, text = config["vision_cfg"], config["text_cfg"]
    timm_name = vision.get("timm_model_name")
    kind = _of_timm(timm_name, vision["image_size"]) if timm_name else _own(vision)
    return ListedModel(
        family="open_clip",
        name=name,
        pretrained=tuple(open_clip.list_pretrained_tags_by_model(name)),
        brings_weights=False,
        pixels=vision["image_size"],
        image_tower=timm_name or _in_words(vision),
        projections=kind.projections,
        splits=kind.splits,
        one_token=kind.one_token,
        prompts=re.match(_KNOWN_TEXTS, text.get("hf_model_name", "")) is not None,
    )


def _own(vision: Mapping[str, Any]) -> _Kind:
    if isinstance(vision["layers"], list):  # a ResNet, whose only Linear layers are those of its pooling
        return _Kind("", ("pool_q", "pool_v"), splits=True)
    class_token = not vision.get("attentional_pool") and vision.get("pool_type", "tok") == "tok"
    return _Kind("", ("q", "v"), splits=True, one_token=class_token)


def _of_timm(name: str, pixels: int) -> _Kind:
    found = next((kind for kind in _TIMM if re.match(kind.name, name)), _Kind("", (), splits=False))
    built_for = re.search(r"_(\d+)$", name)
    if found.splits and built_for and int(built_for[1]) != pixels:  # other images than the trunk was made for
        return _Kind(found.name, ("qkv",), splits=False)
    return found


def _in_words(vision: Mapping[str, Any]) -> str:
    layers, width = vision["layers"], vision["width"]
    return f"ResNet, width {width}" if isinstance(layers, list) else f"ViT, {layers} blocks of width {width}"
