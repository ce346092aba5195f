"""The chain from a recipe to a classifier: split of the data, pretrained model, prompts, adapter, classifier.

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
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.splits import given_test_part, leave_out, split_train_validation, without_test_part


@dataclass(frozen=True)
class SplitData:
    """The data of a run. Training and selection are handed source data only.

    Attributes:
        sources: the samples of every domain but the held-out one, if there is one; ``training`` and ``validation``
            together. A test part that the data themselves give is in none of them.
        training: the samples that the adapter is trained on.
        validation: the samples of the sources by which the best state is chosen.
        target: all samples of the held-out domain; None where nothing is held out.
        test: the samples that the data themselves give as the test part of ``target``, or of every domain where nothing
            is held out; None where they give none.
    """

    sources: DomainDataset
    training: DomainDataset
    validation: DomainDataset
    target: DomainDataset | None
    test: DomainDataset | None = None

    def by_split(self) -> dict[str, DomainDataset]:
        """The data sets that results are reported on, by the names that records give to them. Where the data have given
        splits, their test part is one of them: of the held-out domain, which is judged whole all the same, or of all
        domains where nothing is held out."""
        splits = {"source_validation": self.validation}
        if self.target is not None:
            splits["held_out"] = self.target
        if self.test is not None:
            splits["test" if self.target is None else "held_out_test"] = self.test
        return splits

    def source_parts(self) -> dict[str, DomainDataset]:
        """The parts of what is trained on, which may not share an image, by what messages call them."""
        parts = {"training": self.training, "validation": self.validation}
        return {**parts, "test": self.test} if self.target is None and self.test is not None else parts

    @property
    def judged(self) -> tuple[str, DomainDataset]:
        """The data set on which mistakes are looked at, and its name in records: the held-out domain, or where nothing
        was held out the given test part, or the validation part where there is none."""
        if self.target is not None:
            return "held_out", self.target
        return ("source_validation", self.validation) if self.test is None else ("test", self.test)


def holding_out(recipe: Recipe, domain: str | None) -> Recipe:
    """The recipe of one run, which names the domain that it holds out; None where it holds nothing out."""
    return recipe.model_copy(update={"protocol": recipe.protocol.model_copy(update={"held_out": domain})})


def split_data(recipe: Recipe, dataset: DomainDataset) -> SplitData:
    """Split ``dataset`` as the protocol of one run says, which names the domain to hold out or holds nothing out.

    Raises:
        UserError: no such domain; fewer than two domains where one is held out; a domain too small for the validation
            fraction.
    """
    held_out = recipe.protocol.held_out
    sources, target = (dataset, None) if held_out is None else leave_out(dataset, held_out)
    training, validation = split_train_validation(sources, recipe.protocol.validation_fraction, recipe.seed)
    test = given_test_part(dataset if target is None else target)
    return SplitData(without_test_part(sources), training, validation, target, test)


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
