"""From a source to a dataset: classes and domains are numbered, samples are chosen and sorted, images are checked."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace

import numpy as np

from disam_peft.config.data import ClassPolicy, DataConfig
from disam_peft.config.names import same_but_for_case
from disam_peft.data.check import verified
from disam_peft.data.class_names import prompt_names, read_overrides, says_nothing
from disam_peft.data.dataset import DomainDataset, PixelPlan
from disam_peft.data.sources.folder_tree import NOT_REGULAR, OUTSIDE
from disam_peft.data.sources.samples import Samples, require_domains
from disam_peft.data.sources.source_kinds import read_source
from disam_peft.data.transforms.formats import looks_like_image, package_for
from disam_peft.errors import UserError


def load(config: DataConfig) -> DomainDataset:
    """The dataset of ``config``: classes and domains sorted, samples in a fixed order, and checked if ``verify`` is on.

    Raises:
        UserError: a source that is missing or laid out otherwise; a domain that is not there; classes that differ
            between domains; paths that leave the root; bad images.
    """
    samples = read_source(config)
    warn_of_passed_over(samples)
    dataset = assemble(samples, config)
    if config.verify:
        dataset = verified(dataset, skip_bad=config.skip_bad, again=config.verify == "full")
    if config.pixel_store is None:
        return dataset
    return replace(dataset, pixel_plan=PixelPlan(dataset, config.pixel_store))


def warn_of_passed_over(samples: Samples) -> None:
    """Say which files of a folder tree look like samples but are none, by kind: how many, where, and what would help.
    Files that nobody takes for images, such as notes and hidden files, are counted in ``ignored`` alone."""
    lines = []
    for kind, count in samples.ignored.items():
        if kind not in (OUTSIDE, NOT_REGULAR) and not looks_like_image(kind):
            continue
        folders = sorted(samples.ignored_in.get(kind, {}), key=lambda name: (-samples.ignored_in[kind][name], name))
        more = f" and {len(folders) - 2} other folders" if len(folders) > 3 else ""
        where = ", ".join(name or "the top folder" for name in folders[: 2 if more else 3])
        package = package_for(kind)
        advice = f" (install {package} to read them, or convert them)" if package else ""
        name = kind.replace("image", "images", 1) if kind == OUTSIDE and count > 1 else kind
        lines.append(f"{count} {name}" + (f" in {where}{more}" if where else "") + advice)
    if lines:
        warnings.warn(f"{samples.origin}: not used are {'; '.join(lines)}", stacklevel=3)


def assemble(samples: Samples, config: DataConfig) -> DomainDataset:
    """Number classes and domains, keep what ``domains`` and ``classes`` ask for, and sort the samples.

    Raises:
        UserError: as ``load``.
    """
    if samples.without_images and config.domains is None:
        raise UserError("\n".join(samples.without_images.values()))
    labels, domain_names = _normalised(samples)
    domains = _chosen_domains(domain_names, config.domains, samples.origin)
    _refuse_domain_twins(domains, samples.origin)
    present: dict[str, set[str]] = {name: set() for name in domains}
    for label, domain in zip(labels, domain_names, strict=True):
        if domain in present:
            present[domain].add(label)
    classes = agree(present, config.classes)
    overrides = read_overrides(config.class_names) if config.class_names is not None else None
    if overrides is None and all(map(says_nothing, classes)):
        kind = "codes" if any(any(map(str.isalpha, name)) for name in classes) else "bare numbers"
        warnings.warn(
            f"the classes of {samples.origin} are {kind} ({', '.join(classes[:5])}), and so are the prompts; "
            "if they stand for words, give data.class_names",
            stacklevel=3,
        )
    return _numbered(samples, domains, classes, prompt_names(classes, overrides), config)


def as_they_are(samples: Samples, config: DataConfig) -> DomainDataset:
    """Every sample, for a look at data that ``assemble`` may refuse: nothing is compared, and domains without an image
    keep their place."""
    labels, domain_names = _normalised(samples)
    found = {*domain_names, *samples.without_images}
    wanted = {unicodedata.normalize("NFC", name) for name in config.domains or found}
    domains = tuple(sorted(wanted if wanted <= found else found))
    classes = tuple(sorted(set(labels)))
    names: tuple[str, ...] = classes
    with suppress(UserError):
        names = prompt_names(classes, read_overrides(config.class_names) if config.class_names is not None else None)
    return _numbered(samples, domains, classes, names, config)


def _normalised(samples: Samples) -> tuple[list[str], list[str]]:
    """Labels and domains in one spelling of Unicode."""
    known = {name: unicodedata.normalize("NFC", name) for name in {*samples.labels, *samples.domains}}
    return [known[name] for name in samples.labels], [known[name] for name in samples.domains]


def _numbered(
    samples: Samples, domains: tuple[str, ...], classes: tuple[str, ...], names: tuple[str, ...], config: DataConfig
) -> DomainDataset:
    """The samples of these domains and classes, sorted by their names, not by the order in which a disk or a table
    lists them."""
    labels, domain_names = _normalised(samples)
    class_id = {name: i for i, name in enumerate(classes)}
    domain_id = {name: i for i, name in enumerate(domains)}
    kept = [i for i in range(len(labels)) if labels[i] in class_id and domain_names[i] in domain_id]
    kept.sort(key=lambda i: (domain_id[domain_names[i]], class_id[labels[i]], samples.keys[i]))
    return DomainDataset(
        images=samples.images,
        rows=np.asarray(kept, dtype=np.int64),
        labels=np.asarray([class_id[labels[i]] for i in kept], dtype=np.int64),
        domain_ids=np.asarray([domain_id[domain_names[i]] for i in kept], dtype=np.int64),
        keys=tuple(samples.keys[i] for i in kept),
        classes=classes,
        prompt_names=names,
        domains=domains,
        origin=samples.origin,
        base=samples.base,
        max_pixels=config.max_pixels,
        given_parts=None if samples.given_parts is None else tuple(samples.given_parts[i] for i in kept),
        ignored=samples.ignored,
        ignored_in=samples.ignored_in,
    )


def _chosen_domains(found: Iterable[str], wanted: Iterable[str] | None, origin: str) -> tuple[str, ...]:
    known = sorted(set(found))
    if wanted is None:
        return tuple(known)
    names = [unicodedata.normalize("NFC", name) for name in wanted]
    require_domains(names, known, origin)
    return tuple(sorted(set(names)))


def agree(present: Mapping[str, set[str]], policy: ClassPolicy) -> tuple[str, ...]:
    """The sorted classes that the domains agree on.

    Args:
        present: domain -> the classes that have images there.

    Raises:
        UserError: names that differ only in case; different classes under "identical"; nothing in common.
    """
    everything = sorted(set().union(*present.values()))
    _refuse_case_twins(everything, present)
    if policy == "union":
        return tuple(everything)
    common = sorted(set(everything).intersection(*present.values()))
    if policy == "intersection":
        if not common:
            raise UserError(
                f"the domains {', '.join(present)} have no class in common; check the folder names, "
                "or keep every class with data.classes=union"
            )
        return tuple(common)
    if len(common) < len(everything):
        lines = [
            f"  {domain} lacks {_some(sorted(set(everything) - names))}"
            for domain, names in present.items()
            if len(names) < len(everything)
        ]
        raise UserError(
            f"the domains have different classes ({len(common)} of {len(everything)} are in all of them):\n"
            + "\n".join(lines)
            + "\nadd what is missing, or choose data.classes=intersection (common classes) or data.classes=union (all)"
        )
    return tuple(everything)


def _refuse_case_twins(names: Iterable[str], present: Mapping[str, set[str]]) -> None:
    for group in same_but_for_case(names):
        where = "; ".join(
            f"{name!r} in {', '.join(d for d, classes in present.items() if name in classes)}" for name in group
        )
        raise UserError(f"classes that differ only in case or spaces, likely the same class: {where}; rename one")


def _refuse_domain_twins(domains: Iterable[str], origin: str) -> None:
    for group in same_but_for_case(domains):
        raise UserError(
            f"domains of {origin} that differ only in case or spaces, likely the same domain: "
            f"{', '.join(map(repr, group))}; rename one, or choose among them with data.domains"
        )


def _some(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
