"""Which images of a data set a run has seen: its own splits, or for other data the split by content."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from disam_peft.common.run_images import IMAGES, Part, RunImages, read_images, size_as_content
from disam_peft.common.soup_record import read_soup
from disam_peft.config.recipe import Recipe
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.load import load
from disam_peft.data.transforms.decode import BadImage
from disam_peft.errors import Notice, UserError
from disam_peft.experiments.run_data import images_of, states_of
from disam_peft.experiments.split_data import split_data

SEEN_TRAINING, SEEN_VALIDATION, UNSEEN, UNKNOWN = "seen_training", "seen_validation", "unseen", "unknown"


class RunsImages:
    """What a finished run knows of its images.

    Args:
        run: the folder of the run.
        recipe: as the run recorded it, without overrides.
    """

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self.run, self.recipe = run, recipe
        self.recorded = read_images(run / IMAGES) if (run / IMAGES).is_file() else None
        """None for a run of version 0.1."""

    def own_splits(self, recipe: Recipe, dataset: DomainDataset) -> dict[str, DomainDataset] | None:
        """The run's own splits of ``dataset``, by the names that training gave them; None where it is not what the run
        was trained on. Where the files lie does not matter.

        Args:
            recipe: of the evaluation, whose data are ``dataset``.
        """
        if self.recorded is None:
            return self._own_splits_of_an_older_run(recipe, dataset)
        if self.recorded.is_hashed:
            if _rows(self.recorded) != _rows_of(dataset, _contents(dataset, hashed=True)):
                return None
        elif not self._are_the_unread(recipe, dataset):
            return None
        data = split_data(self.recipe, dataset)
        found, recorded = _parts(images_of(data)), _parts(self.recorded)
        if found == recorded:
            return data.by_split()
        # A soup of runs with other seeds: what one of them held back, another one was trained on.
        changed = {(part, recorded[key]) for key, part in found.items() if recorded[key] != part}
        if read_soup(self.run) is None or changed != {("validation", "training")}:
            return None
        return held_back_by_all(data.by_split(), [recorded])

    def _are_the_unread(self, recipe: Recipe, used: DomainDataset) -> bool:
        """Whether ``used`` are the images of a run that did not read them: the very files, or files of the same content
        as those that the run had, which are read now."""
        assert self.recorded is not None
        if _rows(self.recorded) == _rows_of(used, _contents(used, hashed=False)):
            if self.recorded.state is not None and self._are_the_files(used):
                return True
            if self.recorded.state is None and _places(recipe) == _places(self.recipe):
                warnings.warn(
                    f"{self.run} recorded the sizes of its images alone: {used.origin}, where they lay, is taken for "
                    "what it was trained on",
                    Notice,
                    stacklevel=4,
                )
                return True
        before = self._recomputed
        return before is not None and _rows(before) == _rows_of(used, _contents(used, hashed=True))

    def _are_the_files(self, used: DomainDataset) -> bool:
        """Whether the file system notes nothing new about the run's files; True where the run did not record it."""
        if self.recorded is None or self.recorded.state is None:
            return True
        before = dict(zip(self.recorded.key, self.recorded.state, strict=True))
        return before == dict(zip(used.keys, states_of(used), strict=True))

    def _own_splits_of_an_older_run(self, recipe: Recipe, dataset: DomainDataset) -> dict[str, DomainDataset] | None:
        if recipe.data != self.recipe.data:
            before = self._recomputed
            if before is None or _rows(before) != _rows_of(dataset, _contents(dataset, hashed=True)):
                return None
        else:
            warnings.warn(
                f"{self.run} is a run of version 0.1, which did not record the content of its images: "
                f"{dataset.origin} is taken for what it was trained on",
                Notice,
                stacklevel=3,
            )
        try:
            return split_data(self.recipe, dataset).by_split()
        except UserError:  # a domain is gone
            return None

    def by_what_was_seen(self, dataset: DomainDataset) -> dict[str, DomainDataset]:
        """All samples of ``dataset``, by whether the run trained on the image, chose its state by it, or neither.

        Images are compared by content, byte by byte: a copy under another name was seen, a picture that was stored anew
        was not. What cannot be known, because the run recorded no content and its data are gone, is ``unknown``.
        """
        known = self.recorded
        if known is None or not known.is_hashed:
            known = self._recomputed
        if known is not None:
            trained = {content for content, part in zip(known.content, known.part, strict=True) if part == "training"}
            chosen = {content for content, part in zip(known.content, known.part, strict=True) if part == "validation"}
            contents = _contents(dataset, hashed=True)
            split_N = [
                SEEN_TRAINING if content in trained else SEEN_VALIDATION if content in chosen else UNSEEN
                for content in contents
            ]
        else:
            sizes = None if self.recorded is None else set(self.recorded.size)  # equal files have equal sizes
            own = dataset.sizes_and_times[0].tolist()
            split_N = [UNKNOWN if sizes is None or size in sizes else UNSEEN for size in own]
            warnings.warn(
                f"{self.run} did not record the content of its images, and they are no longer where, or what, they "
                f"were: which of the images of {dataset.origin} it was trained on is unknown",
                stacklevel=2,
            )
        found = {}
        for name in (SEEN_TRAINING, SEEN_VALIDATION, UNSEEN, UNKNOWN):
            members = [i for i, split in enumerate(split_N) if split == name]
            if members:
                found[name] = dataset.select(members)
        return found

    @property
    def _recomputed(self) -> RunImages | None:
        """The images of the run, read again from where they were; None where they are gone or not the same."""
        try:
            dataset = load(self.recipe.data.model_copy(update={"verify": True}))
            data = split_data(self.recipe, dataset)
            if not self._are_the_files(dataset):
                return None
        except (UserError, OSError, BadImage):
            return None
        images = images_of(data)
        if self.recorded is not None and _without_content(images) != _without_content(self.recorded):
            return None
        return images


def held_back_by_all(
    splits: Mapping[str, DomainDataset], parts: Sequence[Mapping[str, Part]]
) -> dict[str, DomainDataset]:
    """The splits with source validation over the images that every run held back; without it where a domain has none.

    Args:
        parts: of each run, its images and what it used them for.
    """
    others = {name: split for name, split in splits.items() if name != "source_validation"}
    held_back = splits.get("source_validation")
    if held_back is None:
        return others
    shared = [n for n, key in enumerate(held_back.keys) if all(found[key] == "validation" for found in parts)]
    if {held_back.domain_ids[n] for n in shared} != set(held_back.domain_ids):
        return others
    return {"source_validation": held_back.select(shared), **others}


def _places(recipe: Recipe) -> tuple[str, str]:
    """Where the data of a recipe come from."""
    place = getattr(recipe.data, recipe.data.source)
    return recipe.data.source, os.path.realpath(place) if isinstance(place, Path) else str(place)


def _rows(images: RunImages) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    rows = zip(images.key, images.content, images.domain, images.class_name, strict=True)
    return sorted(rows), dict(images.class_words)


def _parts(images: RunImages) -> dict[str, Part]:
    return dict(zip(images.key, images.part, strict=True))


def _rows_of(dataset: DomainDataset, contents: Sequence[str]) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    domains = [dataset.domains[number] for number in dataset.domain_ids]
    classes = [dataset.classes[number] for number in dataset.labels]
    words = dict(zip(dataset.classes, dataset.prompt_names, strict=True))
    return sorted(zip(dataset.keys, contents, domains, classes, strict=True)), words


def _without_content(images: RunImages) -> list[tuple[str, str, str, int]]:
    return sorted(zip(images.key, images.domain, images.class_name, images.size, strict=True))


def _contents(dataset: DomainDataset, *, hashed: bool) -> Sequence[str]:
    """The content of every image as ``RunImages`` writes it; ``hashed``: by sha256, reading files that nobody has."""
    if hashed:
        return [dataset.content_hash(i) for i in range(len(dataset))]
    return [size_as_content(size) for size in dataset.sizes_and_times[0].tolist()]
