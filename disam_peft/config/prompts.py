"""Which sentences about the classes the text tower reads."""

from __future__ import annotations

from disam_peft.config.base import Config

IMAGENET = "imagenet"


class PromptConfig(Config):
    """The sentences about the classes, for zero-shot classification and for adapters that keep class features."""

    templates: str | list[str] = "a photo of a {}."
    """One sentence with ``{}`` for the class, or a list of them, whose features are averaged, or ``imagenet`` for the
    80 sentences of CLIP's paper."""
