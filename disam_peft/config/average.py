"""Averages of the trained weights that are kept beside the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from disam_peft.config.base import Config, with_kind

Judged = Literal["at_the_end", "always"]
"""When an average is validated: ``at_the_end``, after the last step, as the average of the whole run that the paper
means; ``always``: wherever the weights themselves are validated, and its best state is kept. Each time costs one
validation."""


class NoAverageConfig(Config):
    """No average is kept."""

    kind: Literal["none"] = "none"


class EmaConfig(Config):
    """Exponential moving average of the trained weights, updated after every optimizer step."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(default=0.999, ge=0, lt=1)
    """Share of the average that stays at each step; about the last 1 / (1 - decay) steps count."""


def too_slow(average: EmaConfig, steps: int) -> str | None:
    """What is wrong with a decay for a run of ``steps`` steps, and which one would fit; None: nothing.

    Of the average after the last step, ``decay^(steps - 1)`` is the weights after the first one. That is about 14 %
    where ``1 / (1 - decay)`` is half the steps, and 2 % with a quarter of them.
    """
    if steps * (1.0 - average.decay) >= 2.0 * (1 - 1e-9):
        return None
    first = average.decay ** (steps - 1)
    return (
        f"average: ema with decay={average.decay:g} averages over about 1 / (1 - decay) = "
        f"{1 / (1 - average.decay):,.0f} steps, and the run has {steps:,}: {first:.0%} of it stay the "
        f"weights after the first step; decay={max(0.0, 1 - 4 / steps):.4g} fits this run, or train longer"
    )


class SwaConfig(Config):
    """Stochastic weight averaging: the mean of the trained weights over the last part of the run (Izmailov et al. 2018,
    arXiv 1803.05407). It is meant for a learning rate that stays high: ``train.schedule: constant``."""

    kind: Literal["swa"] = "swa"
    start: float = Field(default=0.75, ge=0, lt=1)
    """Share of the run that is left out at its beginning. The paper begins at 75 % of its usual budget."""
    every: int = Field(default=1, ge=1)
    """Number of steps between the iterates that enter, counted back from the last step, which always enters. The paper
    takes one iterate per epoch."""
    judged: Judged = "at_the_end"
    """When it is validated beside the weights: ``at_the_end`` or ``always``."""

    def first_step(self, steps: int) -> int:
        """The first step of ``steps`` whose weights enter; steps count from 1."""
        left_out = min(math.floor(self.start * steps), steps - 1)
        return steps - (steps - left_out - 1) // self.every * self.every


class BmaConfig(Config):
    """Beta moving average: the mean of the weights over the whole run, the pretrained ones included, weighted by a Beta
    distribution over the steps (CLIPood, Shu et al. 2023, arXiv 2302.00864). With a ``beta`` below 1 the beginning and
    the end count most. The weights depend on ``train.steps``."""

    kind: Literal["bma"] = "bma"
    beta: float = Field(default=0.5, gt=0, le=1e6)
    """Both parameters of the Beta distribution. Below 1 the ends of the run count most, 1 is the plain mean, and above
    1 the middle counts most. 0.5 is what CLIPood uses."""
    judged: Judged = "at_the_end"
    """When it is validated beside the weights: ``at_the_end`` or ``always``."""


class SwadConfig(Config):
    """Stochastic weight averaging, densely and aware of overfitting: the mean of the weights over the steps between the
    point where the validation loss stops to fall and the point where it has risen (SWAD, Cha et al. 2021, arXiv
    2102.08604). The loss is that of the weights themselves on held-back source images, at every
    ``train.validate_every`` steps. It is validated after the last step."""

    kind: Literal["swad"] = "swad"
    variant: Literal["clean", "published"] = "clean"
    """``clean``: every iterate of the window counts once, from the step of the lowest loss on, whatever the interval of
    validations, as the paper defines it. ``published``: as the code of its authors does it, to reproduce its scores:
    segments between validations count alike, the window begins some segments before that of the lowest loss, or after
    it, and segments may count several times where the loss stops to fall early."""
    n_converge: int = Field(default=3, ge=1)
    """The window begins at a validation whose loss none of the following ``n_converge - 1`` validations undercuts."""
    n_tolerance: int = Field(default=6, ge=1)
    """It ends before the first ``n_tolerance`` validations in a row whose losses are all above the threshold."""
    tolerance_ratio: float = Field(default=0.3, ge=0)
    """The threshold is (1 + this) times the mean of the ``n_converge`` losses. The authors take 0.2 for VLCS."""


KeptAverageConfig = EmaConfig | SwaConfig | BmaConfig | SwadConfig
"""All averages."""


def _with_kinds(averages: Any) -> Any:
    return [with_kind(average) for average in averages] if isinstance(averages, list) else with_kind(averages)


AverageConfig = Annotated[NoAverageConfig | KeptAverageConfig, Field(discriminator="kind")]
Averages = Annotated[AverageConfig | list[AverageConfig], BeforeValidator(_with_kinds)]
"""One average, or several that are judged side by side; an empty list is none. ``ema`` is short for ``{kind: ema}``."""


def kept_averages(averages: Averages) -> list[KeptAverageConfig]:
    """The averages that are really kept: a list, without ``none``."""
    listed = averages if isinstance(averages, list) else [averages]
    return [average for average in listed if not isinstance(average, NoAverageConfig)]


def named(configs: Sequence[KeptAverageConfig]) -> dict[str, KeptAverageConfig]:
    """The averages by the name that results give them: their kind, numbered where a kind occurs several times."""
    found: dict[str, KeptAverageConfig] = {}
    for config in configs:
        same = [other for other in found.values() if other.kind == config.kind]
        found[config.kind if not same else f"{config.kind}_{len(same) + 1}"] = config
    return found


def times_judged(average: KeptAverageConfig, steps: int, interval: int) -> int:
    """How often an average is validated in a run of ``steps`` steps that validates after every ``interval`` of them,
    and after the last one."""
    if isinstance(average, SwadConfig) or (not isinstance(average, EmaConfig) and average.judged == "at_the_end"):
        return 1
    first = average.first_step(steps) if isinstance(average, SwaConfig) else 1
    return math.ceil(steps / interval) - (first - 1) // interval


def require_validations(averages: Sequence[KeptAverageConfig], validations: int, interval: int) -> None:
    """Pass if a run has as many validations as its averages need.

    Raises:
        ValueError: it has fewer; says which setting makes them more.
    """
    for average in averages:
        if isinstance(average, SwadConfig) and average.n_converge > validations:
            raise ValueError(
                f"average: swad waits for n_converge={average.n_converge} validations, and this run has {validations} "
                f"(one every {interval} steps); lower train.validate_every, best to a twentieth of the run or less"
            )
