"""What the data of a run are: its images by content, and where two looks at the data differ."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from disam_peft.common.run_images import Part, RunImages, size_as_content

if TYPE_CHECKING:
    from disam_peft.config.recipe import Recipe
    from disam_peft.data.dataset import DomainDataset
    from disam_peft.experiments.split_data import SplitData

_CELLS, _KEYS = 20, 3
"""How many cells of domain and class are listed, and how many images of each."""
_Image = tuple[str, str, str, str, str]
"""Domain, class, key, content and part."""


@dataclass(frozen=True)
class DataComparison:
    """How the data that are there now compare with those of a run.

    Attributes:
        differences: ``what: before -> now``; none where the run's data are there.
        basis: a sentence on what it rests on, where it does not rest on the content of every file as it is now.
    """

    differences: tuple[str, ...] = ()
    basis: str = ""


def images_of(data: SplitData) -> RunImages:
    """The images of a run and what it uses each of them for. The given test part of the held-out domain is ``test``,
    although the whole domain is judged."""
    from disam_peft.data.splits import without_test_part  # NumPy, which is not needed to look at a folder

    parts: list[tuple[Part, DomainDataset]] = [
        ("training", data.training),
        ("validation", data.validation),
    ]
    if data.target is not None:
        parts.append(("held_out", data.target if data.test is None else without_test_part(data.target)))
    if data.test is not None:
        parts.append(("test", data.test))
    if data.unused is not None:
        parts.append(("unused", data.unused))
    key: list[str] = []
    content: list[str] = []
    domain: list[str] = []
    class_name: list[str] = []
    part: list[Part] = []
    size: list[int] = []
    given: list[str] = []
    state: list[str] = []
    for name, dataset in parts:
        sizes = dataset.sizes_and_times[0].tolist()
        key += dataset.keys
        content += dataset.hashes if dataset.hashes is not None else map(size_as_content, sizes)
        domain += [dataset.domains[number] for number in dataset.domain_ids.tolist()]
        class_name += [dataset.classes[number] for number in dataset.labels.tolist()]
        part += [name] * len(dataset)
        size += sizes
        own = dataset.given_parts or [""] * len(dataset)
        given += ["" if one == "train" else one for one in own]  # as where nothing is given
        state += states_of(dataset) if dataset.hashes is None else []
    words = dict(zip(data.training.classes, data.training.prompt_names, strict=True))
    return RunImages(
        tuple(key),
        tuple(content),
        tuple(domain),
        tuple(class_name),
        tuple(part),
        tuple(size),
        words,
        given=tuple(given) if any(given) else None,
        state=tuple(state) if state else None,
    )


def states_of(dataset: DomainDataset) -> list[str]:
    """What the file system notes about the file of each image, or about the table that it is in, as a hash: equal files
    in another place have another one, a file that was moved on its disk has not."""
    embedded = dataset.state_of_embedded
    told = [(row, "" if row[1] else embedded) for row in dataset.file_states_N4.tolist()]
    return [hashlib.sha256(repr(one).encode()).hexdigest()[:32] for one in told]


def compare_data(before: RunImages, recipe: Recipe, dataset: DomainDataset) -> DataComparison:
    """Compare the images of a run with those that its recipe would have now: keys, contents, domains, classes, parts,
    and words for classes.

    Contents are compared by hash where the data check has them of both, else by size.

    Raises:
        UserError: the data cannot be split as the recipe says.
    """
    from disam_peft.experiments.split_data import split_data

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the split: they are for who trains
        now = images_of(split_data(recipe, dataset))
    by_hash = before.is_hashed and now.is_hashed
    differences = list(_differing_cells(*(Counter(_images(images, by_hash=by_hash)) for images in (before, now))))
    differences += [
        f"class {name}: {before.class_words.get(name, 'none')} -> {now.class_words.get(name, 'none')}"
        for name in sorted(before.class_words.keys() | now.class_words.keys())
        if before.class_words.get(name) != now.class_words.get(name)
    ]
    return DataComparison(tuple(differences), _basis(before, now, dataset))


def _images(images: RunImages, *, by_hash: bool) -> Iterator[_Image]:
    content = images.content if by_hash else map(size_as_content, images.size)
    return zip(images.domain, images.class_name, images.key, content, images.part, strict=True)


def _basis(before: RunImages, now: RunImages, dataset: DomainDataset) -> str:
    if not before.is_hashed and before.state is not None:
        noted, found = zip(before.key, before.state, strict=True), zip(dataset.keys, states_of(dataset), strict=True)
        if set(noted) <= set(found):
            files = "the file system notes nothing new about them"
        else:
            files = "these are other files by now, whose content may be another one; --overwrite runs again"
        return f"images were compared by name and size alone, as the run was trained with data.verify=false; {files}"
    if not (before.is_hashed and now.is_hashed):
        return (
            "images were compared by name and size alone, as data.verify was false; with data.verify=full every file "
            "is read"
        )
    if dataset.remembered:
        return (
            "no image was read again: since the data check read them, no size, time of change or inode is new; "
            "data.verify=full reads every file"
        )
    return ""


def _differing_cells(then: Counter[_Image], now: Counter[_Image]) -> Iterator[str]:
    gone, new = _by_cell(then - now), _by_cell(now - then)
    differing = sorted(gone.keys() | new.keys())
    if not differing:
        return
    counts_then, counts_now = (Counter(image[:2] for image in images.elements()) for images in (then, now))
    for cell in differing[:_CELLS]:
        told = "; ".join(f"{kind}: {_listed(keys)}" for kind, keys in _kinds(gone[cell], new[cell]).items() if keys)
        yield f"images of {'/'.join(cell)}: {counts_then[cell]} -> {counts_now[cell]} ({told})"
    if len(differing) > _CELLS:
        yield f"and {len(differing) - _CELLS} more of the {len(counts_then.keys() | counts_now.keys())} cells"


def _by_cell(images: Counter[_Image]) -> defaultdict[tuple[str, str], dict[str, tuple[str, str]]]:
    """Domain and class -> key -> content and part."""
    cells: defaultdict[tuple[str, str], dict[str, tuple[str, str]]] = defaultdict(dict)
    for domain, class_name, key, content, part in images:
        cells[domain, class_name][key] = content, part
    return cells


def _kinds(gone: Mapping[str, tuple[str, str]], new: Mapping[str, tuple[str, str]]) -> dict[str, list[str]]:
    both = sorted(gone.keys() & new.keys())
    changed = [key for key in both if gone[key][0] != new[key][0]]
    return {
        "changed": changed,
        "in another part": [f"{key} ({gone[key][1]} -> {new[key][1]})" for key in both if gone[key][0] == new[key][0]],
        "gone": sorted(gone.keys() - new.keys()),
        "new": sorted(new.keys() - gone.keys()),
    }


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:_KEYS]) + (f" and {len(keys) - _KEYS} more" if len(keys) > _KEYS else "")


def content_by_cell(images: RunImages) -> dict[str, str]:
    """How many images each class has in each domain, and a hash over their names and contents (over names and sizes,
    where the data check was left out): what a checkpoint says of the data that it was made with."""
    rows = sorted(zip(images.domain, images.class_name, images.key, images.content, strict=True))
    cells: defaultdict[str, list[str]] = defaultdict(list)
    for domain, class_name, key, content in rows:
        cells[f"images of {domain}/{class_name}"] += [key, content.removeprefix("size:")]
    found = {cell: f"{len(parts) // 2} (sha256 {_digest(parts)})" for cell, parts in sorted(cells.items())}
    words = [images.class_words[name] for name in sorted(images.class_words)]
    return {"class names": f"{len(words)} (sha256 {_digest(words)})", **found}


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
