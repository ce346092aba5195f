"""Averages of the trained weights that are kept beside the weights themselves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from disam_peft.config.base import Config


class NoAverageConfig(Config):
    """No average is kept."""

    kind: Literal["none"] = "none"


class EmaConfig(Config):
    """Exponential moving average of the trained weights, updated after every optimizer step."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(default=0.999, ge=0, lt=1)
    """Share of the average that stays at each step; about the last 1 / (1 - decay) steps count."""


KeptAverageConfig = EmaConfig
"""All averages; with a second one ``A | B``."""
AverageConfig = Annotated[NoAverageConfig | KeptAverageConfig, Field(discriminator="kind")]
Averages = AverageConfig | Annotated[list[AverageConfig], Field(min_length=1)]
"""One average, or several that are judged side by side."""


def kept_averages(averages: Averages) -> list[KeptAverageConfig]:
    """The averages that are really kept: a list, without ``none``."""
    listed = averages if isinstance(averages, list) else [averages]
    return [average for average in listed if not isinstance(average, NoAverageConfig)]
