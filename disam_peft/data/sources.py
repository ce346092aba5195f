"""Where the samples come from, and how the four kinds of source become one DomainDataset."""

from __future__ import annotations

import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from disam_peft.config import Config
from disam_peft.data.archives import is_archive, unpacked
from disam_peft.data.classnames import prompt_names, read_overrides
from disam_peft.data.samples import require_domains
from disam_peft.data.shapes.config import ShapesConfig
from disam_peft.errors import UserError

if TYPE_CHECKING:
    from disam_peft.data.dataset import DomainDataset
    from disam_peft.data.samples import Samples

ClassPolicy = Literal["identical", "intersection", "union"]

_COLUMNS = frozenset({"image_column", "label_column", "domain_column", "image_root"})
_HUB_ONLY = frozenset({"split", "config_name"})
_ARCHIVE_ONLY = frozenset({"max_archive_gb", "max_archive_files"})


class DataConfig(Config):
    """One source of images, exactly one of ``root``, ``table``, ``hub`` and ``shapes``, and what may be done to it."""

    root: Path | None = None
    """A folder tree ``root/<domain>/<class>/*.jpg``, or a .zip, .tar, .tar.gz, .tar.xz or .tar.bz2 of one."""
    table: Path | None = None
    """A CSV, TSV or Parquet file with a row per image."""
    hub: str | None = None
    """A Hugging Face dataset: a hub id, a local folder, a ``save_to_disk`` folder or a Parquet file."""
    shapes: ShapesConfig | None = None
    """DomainShapes, the benchmark that is painted on demand; ``{}`` for all of its defaults."""
    split: str | None = None
    """Which split of ``hub``; may be left out where there is only one."""
    config_name: str | None = None
    """Which configuration of ``hub``, where it has several."""
    image_column: str = "image"
    """Column of ``table`` or ``hub`` that holds the images: paths, or the image files themselves."""
    label_column: str = "label"
    """Column with the class: a name, or a number with names (ClassLabel)."""
    domain_column: str = "domain"
    """Column with the domain: a name, or a number with names (ClassLabel)."""
    image_root: Path | None = None
    """The folder that paths in ``image_column`` start from and must not leave. Unset: the table's own folder."""
    domains: list[str] | None = Field(default=None, min_length=1)
    """Use these domains only. Unset: all."""
    classes: ClassPolicy = "identical"
    """What to do where domains have different classes: refuse, keep the common ones, or keep all."""
    class_names: Path | None = None
    """YAML or JSON file: class as in the source -> its name in a prompt."""
    max_pixels: int = Field(default=100_000_000, gt=0, le=178_956_970)
    """Largest width times height of an image. The upper bound is where Pillow refuses by itself."""
    verify: bool = True
    """Decode every image once before training (remembered between runs). False: trust the files."""
    skip_bad: bool = False
    """Leave out and record images that cannot be decoded, at most 1 %. False: they are an error."""
    max_archive_gb: float = Field(default=50.0, gt=0)
    """Of an archive, the most that it may hold unpacked, in 10^9 bytes."""
    max_archive_files: int = Field(default=1_000_000, ge=1)
    """Of an archive, the most members that it may have."""
    pixel_store: Literal["auto"] | Annotated[int, Field(strict=True, ge=8, le=4096)] | None = None
    """Train on images that were decoded once and squeezed into squares of this side; ``auto``: 8/7 of the model's
    input. Much faster where images are large; a little less sharp, and beyond 2:1 without their ends. Unset: every
    image is decoded anew each time. Evaluation always decodes."""

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        given = [name for name in ("root", "table", "hub", "shapes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of root, table, hub and shapes is needed, got {' and '.join(given) or 'none of them'}; "
                "for example data.root=FOLDER with FOLDER/<domain>/<class>/*.jpg"
            )
        unused = self.model_fields_set & (_HUB_ONLY if given != ["hub"] else set())
        unused |= self.model_fields_set & (_COLUMNS if given in (["root"], ["shapes"]) else set())
        if self.root is None or not is_archive(self.root):
            unused |= self.model_fields_set & _ARCHIVE_ONLY
        if unused:
            kind = f"data.{given[0]}" + (" that is no archive" if unused & _ARCHIVE_ONLY else "")
            raise ValueError(f"{', '.join(sorted(unused))} has no meaning with {kind}; remove it")
        if self.skip_bad and not self.verify:
            raise ValueError("skip_bad needs verify: without the check no bad image is found; set verify to true")
        return self


def load(config: DataConfig) -> DomainDataset:
    """The dataset of ``config``: classes and domains sorted, samples in a fixed order, checked if ``verify`` says so.

    To look at data as they are (the census of ``check-data``), load with ``verify`` off and ``classes`` "union".

    Raises:
        UserError: a source that is missing or laid out otherwise; a domain that is not there; classes that differ
            between domains; paths that leave the root; bad images.
    """
    if config.root is not None:
        samples = _read_root(config.root, config)
    elif config.table is not None:
        from disam_peft.data.tables import read_table

        samples = read_table(config.table, config)
    elif config.hub is not None:
        from disam_peft.data.hub import read_hub

        samples = read_hub(config.hub, config)
    elif config.shapes is not None:
        from disam_peft.data.shapes.source import read_shapes

        samples = read_shapes(config.shapes, config.domains)
    else:
        raise UserError("no data: set one of data.root, data.table, data.hub and data.shapes")
    dataset = assemble(samples, config)
    if config.verify:
        from disam_peft.data.check import verified

        dataset = verified(dataset, skip_bad=config.skip_bad)
    if config.pixel_store is None:
        return dataset
    from disam_peft.data.dataset import PixelPlan

    return replace(dataset, pixel_plan=PixelPlan(dataset, config.pixel_store))


def _read_root(root: Path, config: DataConfig) -> Samples:
    from disam_peft.data.folders import read_folders

    if not (is_archive(root) and root.is_file()):
        return read_folders(root, config.domains)
    folder = unpacked(root, max_gb=config.max_archive_gb, max_files=config.max_archive_files)
    return replace(read_folders(folder, config.domains), origin=str(root))


def assemble(samples: Samples, config: DataConfig) -> DomainDataset:
    """Number classes and domains, keep what ``domains`` and ``classes`` ask for, and sort the samples.

    Raises:
        UserError: as ``load``.
    """
    import numpy as np

    from disam_peft.data.dataset import DomainDataset

    labels = [unicodedata.normalize("NFC", name) for name in samples.labels]
    domain_names = [unicodedata.normalize("NFC", name) for name in samples.domains]
    domains = _chosen_domains(domain_names, config.domains, samples.origin)
    present: dict[str, set[str]] = {name: set() for name in domains}
    for label, domain in zip(labels, domain_names, strict=True):
        if domain in present:
            present[domain].add(label)
    classes = agree(present, config.classes)
    class_id = {name: i for i, name in enumerate(classes)}
    domain_id = {name: i for i, name in enumerate(domains)}
    overrides = read_overrides(config.class_names) if config.class_names is not None else None
    if overrides is None and all(name.isdecimal() for name in classes):
        warnings.warn(
            f"the classes of {samples.origin} are bare numbers ({', '.join(classes[:5])}), and so are the prompts; "
            "if they stand for words, give data.class_names",
            stacklevel=3,
        )
    kept = [i for i in range(len(labels)) if labels[i] in class_id and domain_names[i] in domain_id]
    # Sorted by content of the source, not by the order in which a disk or a table lists it.
    kept.sort(key=lambda i: (domain_id[domain_names[i]], class_id[labels[i]], samples.keys[i]))
    return DomainDataset(
        images=samples.images,
        rows=np.asarray(kept, dtype=np.int64),
        labels=np.asarray([class_id[labels[i]] for i in kept], dtype=np.int64),
        domain_ids=np.asarray([domain_id[domain_names[i]] for i in kept], dtype=np.int64),
        keys=tuple(samples.keys[i] for i in kept),
        classes=classes,
        prompt_names=prompt_names(classes, overrides),
        domains=domains,
        origin=samples.origin,
        base=samples.base,
        max_pixels=config.max_pixels,
        ignored=samples.ignored,
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
                "or set data.classes to union"
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
            + "\nadd what is missing, or set data.classes to intersection (common classes) or union (all)"
        )
    return tuple(everything)


def _refuse_case_twins(names: Iterable[str], present: Mapping[str, set[str]]) -> None:
    twins: dict[str, list[str]] = defaultdict(list)
    for name in names:
        twins[name.casefold()].append(name)
    for group in twins.values():
        if len(group) > 1:
            where = "; ".join(
                f"{name!r} in {', '.join(d for d, classes in present.items() if name in classes)}" for name in group
            )
            raise UserError(f"classes that differ only in case, likely the same class: {where}; rename one")


def _some(names: list[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
