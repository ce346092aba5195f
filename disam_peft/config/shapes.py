"""Which images of DomainShapes are painted, and which faults studies give them on purpose."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field, model_validator

from disam_peft.config.base import Config
from disam_peft.errors import did_you_mean

CLASSES: Final = (
    *("arrow", "circle", "crescent", "cross", "diamond", "heart"),
    *("hexagon", "house", "ring", "square", "star", "triangle"),
)
DOMAINS: Final = ("blueprint", "cartoon", "painting", "photo", "silhouette", "sketch")

FAULTS: Final = ("wrong_domains", "wrong_labels", "spurious_color", "negatives")
"""Settings that leave out the target."""
NEGATIVE: Final = "-negative"
"""What the name of a domain with negative colours ends with."""
Count = Annotated[int, Field(ge=1)]


class OverlapConfig(Config):
    """Two domains whose styles are blended with one another."""

    first: str
    second: str
    share: float = Field(gt=0, le=1)
    """How far they are blended. At 1 both domains draw from the same style, halfway between their own."""


class ShapesConfig(Config):
    """Number and seed of the images of DomainShapes, and the faults among them.

    Wrong class labels, wrong domain labels, the spurious colour and negatives leave out the ``target``, the domain that
    will be held out.
    """

    images_per_class: Count = 20
    """Number of images of each class in each domain."""
    per_domain: dict[str, Count] = Field(default={})
    """Domain -> number of images of each of its classes, for domains with another number than ``images_per_class``."""
    seed: int = Field(default=0, ge=0)
    """Seed of the images and of the faults."""
    split: str = Field(default="train", pattern=r"^[\w-]+$")
    """Images of different splits are different; the name may be any word."""
    target: str | None = None
    """The domain that the faults below leave alone."""
    wrong_domains: float = Field(default=0, ge=0, le=1)
    """Share of the images outside the target that carry the name of another domain than their own (not the target)."""
    wrong_labels: float = Field(default=0, ge=0, le=1)
    """Share of the images outside the target that carry another class than their own."""
    spurious_color: float = Field(default=0, ge=0, le=1)
    """Share of the images outside the target whose object has the colour of its class. In the target the object has
    the colour of some class, drawn at random, so that the same colours occur in every domain. 0: colours say nothing
    about the class."""
    noise: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default={})
    """Domain -> strength of the noise on its images, which makes it a hard domain: a random number is added to each
    colour value, up to so much of the whole range."""
    negatives: bool = False
    """Whether every second image outside the target has negative colours, and a domain of its own: ``photo`` becomes
    ``photo`` and ``photo-negative``. Twice as many domains on as many images."""
    overlap: OverlapConfig | None = None
    """Two domains whose styles are blended. Unset: none."""

    @model_validator(mode="after")
    def _consistent(self) -> ShapesConfig:
        named = [*self.per_domain, *self.noise, *([self.target] if self.target is not None else [])]
        if self.overlap is not None:
            named += [self.overlap.first, self.overlap.second]
            if self.overlap.first == self.overlap.second:
                raise ValueError(f"overlap of {self.overlap.first!r} with itself; name two domains")
        for name in named:
            if name not in DOMAINS:
                known = ", ".join(DOMAINS)
                raise ValueError(f"no domain {name!r} in DomainShapes{did_you_mean(name, DOMAINS)} (domains: {known})")
        faults = [name for name in FAULTS if getattr(self, name)]
        if faults and self.target is None:
            raise ValueError(
                f"{', '.join(faults)} needs target, the domain to be held out: its images and labels must stay as they "
                f"are, or they measure nothing (domains: {', '.join(DOMAINS)})"
            )
        return self

    def count(self, domain: str) -> int:
        """Number of images of each class in ``domain``."""
        return self.per_domain.get(domain, self.images_per_class)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the domains that it can have."""
        if not self.negatives:
            return DOMAINS
        return tuple(sorted([*DOMAINS, *(f"{domain}{NEGATIVE}" for domain in DOMAINS if domain != self.target)]))

    @property
    def total(self) -> int:
        """Number of all images."""
        return len(CLASSES) * sum(self.count(domain) for domain in DOMAINS)
