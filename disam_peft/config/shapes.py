"""What DomainShapes is to contain, and the faults that studies give it on purpose."""

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

Count = Annotated[int, Field(ge=1)]


class OverlapConfig(Config):
    """Two domains whose styles run into each other."""

    first: str
    second: str
    share: float = Field(gt=0, le=1)
    """How far: at 1 both draw from the same, middle style."""


class ShapesConfig(Config):
    """Which images of DomainShapes, and what is wrong with them.

    Label noise, wrong domain labels and the spurious colour spare the ``target``: the domain that will be held out.
    """

    images_per_class: Count = 20
    """Images of each class in each domain."""
    per_domain: dict[str, Count] = Field(default={})
    """Domain -> images of each of its classes, where another number than ``images_per_class``."""
    seed: int = Field(default=0, ge=0)
    """Of the images and of the faults."""
    split: str = Field(default="train", pattern=r"^[\w-]+$")
    """Images of different splits are different; the name may be any word."""
    target: str | None = None
    """The domain that the faults below leave alone."""
    wrong_domains: float = Field(default=0, ge=0, le=1)
    """Share of the images outside the target that carry the name of another domain than their own (not the target)."""
    wrong_labels: float = Field(default=0, ge=0, le=1)
    """Share of the images outside the target that carry another class than their own."""
    spurious_color: float = Field(default=0, ge=0, le=1)
    """Share of the images outside the target whose object has the colour of its class; in the target, the colour of
    some class, whichever. The colours then show in every domain. 0: any colour anywhere."""
    overlap: OverlapConfig | None = None
    """Two domains whose styles are blended. Unset: none."""

    @model_validator(mode="after")
    def _consistent(self) -> ShapesConfig:
        named = [*self.per_domain, *([self.target] if self.target is not None else [])]
        if self.overlap is not None:
            named += [self.overlap.first, self.overlap.second]
            if self.overlap.first == self.overlap.second:
                raise ValueError(f"overlap of {self.overlap.first!r} with itself; name two domains")
        for name in named:
            if name not in DOMAINS:
                known = ", ".join(DOMAINS)
                raise ValueError(f"no domain {name!r} in DomainShapes{did_you_mean(name, DOMAINS)} (domains: {known})")
        faults = [name for name in ("wrong_domains", "wrong_labels", "spurious_color") if getattr(self, name) > 0]
        if faults and self.target is None:
            raise ValueError(
                f"{', '.join(faults)} needs target, the domain to be held out: its images and labels must stay as they "
                f"are, or they measure nothing (domains: {', '.join(DOMAINS)})"
            )
        return self

    def count(self, domain: str) -> int:
        """Images of each class in ``domain``."""
        return self.per_domain.get(domain, self.images_per_class)

    @property
    def total(self) -> int:
        """Number of images."""
        return len(CLASSES) * sum(self.count(domain) for domain in DOMAINS)
