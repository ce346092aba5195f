"""A study file: one recipe, varied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from disam_peft.config.base import Config

Overrides = dict[str, Any]
Seed = Annotated[int, Field(ge=0)]
PRESETS = ("erm", "erm_2x", "sam", "disam")
"""Arms that need no overrides."""


class Study(Config):
    """What a study file may say. Overrides are dotted keys of the recipe: ``{method.name: sam, train.steps: 300}``."""

    question: str = ""
    """One sentence."""
    recipe: Path | dict[str, Any]
    """The recipe that is varied, or its file, from the study's folder on. ``name`` and ``output`` may be left out."""
    arms: list[str] | dict[str, Overrides | None] = Field(default=list(PRESETS), min_length=2)
    """What is compared: name -> overrides. ``erm``, ``erm_2x``, ``sam`` and ``disam`` need none: ``erm_2x`` is ERM at
    twice the steps, with warm-up and schedule stretched, so that it computes as much as SAM and DISAM."""
    conditions: dict[str, Overrides] = Field(default={"": {}}, min_length=1)
    """Under what they are compared: name -> overrides, crossed with the arms."""
    held_out: str | list[str] | None = Field(default=None, min_length=1)
    """Domains to hold out, or ``all``. Unset: what the recipe says."""
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[Seed], Field(min_length=1)] = 5
    """How many, from 0 on, or which."""
    data_seed: Literal["seed", "recipe"] = "seed"
    """Seed of DomainShapes: ``seed`` paints other images for every seed, so that seeds are independent samples of the
    benchmark; ``recipe`` keeps the recipe's. Of no effect on other data."""
    baseline: str | None = None
    """The arm that every other is compared with. Unset: the first."""
    comparisons: list[tuple[str, str]] | None = Field(default=None, min_length=1)
    """Pairs of arms. Unset: every arm with the baseline, and disam with sam and erm_2x."""
    metric: str | list[str] = Field(default="top1", min_length=1)
    """What is compared, one or several; each is a family of tests of its own."""
