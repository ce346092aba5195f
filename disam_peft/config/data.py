"""Where the images come from, how they are varied, what is stored of them, and what their domains are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from disam_peft.config.base import Config
from disam_peft.config.shapes import ShapesConfig
from disam_peft.errors import UserError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


ClassPolicy = Literal["identical", "intersection", "union"]
DuplicatePolicy = Literal["warn", "error", "ignore"]

_COLUMNS = frozenset({"image_column", "label_column", "domain_column", "split_column", "image_root", "given_splits"})
_ARCHIVES = frozenset({"max_archive_gb", "max_archive_files"})
SOURCE_SETTINGS: Final = {
    "root": _ARCHIVES | {"given_splits"},
    "table": _COLUMNS,
    "json_lines": _COLUMNS,
    "hub": _COLUMNS | {"split", "config_name"},
    "shapes": frozenset[str](),
}
"""Every setting that names a source -> the settings of ``DataConfig`` that say how it is read. A setting that stands
here for other sources only may not be given."""

SOURCE_OF_SUFFIX: Final = {".csv": "table", ".tsv": "table", ".parquet": "table", ".jsonl": "json_lines"}
"""Suffix of a file -> the setting that names it as a source. Every other path is a ``root``."""


class DataConfig(Config):
    """One source of images, which is exactly one of the settings of ``SOURCE_SETTINGS``, and what is done to it."""

    root: Path | None = None
    """A folder tree ``root/<domain>/<class>/*.jpg``, or a .zip, .tar, .tar.gz, .tar.xz or .tar.bz2 of one. A level of
    folders called train, val and test is read as ``given_splits``; ``root/<class>/*.jpg`` has one unnamed domain."""
    table: Path | None = None
    """A CSV, TSV or Parquet file with a row per image."""
    json_lines: Path | None = None
    """A text file with one JSON object per line, one for each image."""
    hub: str | None = None
    """A Hugging Face dataset: a hub id, a local folder, a ``save_to_disk`` folder or a Parquet file."""
    shapes: ShapesConfig | None = None
    """DomainShapes, the benchmark that is painted on demand; ``{}`` for all of its defaults."""
    split: str | None = None
    """Which split of ``hub``, if not all of them are to be used; see ``given_splits``."""
    config_name: str | None = None
    """Which configuration of ``hub``, where it has several."""
    image_column: str = "image"
    """Column of ``table`` or ``hub`` with the images, as paths or image files; in ``json_lines``, key with the path."""
    label_column: str = "label"
    """Column with the class: a name, or a number with names (ClassLabel)."""
    domain_column: str = "domain"
    """Column with the domain: a name, or a number with names (ClassLabel). Where this is not set and there is no column
    ``domain``, all samples are one unnamed domain."""
    split_column: str | None = None
    """Column that says of each sample whether it is for train, validation (val, valid, dev) or test. Unset: a column
    called split, partition, subset or set that says nothing else."""
    given_splits: Literal["auto", "ignore"] = "auto"
    """``auto``: where folders, a column or the splits of a hub data set say which samples are for training, validation
    and test, the sources train and validate by these parts, and the test part is judged. ``ignore``: such names are
    names of domains or classes like any other, and a column of splits is not read."""
    image_root: Path | None = None
    """The folder that paths of images start from and must not leave. Unset: the folder of the table."""
    domains: list[str] | None = Field(default=None, min_length=1)
    """Use these domains only. Unset: all."""
    classes: ClassPolicy = "identical"
    """What to do where domains have different classes: refuse, keep the common ones, or keep all."""
    class_names: Path | None = None
    """YAML or JSON file: class as in the source -> its name in a prompt."""
    max_pixels: int = Field(default=100_000_000, gt=0, le=178_956_970)
    """Largest width times height of an image. The upper bound is where Pillow refuses by itself."""
    verify: bool | Literal["full"] = True
    """Read, hash and decode every image once before training. What was found is remembered between runs, as long as no
    size, time of change or inode of a file is new. ``full``: read all files again. False: trust the files."""
    skip_bad: bool = False
    """Leave out and record images that cannot be decoded, at most 1 %. False: they are an error."""
    duplicates: DuplicatePolicy = "warn"
    """What to do where the same image, by content, is in training and in validation, or has several classes. An image
    of the held-out domain that is also in a source is always an error."""
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
        given = [name for name in SOURCE_SETTINGS if getattr(self, name) is not None]
        if len(given) != 1:
            *most, last = SOURCE_SETTINGS
            raise ValueError(
                f"exactly one of {', '.join(most)} and {last} is needed, got {' and '.join(given) or 'none of them'}; "
                "for example data.root=FOLDER with FOLDER/<domain>/<class>/*.jpg"
            )
        used = SOURCE_SETTINGS[given[0]]
        if self.root is not None and not is_archive(self.root):
            used -= _ARCHIVES
        unused = self.model_fields_set & (frozenset().union(*SOURCE_SETTINGS.values()) - used)
        if unused:
            kind = f"data.{given[0]}" + (" that is no archive" if unused & _ARCHIVES else "")
            raise ValueError(f"{', '.join(sorted(unused))} has no meaning with {kind}; remove it")
        if self.skip_bad and not self.verify:
            raise ValueError("skip_bad needs verify: without the check no bad image is found; set verify to true")
        return self

    @property
    def source(self) -> str:
        """The one setting that names the source: ``root``, ``table``, ..."""
        return next(name for name in SOURCE_SETTINGS if getattr(self, name) is not None)


class MixupConfig(Config):
    """Mixup between domains, as in DomainBed (Gulrajani and Lopez-Paz 2021, arXiv 2007.01434): every image is mixed
    with one of another domain, and its loss is that of both classes, by their shares. The domain of a mixture is that
    of its larger share."""

    alpha: float = Field(default=0.2, gt=0)
    """The shares are drawn from Beta(alpha, alpha): the smaller it is, the more has one of the two images. 0.2 is
    DomainBed's; it searches 0.1 to 10."""
    of: Literal["images", "features"] = "images"
    """``images``: pixels are mixed. ``features``: outputs of the frozen part of the image tower (manifold mixup, Verma
    et al. 2019, arXiv 1806.05236), which needs ``features.store``, where there are no pixels to mix."""


class AugmentConfig(Config):
    """How training images are varied. The defaults are the DomainBed recipe (Gulrajani and Lopez-Paz, 2021)."""

    kind: Literal["standard", "none"] = "standard"
    """``standard``: random resized crop, flip, colour jitter, grey. ``none``: resize and centre crop, no randomness;
    the fields about them then have no meaning and may not be set."""
    scale: tuple[float, float] = (0.7, 1.0)
    """Smallest and largest share of the image's area that the random crop covers."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip; 0 turns it off (letters, left and right hands)."""
    color_jitter: float = Field(default=0.3, ge=0, le=0.5)
    """Brightness, contrast and saturation are scaled by 1 plus or minus this; hue is turned by up to this share of
    the circle. 0 turns it off."""
    grayscale: float = Field(default=0.1, ge=0, le=1)
    """Probability of a grey image; 0 turns it off."""
    mixup: MixupConfig | None = None
    """Mix images of different domains; ``{}`` for DomainBed's settings. It has its meaning with either kind. Unset: no
    mixing."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentConfig:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"scale={list(self.scale)} must be two shares of the area, 0 < low <= high <= 1")
        unused = sorted(self.model_fields_set - {"kind", "mixup"})
        if self.kind == "none" and unused:
            raise ValueError(f"{', '.join(unused)} has no effect with kind 'none'; remove it or use 'standard'")
        return self


class FeatureConfig(Config):
    """Whether the frozen part of the image tower runs once per image and run, or once per *data set*."""

    store: bool = False
    """Keep its output on disk and train from there: exact, and the images are touched once."""
    views: int | None = Field(default=None, ge=1)
    """Augmented versions of each training image in the store, used in turn epoch by epoch. Must be chosen where images
    are augmented; without augmentation there is one."""
    folder: Path | None = None
    """Of all stores; unset: the package's cache."""


def require_mixable(augment: AugmentConfig, features: FeatureConfig, loss_kind: str = "cross_entropy") -> None:
    """Pass if what is to be mixed is what training reads, and the loss is one of mixtures.

    Raises:
        UserError: images, where training reads features, or the other way round; the contrastive loss.
    """
    if augment.mixup is None:
        return
    if loss_kind == "contrastive":
        raise UserError(
            "augment.mixup makes images of two classes, and the contrastive loss compares each image with one caption; "
            "leave out augment.mixup, or choose another objective.loss.kind"
        )
    if features.store and augment.mixup.of == "images":
        raise UserError(
            "augment.mixup mixes images, but with features.store training reads none; set augment.mixup.of=features to "
            "mix what the frozen part made of them, which is another method, or features.store=false"
        )
    if not features.store and augment.mixup.of == "features":
        raise UserError(
            "augment.mixup.of=features mixes stored outputs of the frozen part, and features.store is off; set "
            "features.store=true, or augment.mixup.of=images"
        )


class DomainsConfig(Config):
    """Where the domains of training images come from. What is inferred is for training only: the split, the choice of
    a checkpoint and every evaluation keep the domains of the data, and the held-out domain is never looked at."""

    infer: Literal["none", "kmeans", "prompts"] = "none"
    """``none``: the domains of the data. ``kmeans``: clusters of image features. ``prompts``: the nearest of some
    sentences about styles."""
    k: int | None = Field(default=None, ge=2)
    """Number of clusters, for ``kmeans``."""
    prompts: dict[str, str] | None = Field(default=None, min_length=2)
    """Domain -> a sentence about its images, for ``prompts``, e.g. ``{photo: a photo, sketch: a sketch}``."""

    @model_validator(mode="after")
    def _consistent(self) -> DomainsConfig:
        needed = {"kmeans": "k", "prompts": "prompts"}
        for way, name in needed.items():
            given = getattr(self, name) is not None
            if given and self.infer != way:
                raise ValueError(f"{name} has no meaning with infer {self.infer!r}; remove it or use {way!r}")
            if not given and self.infer == way:
                raise ValueError(f"infer {way!r} needs {name}")
        return self
