"""A model that can be chosen by its name, and what this project does with it, known without building it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ListedModel:
    """One value of ``backbone.name``."""

    family: str
    name: str
    pretrained: tuple[str, ...]
    """Values of ``backbone.pretrained``; empty where the name brings its weights, or there are none."""
    brings_weights: bool
    """The name stands for weights too."""
    pixels: int | None
    """Height and width of its images; None where each checkpoint of the class has its own."""
    image_tower: str
    """What it is built of, in a few words."""
    projections: tuple[str, ...]
    """Layers of the image tower that LoRA takes: ``q`` and ``v``, the default, or those that ``adapter.projections``
    has to name; empty where there are none."""
    splits: bool
    """The image tower can be run in parts: blocks before the first trained one run once, or come from a store."""
    one_token: bool
    """The last block is computed for the class token alone."""
    prompts: bool
    """The text tower takes learned prompts (CoOp), and its blocks have ``q`` and ``v``."""
