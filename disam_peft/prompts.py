"""The sentences about the classes that a recipe asks for."""

from __future__ import annotations

from disam_peft.backbones import imagenet_templates
from disam_peft.config import Config

IMAGENET = "imagenet"


class PromptConfig(Config):
    """Sentences about the classes, for zero-shot classification and for adapters that keep class features."""

    templates: str | list[str] = "a photo of a {}."
    """One sentence with ``{}`` for the class, a list of them (averaged), or ``imagenet`` for the 80 of CLIP's paper."""

    def resolved(self) -> tuple[str, ...]:
        """The sentences themselves."""
        if self.templates == IMAGENET:
            return imagenet_templates()
        return (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)
