"""Which CLIP to load."""

from __future__ import annotations

from typing import Literal

from disam_peft.config.base import Config

DEMO = "demo"
"""The name of the small CLIP that comes with the package."""
RANDOM_WEIGHTS = "none"
"""The value of ``pretrained`` that asks for random weights."""


class BackboneConfig(Config):
    """Which CLIP to load."""

    family: Literal["open_clip", "transformers"] = "open_clip"
    name: str
    """open_clip: a model name (``ViT-B-16``), ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
    transformers: a hub id (``openai/clip-vit-base-patch32``) or a local folder.
    Both: ``demo``, the small CLIP that comes with the package."""
    pretrained: str | None = None
    """open_clip: a pretrained tag (``openai``) or a safetensors file. ``none``: random weights, for tests only.
    Unset: what the folder or hub repository holds."""
    revision: str | None = None
    """A branch, tag or commit of a hub repository (``hf-hub:...``, or a transformers hub id)."""
    seed: int = 0
    """Seed of the random weights of ``pretrained: none``. It has no meaning otherwise."""
