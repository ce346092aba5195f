"""CLIP models of two families behind one contract (``base.ClipBackbone``); nothing heavy is imported up front."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from disam_peft.backbones.config import BackboneConfig, located

if TYPE_CHECKING:
    from disam_peft.backbones.base import ClipBackbone

__all__ = ["BACKBONES", "BackboneConfig", "imagenet_templates", "load_backbone"]


def _open_clip(config: BackboneConfig) -> ClipBackbone:
    from disam_peft.backbones.openclip import OpenClipBackbone

    return OpenClipBackbone(config)


def _transformers(config: BackboneConfig) -> ClipBackbone:
    from disam_peft.backbones.hf import HfBackbone

    return HfBackbone(config)


BACKBONES: dict[str, Callable[[BackboneConfig], ClipBackbone]] = {
    "open_clip": _open_clip,
    "transformers": _transformers,
}


def load_backbone(config: BackboneConfig) -> ClipBackbone:
    """A frozen CLIP on the CPU, in float32 and eval mode.

    Raises:
        UserError: an unknown name or tag, weights that are missing, pickled or cannot be fetched.
    """
    backbone = BACKBONES[config.family](located(config))
    backbone.config = config  # records and exports name the model, not a folder of this machine
    return backbone


def imagenet_templates() -> tuple[str, ...]:
    """The 80 sentences of CLIP's ImageNet ensemble, each with one ``{}``."""
    from disam_peft.backbones.openclip import imagenet_templates as templates

    return templates()
