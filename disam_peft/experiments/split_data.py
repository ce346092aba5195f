"""The data of one run, split as its recipe says. Importing this loads no torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from disam_peft.config.feature_adapters import takes_no_steps
from disam_peft.config.protocol import as_held_out, named_domain
from disam_peft.config.recipe import Recipe
from disam_peft.config.training import TrainConfig
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.duplicates import check_duplicates
from disam_peft.data.splits import (
    check_no_leak,
    given_test_part,
    leave_out,
    split_train_validation,
    without_test_part,
)
from disam_peft.errors import Notice

MANY_PASSES, USUAL_PASSES = 1000, 100
"""Through the training images: from how many on a run gets a note, and how many the note speaks of."""


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
        unused: the samples that the data themselves give as the test parts of the sources, where a domain is held out;
            None where there are none.
    """

    sources: DomainDataset
    training: DomainDataset
    validation: DomainDataset
    target: DomainDataset | None
    test: DomainDataset | None = None
    unused: DomainDataset | None = None

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
    held_out = None if domain is None else as_held_out(domain)
    return recipe.model_copy(update={"protocol": recipe.protocol.model_copy(update={"held_out": held_out})})


def _held_out(recipe: Recipe, dataset: DomainDataset) -> str | None:
    """The name of the domain that the recipe of one run holds out, as the data know it."""
    held_out = recipe.protocol.held_out
    return None if held_out is None else named_domain(held_out, dataset.domains)


def split_data(recipe: Recipe, dataset: DomainDataset) -> SplitData:
    """Split ``dataset`` as the protocol of one run says, which names the domain to hold out or holds nothing out.

    Raises:
        UserError: no such domain; fewer than two domains where one is held out; a domain too small for the validation
            fraction.
    """
    held_out = _held_out(recipe, dataset)
    sources, target = (dataset, None) if held_out is None else leave_out(dataset, held_out)
    training, validation = split_train_validation(sources, recipe.protocol.validation_fraction, recipe.seed)
    test = given_test_part(dataset if target is None else target)
    unused = None if target is None else given_test_part(sources)
    return SplitData(without_test_part(sources), training, validation, target, test, unused)


def require_splits(runs: Sequence[Recipe], dataset: DomainDataset) -> None:
    """Pass if every run has a folder and images for each part. So none is trained before a later one is refused.

    Raises:
        UserError: as ``split_data``; a domain whose name can be no folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each run says its own when its turn comes
        for run in runs:
            run.folder(run.protocol.held_out)
            split_data(run, dataset)


def checked_split(recipe: Recipe, dataset: DomainDataset) -> SplitData:
    """``split_data`` for a run that will train: the parts share no image, and what is unusual about them is said.

    Raises:
        UserError: as ``split_data``; an image of the held-out domain that is also in a source; duplicates that
            ``data.duplicates`` refuses.
    """
    data = split_data(recipe, dataset)
    if data.target is not None:
        check_no_leak(data.sources, data.target)
    check_duplicates(data.source_parts(), recipe.data.duplicates, target=data.target)
    if not takes_no_steps(recipe.adapter):
        _note_sizes(recipe.train, len(data.training))
    return data


def _note_sizes(config: TrainConfig, images: int) -> None:
    """Say what is unusual about the number of steps and the size of their batches beside the number of images."""
    if config.batch_size > images:
        warnings.warn(
            f"train.batch_size={config.batch_size} is more than the {images} training images: every step has images "
            f"twice or more, which costs time and changes little; use at most {images}",
            Notice,
            stacklevel=3,
        )
    passes = config.steps * config.batch_size / max(1, images)
    if passes > MANY_PASSES:
        fewer = max(1, round(USUAL_PASSES * images / config.batch_size))
        warnings.warn(
            f"train.steps={config.steps} of {config.batch_size} images go {passes:,.0f} times through the {images} "
            f"training images; train.steps={fewer} would be {USUAL_PASSES} times, which is plenty for most adapters",
            Notice,
            stacklevel=3,
        )
