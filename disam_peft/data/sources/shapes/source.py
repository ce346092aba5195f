"""DomainShapes as a source of samples, and as a tree of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disam_peft.common.progress import track
from disam_peft.config.shapes import CLASSES, DOMAINS, NEGATIVE, ShapesConfig
from disam_peft.data.sources.samples import Samples, require_domains
from disam_peft.data.sources.shapes.raster import HUES, SIZE, Draws
from disam_peft.data.sources.shapes.scene import draw_scene, paint
from disam_peft.data.sources.shapes.styles import STYLES, Style, blended
from disam_peft.errors import UserError

_MILLION = 1_000_000
_WHOLE = 1024  # of a share, so that noise is computed in whole numbers


@dataclass(frozen=True)
class ShapeSample:
    """One image that is to be painted, with its labels."""

    domain: str
    class_name: str
    index: int
    domain_label: str
    """The domain that it is labelled with: its own or that of negatives, except for the share ``wrong_domains``."""
    label: str
    """The class that it is labelled with: its own, except for the share ``wrong_labels``."""

    @property
    def key(self) -> str:
        """Its true domain and class and its number, so that a split does not depend on wrong labels."""
        return f"{self.domain}/{self.class_name}/{self.index:05d}"


def list_shapes(config: ShapesConfig, domains: Sequence[str] | None = None) -> list[ShapeSample]:
    """Every sample of ``config``, unpainted, or those of ``domains`` (by their labels)."""
    samples = [
        _labelled(config, domain, name, index)
        for domain in DOMAINS
        for name in CLASSES
        for index in range(config.count(domain))
    ]
    return [sample for sample in samples if domains is None or sample.domain_label in domains]


def paint_shape(config: ShapesConfig, domain: str, class_name: str, index: int) -> np.ndarray:
    """(64, 64, 3) uint8; a pure function of the config's seed, split and faults and of the rest."""
    scene = draw_scene(
        config.seed,
        config.split,
        domain,
        class_name,
        index,
        style=_style(config, domain),
        hue=object_hue(config, domain, class_name, index),
    )
    picture = paint(scene)
    if strength := config.noise.get(domain, 0):
        draws = Draws("noise", config.seed, config.split, domain, class_name, index)
        noisy = picture.astype(np.int32) + draws.noise(*picture.shape) * round(strength * _WHOLE) // (_WHOLE // 2)
        picture = noisy.clip(0, 255).astype(np.uint8)
    return 255 - picture if _is_negative(config, domain, index) else picture


def read_shapes(config: ShapesConfig, domains: Sequence[str] | None = None) -> Samples:
    """The images of ``config``, or of these domains, painted into memory (12 KB each).

    Raises:
        UserError: a domain that DomainShapes has not got.
    """
    import datasets

    origin = f"DomainShapes (seed {config.seed}, {config.split})"
    if domains is not None:
        require_domains(domains, config.domains, origin)
    samples = list_shapes(config, domains)
    # As plain pixels: how a compressed file looks depends on the version of the library that wrote it.
    files = [{"bytes": to_ppm(picture), "path": f"{sample.key}.ppm"} for sample, picture in _painted(config, samples)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return Samples(
        images=datasets.Dataset.from_dict({"image": files}, features=features),
        labels=[sample.label for sample in samples],
        domains=[sample.domain_label for sample in samples],
        keys=[sample.key for sample in samples],
        origin=origin,
    )


def write_shapes(config: ShapesConfig, root: Path) -> int:
    """Write ``root/<domain>/<class>/<true domain>-<true class>-<index>.png``; returns the number of files.

    Folders follow the labels, so that ``data.root`` reads what ``data.shapes`` would give.

    Raises:
        UserError: ``root`` holds something already.
    """
    from PIL import Image

    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not an empty folder; name a new one, images are not mixed with other files")
    samples = list_shapes(config)
    for sample, picture in _painted(config, samples):
        folder = root / sample.domain_label / sample.label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{sample.key.replace('/', '-')}.png")
    return len(samples)


def to_ppm(picture: np.ndarray) -> bytes:
    """A picture as a file of the simplest kind, the same bytes everywhere."""
    return b"P6\n%d %d\n255\n" % (SIZE, SIZE) + picture.tobytes()


def _painted(config: ShapesConfig, samples: Sequence[ShapeSample]) -> Iterator[tuple[ShapeSample, np.ndarray]]:
    for sample in track(samples, "painting DomainShapes", total=len(samples)):
        yield sample, paint_shape(config, sample.domain, sample.class_name, sample.index)


def _labelled(config: ShapesConfig, domain: str, class_name: str, index: int) -> ShapeSample:
    domain_label, label = f"{domain}{NEGATIVE}" if _is_negative(config, domain, index) else domain, class_name
    if domain != config.target:
        draws = Draws("faults", config.seed, config.split, domain, class_name, index)
        # Drawn in any case and then compared, so that a larger share changes the same samples and some more.
        domain_chance, label_chance = draws.below(_MILLION), draws.below(_MILLION)
        other_domain = _other(DOMAINS, (domain, config.target), draws)
        other_label = _other(CLASSES, (class_name,), draws)
        if domain_chance < config.wrong_domains * _MILLION:
            domain_label = other_domain
        if label_chance < config.wrong_labels * _MILLION:
            label = other_label
    return ShapeSample(domain, class_name, index, domain_label, label)


def _is_negative(config: ShapesConfig, domain: str, index: int) -> bool:
    return config.negatives and domain != config.target and index % 2 == 1


def _other(names: Sequence[str], taken: Sequence[str | None], draws: Draws) -> str:
    free = [name for name in names if name not in taken]
    return free[draws.below(len(free))]


def _style(config: ShapesConfig, domain: str) -> Style:
    overlap = config.overlap
    if overlap is None or domain not in (overlap.first, overlap.second):
        return STYLES[domain]
    other = overlap.second if domain == overlap.first else overlap.first
    return blended(STYLES[domain], STYLES[other], overlap.share / 2)


def object_hue(config: ShapesConfig, domain: str, class_name: str, index: int) -> int | None:
    """The object's colour where colours are spurious; None: a random colour."""
    if config.spurious_color == 0:
        return None
    draws = Draws("colour", config.seed, config.split, domain, class_name, index)
    chance, anyone = draws.below(_MILLION), draws.below(len(CLASSES))
    holds = domain != config.target and chance < config.spurious_color * _MILLION
    place = CLASSES.index(class_name) if holds else anyone
    width = HUES // len(CLASSES)
    return place * width + draws.below(width // 2)
