"""The chain from a recipe to a classifier: pretrained model, prompts, adapter, classifier.

It stands here once for training, for sweeps and for the doctor. ``run.py`` shows where each part is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from disam_peft.adapters.prompts import ClassPrompts, prompt_templates
from disam_peft.adapters.registry import build_adapter, planned_image_split
from disam_peft.backbones.base import ClipBackbone
from disam_peft.backbones.families import load_backbone
from disam_peft.classification.classifier import ClipClassifier
from disam_peft.config.recipe import Recipe


@dataclass(frozen=True)
class Pretrained:
    """The recipe's CLIP before any training, and how its text tower is asked about the classes."""

    recipe: Recipe
    backbone: ClipBackbone
    prompts: ClassPrompts

    def zero_shot(self) -> ClipClassifier:
        """A classifier without an adapter.

        Where the recipe stores features, its frozen part ends where that of the adapter to come will end. Both then
        read the same store, and no image is decoded, and no frozen block run, for the zero-shot numbers alone.
        """
        split = planned_image_split(self.recipe.adapter, self.backbone) if self.recipe.features.store else None
        return ClipClassifier(self.backbone, None, self.prompts, image_split=split)

    def with_new_adapter(self) -> ClipClassifier:
        """A classifier with the recipe's adapter, whose first weights depend on the recipe's seed alone.

        This seeds torch's random numbers and changes modules inside the backbone.

        Raises:
            UserError: the backbone carries an adapter already, or does not have what the adapter's config asks for.
        """
        torch.manual_seed(self.recipe.seed)
        return ClipClassifier(
            self.backbone, build_adapter(self.recipe.adapter, self.backbone, self.prompts), self.prompts
        )


def load_pretrained(recipe: Recipe, class_names: tuple[str, ...], device: torch.device | str = "cpu") -> Pretrained:
    """Load the recipe's backbone onto ``device`` and put the class names into the recipe's templates.

    Args:
        class_names: as they stand in a sentence ("polar bear"), one per label.

    Raises:
        UserError: a backbone or a template that cannot be used.
    """
    backbone = load_backbone(recipe.backbone).to(device)
    return Pretrained(recipe, backbone, ClassPrompts(class_names, prompt_templates(recipe.prompts)))
