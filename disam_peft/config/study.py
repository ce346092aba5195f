"""What a study file may say. A study runs one recipe in several variants and compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from disam_peft.config.base import Config

Overrides = dict[str, Any]
Seed = Annotated[int, Field(ge=0)]
RECIPE = "recipe"
DEFAULT_ARMS = ("erm", "erm_2x", "sam", "disam")
PRESETS = (*DEFAULT_ARMS, "gsam", "sagm", "disam_gsam", "disam_sagm")
"""Arms that need no overrides."""


class Reading(Config):
    """Further numbers that are read from the runs of an arm, at no training of their own. They are shown and compared
    like an arm."""

    arm: str
    """The arm whose runs are read."""
    weights: str | None = None
    """Whose numbers: ``raw``, the trained weights themselves, or the name of an average that the runs keep, such as
    ``ema`` or ``swad``. Also where selection chose others."""
    alpha: Annotated[float, Field(ge=0, le=2)] | Literal["recommended"] | None = None
    """WiSE-FT: the weights at this alpha between zero-shot (0) and the trained adapter (1), or at the alpha among 0,
    0.1, ..., 1 that is best by source validation (``recommended``)."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Reading:
        if (self.weights is None) == (self.alpha is None):
            raise ValueError(
                "a reading has either weights (raw, ema, ...) or alpha (0.5, recommended); write one of them"
            )
        return self


class Study(Config):
    """A study: arms (what is compared) x conditions x held-out domains x seeds.

    Overrides are dotted keys of the recipe, such as ``{method.name: sam, train.steps: 300}``.
    """

    question: str = ""
    """What the study asks, in one sentence."""
    recipe: Path | dict[str, Any] | None = None
    """The recipe that is varied, or the path of its file, relative to the study's folder. ``name`` and ``output`` may
    be left out. Unset: every arm has a recipe of its own."""
    arms: list[str] | dict[str, Overrides | None] = Field(default=list(DEFAULT_ARMS), min_length=2)
    """What is compared: name -> overrides. ``erm_2x`` and the names of methods need none. ``erm_2x`` is ERM with twice
    the steps, warm-up and schedule stretched likewise, so that it computes as much as SAM and DISAM. An arm with
    the key ``recipe`` varies that recipe in place of the study's, on the same data: ``{recipe: coop.yaml, method.name:
    sam}``; with this key alone it is the recipe as it is."""
    readings: dict[str, Reading] = Field(default={})
    """Name -> further numbers from the runs of an arm: ``{swad: {arm: erm, weights: swad}}``, or ``{wise: {arm: erm,
    alpha: 0.5}}``. They take part in comparisons under their name."""
    conditions: dict[str, Overrides] = Field(default={"": {}}, min_length=1)
    """Under which settings the arms are compared: name -> overrides. Every arm runs under every condition."""
    held_out: str | list[str] | None = Field(default=None, min_length=1)
    """The domains to hold out, one run each, or ``all``. Unset: what the recipe says. May not be set where the
    recipe has ``protocol: all``."""
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[Seed], Field(min_length=1)] = 5
    """The number of seeds, counted from 0 on, or a list of them."""
    data_seed: Literal["seed", "recipe"] = "seed"
    """Seed of DomainShapes. ``seed``: every seed paints images of its own, so that seeds are independent samples of the
    benchmark. ``recipe``: all runs have the images of the recipe. It has no effect on other data."""
    baseline: str | None = None
    """The arm that every other is compared with. Unset: the first."""
    comparisons: list[tuple[str, str]] | None = Field(default=None, min_length=1)
    """The pairs of arms that are compared. Unset: every arm with the baseline, disam with sam and erm_2x, disam_gsam
    with gsam, and disam_sagm with sagm."""
    records: Path | None = None
    """A file of records that ``compare`` has written before (``records.csv``), relative to the study's folder. Runs
    that stand in it with equal settings are not run again. It may be missing."""
    metric: str | list[str] = Field(default="top1", min_length=1)
    """The measures that are compared, one or several. Each is a family of tests of its own. Where nothing is held out
    (``protocol: all``) the default is ``source_top1``."""

    @model_validator(mode="after")
    def _arms_have_recipes(self) -> Study:
        if self.recipe is not None:
            return self
        given = dict.fromkeys(self.arms) if isinstance(self.arms, list) else self.arms
        without = [arm for arm, overrides in given.items() if not overrides or not overrides.get(RECIPE)]
        if without:
            raise ValueError(f"recipe: Field required, by the arms without one of their own: {', '.join(without)}")
        return self
