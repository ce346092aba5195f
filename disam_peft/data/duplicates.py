"""The same image in two places: in two parts of a split, or under two classes. Images are compared by content."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from disam_peft.config.data import DuplicatePolicy
from disam_peft.data.dataset import DomainDataset
from disam_peft.errors import UserError

_LISTED = 10


def check_duplicates(
    parts: Mapping[str, DomainDataset], policy: DuplicatePolicy, *, target: DomainDataset | None = None
) -> None:
    """Look for images that are in several of the ``parts``, and for images with several classes.

    An image that is trained on and validates makes the validation score too good. An image with two classes teaches
    one of them wrongly. Classes are compared where the data check has hashed the files.

    Args:
        parts: name of the part, for messages ("training") -> its samples.
        policy: ``error``, ``warn`` or ``ignore``.
        target: the held-out domain, whose classes are looked at as well. What it shares with the sources is a leak,
            see ``splits.check_no_leak``.

    Raises:
        UserError: there is one, and the policy is ``error``; lists them.
    """
    if policy == "ignore":
        return
    found = [
        message
        for message in (_across(parts), _conflicts([*parts.values(), *([] if target is None else [target])]))
        if message
    ]
    if found and policy == "error":
        raise UserError("\n".join(found) + "\nremove one of each, or set data.duplicates to warn or ignore")
    for message in found:
        warnings.warn(f"{message}\nremove one of each (data.duplicates=error refuses such data)", stacklevel=2)


def same_content(first: DomainDataset, second: DomainDataset) -> list[tuple[int, int]]:
    """Every pair of a sample of ``first`` and one of ``second`` with the same content, by their numbers.

    Raises:
        BadImage: a file that has to be read cannot be.
    """
    if first.hashes is not None and second.hashes is not None:
        known: dict[str, list[int]] = defaultdict(list)
        for i, digest in enumerate(first.hashes):
            known[digest].append(i)
        return [(i, j) for j, digest in enumerate(second.hashes) for i in known.get(digest, ())]
    first_sizes, second_sizes = first.sizes_and_times[0], second.sizes_and_times[0]
    # Only files of equal size can have equal content, so most files need not be read.
    by_hash: dict[str, list[int]] = defaultdict(list)
    for index in np.flatnonzero(np.isin(first_sizes, second_sizes)):
        by_hash[first.content_hash(int(index))].append(int(index))
    candidates = np.flatnonzero(np.isin(second_sizes, first_sizes))
    return [(i, int(j)) for j in candidates for i in by_hash.get(second.content_hash(int(j)), [])]


def label_conflicts(dataset: DomainDataset) -> list[list[int]]:
    """Groups of samples with the same content but different classes, by their numbers; none where the data check has
    not hashed the files."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, digest in enumerate(dataset.hashes or ()):
        groups[digest].append(i)
    return [members for members in groups.values() if len({int(dataset.labels[i]) for i in members}) > 1]


def _across(parts: Mapping[str, DomainDataset]) -> str:
    lines, titles = [], []
    for (name, one), (other, two) in combinations(parts.items(), 2):
        pairs = same_content(one, two)
        if pairs:
            titles.append(f"{len({j for _, j in pairs})} image(s) of the {other} part are also in the {name} part")
            lines += [f"  {one.source(i)}  =  {two.source(j)}" for i, j in pairs]
    return "\n".join([f"{' and '.join(titles)}, by content:", *_some(lines)]) if lines else ""


def _conflicts(datasets: Sequence[DomainDataset]) -> str:
    by_content: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)  # class -> data set and sample
    for number, dataset in enumerate(datasets):
        for i, digest in enumerate(dataset.hashes or ()):
            by_content[digest].setdefault(dataset.classes[dataset.labels[i]], (number, i))
    lines = [
        "  " + "  =  ".join(f"{datasets[number].source(i)} ({label})" for label, (number, i) in sorted(where.items()))
        for where in by_content.values()
        if len(where) > 1
    ]
    return "\n".join([f"{len(lines)} image(s) have several classes:", *_some(lines)]) if lines else ""


def _some(lines: list[str]) -> list[str]:
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return [*lines[:_LISTED], *more]
