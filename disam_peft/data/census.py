"""The census of a data set: how many images each class has in each domain, and what is wrong with them."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from disam_peft.config.names import same_but_for_case
from disam_peft.data.check import CheckedFile, examine
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.sources.given_splits import PARTS


@dataclass(frozen=True)
class BadFile:
    """An image that cannot be used."""

    source: str
    domain: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class DuplicateGroup:
    """Files with the same content."""

    sha256: str
    sources: tuple[str, ...]
    domains: tuple[str, ...]
    """The different domains they are in. More than one is a leak when one of them is held out."""
    classes: tuple[str, ...]
    """The different classes they are in. More than one means that a label is wrong."""
    parts: tuple[str, ...] = ()
    """The different given parts they are in; none where the data give none."""


@dataclass(frozen=True)
class SizeSummary:
    """Widths and heights of the good images, in pixels."""

    smallest: tuple[int, int]
    median: tuple[float, float]
    largest: tuple[int, int]
    """``smallest`` and ``largest`` are by number of pixels; ``median`` is the median width and the median height."""


@dataclass(frozen=True)
class DataReport:
    """How many samples there are, and what the check found; plain data, see ``to_dict``.

    Attributes:
        counts: samples by domain (rows) and class (columns), bad ones included.
        duplicates_within: groups of files with the same content in one domain.
        duplicates_across: groups of files with the same content in several domains.
        conflicts: those of both kinds of groups whose files have several classes.
        across_parts: those whose files are in several given parts.
        twins: domains, and classes, whose names differ in case or spaces alone.
        given: samples in the given parts train, validation and test, by domain; None where the data give none.
        without_images: domains that have a folder but no image that can be used -> what was found there.
        ignored: files that are no samples, counted by kind.
        ignored_in: of these, kind -> folder -> number.
        sizes: None where no image is good.
    """

    origin: str
    fingerprint: str
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    prompt_names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    bad: tuple[BadFile, ...]
    duplicates_within: tuple[DuplicateGroup, ...]
    duplicates_across: tuple[DuplicateGroup, ...]
    sizes: SizeSummary | None
    ignored: dict[str, int]
    ignored_in: dict[str, dict[str, int]] = field(default_factory=dict)
    conflicts: tuple[DuplicateGroup, ...] = ()
    across_parts: tuple[DuplicateGroup, ...] = ()
    twins: tuple[tuple[str, ...], ...] = ()
    given: tuple[tuple[int, int, int], ...] | None = None
    without_images: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of samples, bad ones included."""
        return sum(map(sum, self.counts))

    def to_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return json.loads(json.dumps({**asdict(self), "total": self.total}))


def inspect(
    dataset: DomainDataset,
    *,
    progress: bool = True,
    findings: Sequence[CheckedFile] | None = None,
    without_images: Mapping[str, str] | None = None,
) -> DataReport:
    """Check every file of ``dataset``. Bad files are listed in the report and are no error.

    Args:
        findings: of ``examine``, where it has been called already.
        without_images: see ``Samples``.
    """
    if findings is None:
        findings = examine(dataset, progress=progress)
    counts_DC = np.zeros((len(dataset.domains), len(dataset.classes)), dtype=np.int64)
    np.add.at(counts_DC, (dataset.domain_ids, dataset.labels), 1)
    groups = _duplicates(dataset, findings)
    return DataReport(
        origin=dataset.origin,
        fingerprint=dataset.fingerprint,
        domains=dataset.domains,
        classes=dataset.classes,
        prompt_names=dataset.prompt_names,
        counts=tuple(tuple(row) for row in counts_DC.tolist()),
        bad=tuple(_bad_file(dataset, i, f.reason) for i, f in enumerate(findings) if f.reason),
        duplicates_within=tuple(group for group in groups if len(group.domains) == 1),
        duplicates_across=tuple(group for group in groups if len(group.domains) > 1),
        conflicts=tuple(group for group in groups if len(group.classes) > 1),
        across_parts=tuple(group for group in groups if len(group.parts) > 1),
        twins=tuple(map(tuple, same_but_for_case(dataset.domains) + same_but_for_case(dataset.classes))),
        given=_given(dataset),
        without_images=dict(without_images or {}),
        sizes=_sizes(findings),
        ignored=dict(dataset.ignored),
        ignored_in={kind: dict(where) for kind, where in dataset.ignored_in.items()},
    )


def _bad_file(dataset: DomainDataset, index: int, reason: str) -> BadFile:
    return BadFile(
        source=dataset.source(index),
        domain=dataset.domains[dataset.domain_ids[index]],
        class_name=dataset.classes[dataset.labels[index]],
        reason=reason,
    )


def _given(dataset: DomainDataset) -> tuple[tuple[int, int, int], ...] | None:
    if dataset.given_parts is None:
        return None
    parts_N = np.asarray(dataset.given_parts)
    counted = [
        [int((parts_N[dataset.domain_ids == d] == part).sum()) for part in PARTS] for d in range(len(dataset.domains))
    ]
    return tuple((train, validation, test) for train, validation, test in counted)


def _duplicates(dataset: DomainDataset, findings: Sequence[CheckedFile]) -> list[DuplicateGroup]:
    by_hash: dict[str, list[int]] = defaultdict(list)
    for i, finding in enumerate(findings):
        if not finding.reason:  # ten empty files are ten bad files, not duplicates
            by_hash[finding.sha256].append(i)
    return [
        DuplicateGroup(
            sha256=digest,
            sources=tuple(dataset.source(i) for i in members),
            domains=tuple(dataset.domains[d] for d in np.unique(dataset.domain_ids[members])),
            classes=tuple(dataset.classes[c] for c in np.unique(dataset.labels[members])),
            parts=tuple(sorted({dataset.given_parts[i] for i in members})) if dataset.given_parts is not None else (),
        )
        for digest, members in by_hash.items()
        if len(members) > 1
    ]


def _sizes(findings: Sequence[CheckedFile]) -> SizeSummary | None:
    sizes = sorted(((f.width, f.height) for f in findings if not f.reason), key=lambda s: (s[0] * s[1], s))
    if not sizes:
        return None
    median = (statistics.median(w for w, _ in sizes), statistics.median(h for _, h in sizes))
    return SizeSummary(smallest=sizes[0], median=median, largest=sizes[-1])
