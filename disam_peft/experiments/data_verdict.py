"""What training will say of its data: the census, and every refusal and warning. Importing this loads no torch."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from disam_peft.config.protocol import ALL
from disam_peft.config.recipe import Recipe
from disam_peft.data.census import DataReport, inspect
from disam_peft.data.check import CheckedFile, examine, with_findings
from disam_peft.data.dataset import DomainDataset
from disam_peft.data.duplicates import check_duplicates
from disam_peft.data.load import as_they_are, assemble, warn_of_passed_over
from disam_peft.data.sources.samples import Samples
from disam_peft.data.sources.source_kinds import read_source
from disam_peft.data.splits import (
    check_no_leak,
    given_test_part,
    held_out_domains,
    require_two_classes,
    split_train_validation,
    without_test_part,
)
from disam_peft.errors import UserError
from disam_peft.experiments.split_data import SplitData, holding_out, require_splits, split_data


@dataclass(frozen=True)
class DataVerdict:
    """What ``train`` would say.

    Attributes:
        refusals: why it would stop before training; empty where it would not.
        warnings: what it would warn of.
        held_out: the domains that it would hold out, one run each; none where it holds nothing out.
        sizes: part of the split -> number of images, of the one run or, where each domain is held out in turn, of all
            domains together; empty where it would stop before the split.
    """

    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    held_out: tuple[str, ...]
    sizes: dict[str, int]


def look_at_data(recipe: Recipe) -> tuple[DataReport, DataVerdict]:
    """The census of the recipe's data as they are, and what training would say of them.

    Raises:
        UserError: the source cannot be read.
    """
    samples = read_source(recipe.data)
    whole = as_they_are(samples, recipe.data)
    findings = examine(whole)
    report = inspect(whole, findings=findings, without_images=samples.without_images)
    return report, judge_data(recipe, samples, dict(zip(whole.keys, findings, strict=True)))


def judge_data(recipe: Recipe, samples: Samples, findings: dict[str, CheckedFile]) -> DataVerdict:
    """Do what ``train`` does until it needs a model, and note what it says.

    Args:
        findings: of the data check, by the key of the sample.
    """
    refusals: list[str] = []
    held_out: list[str] = []
    sizes: dict[str, int] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = _loaded(recipe, samples, findings)
            require_two_classes(dataset)
            named = held_out_domains(recipe.protocol.held_out, dataset.present_domains)
            require_splits([holding_out(recipe, name) for name in named], dataset)
            held_out = [name for name in named if name]
            data = _split(recipe, dataset, held_out)
            sizes = {name: len(part) for name, part in data.source_parts().items()}
            if data.target is not None:
                sizes["held out"] = len(data.target)
                check_no_leak(data.sources, data.target)
            elif held_out:
                refusals += _leaks(dataset, held_out)
            check_duplicates(data.source_parts(), recipe.data.duplicates, target=data.target)
        except UserError as error:
            refusals.append(str(error))
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return DataVerdict(tuple(refusals), tuple(dict.fromkeys(said)), tuple(held_out), sizes)


def _loaded(recipe: Recipe, samples: Samples, findings: dict[str, CheckedFile]) -> DomainDataset:
    """What ``load`` gives, with findings that are there already."""
    warn_of_passed_over(samples)
    dataset = assemble(samples, recipe.data)
    found = [findings[key] for key in dataset.keys]
    if not recipe.data.verify:  # files are compared all the same, when they are read
        return replace(dataset, hashes=tuple(f.sha256 or key for f, key in zip(found, dataset.keys, strict=True)))
    return with_findings(dataset, found, skip_bad=recipe.data.skip_bad, remembered=False)


def _split(recipe: Recipe, dataset: DomainDataset, held_out: Sequence[str]) -> SplitData:
    """The split of the one run; where each domain is held out in turn, that of all domains. A domain is split in the
    same way whatever the other domains are."""
    if len(held_out) < 2:
        return split_data(holding_out(recipe, held_out[0] if held_out else None), dataset)
    training, validation = split_train_validation(dataset, recipe.protocol.validation_fraction, recipe.seed)
    return SplitData(without_test_part(dataset), training, validation, None, given_test_part(dataset))


def _leaks(dataset: DomainDataset, held_out: Sequence[str]) -> list[str]:
    """Which domains cannot be held out because their images are in other domains too; one message for all."""
    domains_of: dict[str, set[int]] = defaultdict(set)
    sources_of: dict[str, set[int]] = defaultdict(set)
    for i, digest in enumerate(dataset.hashes or ()):
        domain = int(dataset.domain_ids[i])
        domains_of[digest].add(domain)
        if dataset.given_parts is None or dataset.given_parts[i] != "test":
            sources_of[digest].add(domain)
    shared = [0] * len(dataset.domains)
    for digest, domains in domains_of.items():
        for domain in domains:
            shared[domain] += bool(sources_of[digest] - {domain})
    leaking = {name: count for name, count in zip(dataset.domains, shared, strict=True) if count and name in held_out}
    if not leaking:
        return []
    free = [name for name in held_out if name not in leaking]
    return [
        f"leak: these domains cannot be held out ({ALL}), because some of their images are in other domains too: "
        + ", ".join(f"{name} ({count})" for name, count in leaking.items())
        + "; remove the images from one side"
        + (f", or hold out one of {', '.join(free)}" if free else "")
    ]
