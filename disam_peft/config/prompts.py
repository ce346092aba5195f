"""The sentences about the classes that a recipe asks for."""

from __future__ import annotations

from disam_peft.config.base import Config

IMAGENET = "imagenet"


class PromptConfig(Config):
    """Sentences about the classes, for zero-shot classification and for adapters that keep class features."""

    templates: str | list[str] = "a photo of a {}."
    """One sentence with ``{}`` for the class, a list of them (averaged), or ``imagenet`` for the 80 of CLIP's paper."""
