"""What the configs of several adapters have in common. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from disam_peft.config.base import Config

Seed = Annotated[int, Field(ge=0, lt=2**63)]

LARGEST_OPTION = 1e9
"""Beyond it, a factor of an adapter makes every feature overflow. Such a number is a mistake or a trap."""


class CosineConfig(Config):
    """Adapters whose logits are CLIP's, scaled cosines."""

    logit_scale: Literal["frozen", "trained"] = "frozen"
    """The factor of the cosines, and the constant that SigLIP adds to them: those of the backbone, or trained with the
    adapter, as contrastive and sigmoid losses do (FLYP, arXiv 2212.00638; SigLIP, arXiv 2303.15343). The scale stays at
    100 at most, or at what the backbone has where that is more."""


class LastBlocks(Config):
    """The last blocks of a tower, e.g. ``{last: 4}``."""

    last: int = Field(ge=1)


BlockIndex = Annotated[int, Field(ge=0)]
Blocks = Literal["all"] | LastBlocks | Annotated[list[BlockIndex], Field(min_length=1)]
