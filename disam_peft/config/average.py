"""Averages of the trained weights that are kept beside the weights themselves."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from disam_peft.config.base import Config, with_kind


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


def _with_kinds(averages: Any) -> Any:
    return [with_kind(average) for average in averages] if isinstance(averages, list) else with_kind(averages)


AverageConfig = Annotated[NoAverageConfig | KeptAverageConfig, Field(discriminator="kind")]
Averages = Annotated[AverageConfig | list[AverageConfig], BeforeValidator(_with_kinds)]
"""One average, or several that are judged side by side; an empty list is none. ``ema`` is short for ``{kind: ema}``."""


def kept_averages(averages: Averages) -> list[KeptAverageConfig]:
    """The averages that are really kept: a list, without ``none``."""
    listed = averages if isinstance(averages, list) else [averages]
    return [average for average in listed if not isinstance(average, NoAverageConfig)]
