"""Settings that change over the steps of a run. Steps count from 0."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_serializer, model_validator

from disam_peft.config.base import Config

NotNegative = Annotated[float, Field(ge=0)]


def linear_value(
    step: int, start: float, to: float, end: int, warmup_steps: int = 0, warmup_from: float = 0.0
) -> float:
    """A value that goes evenly from ``start``, in step ``warmup_steps``, to ``to``, in step ``end``, and stays there.

    Before, it goes evenly from ``warmup_from`` to ``start``. GSAM's authors have ``end = T_max``, the number of steps,
    so that no step has ``to`` itself.
    """
    if step < warmup_steps:
        return warmup_from + (start - warmup_from) * step / warmup_steps
    share = _share(step, end, warmup_steps)
    return (1 - share) * start + share * to


def cosine_value(
    step: int, start: float, to: float, end: int, warmup_steps: int = 0, warmup_from: float = 0.0
) -> float:
    """The same along half a cosine: ``to + (start - to) (1 + cos(pi s)) / 2``, s the share of the way."""
    if step < warmup_steps:
        return warmup_from + (start - warmup_from) * step / warmup_steps
    return to + (start - to) * (1 + math.cos(math.pi * _share(step, end, warmup_steps))) / 2


def following_value(learning_rate: float, highest_rate: float, lowest_rate: float, most: float, least: float) -> float:
    """GSAM's rule ``least + (most - least) (lr - lr_min) / (lr_max - lr_min)``, with the learning rate of the step that
    is about to be taken (Zhuang et al., ICLR 2022, arXiv 2203.08065); ``most`` where the learning rate is constant."""
    if highest_rate == lowest_rate:
        return most
    return least + (most - least) * (learning_rate - lowest_rate) / (highest_rate - lowest_rate)


def _share(step: int, end: int, warmup_steps: int) -> float:
    return min(1.0, (step - warmup_steps) / (end - warmup_steps)) if end > warmup_steps else 0.0


class _WarmedUpConfig(Config):
    warmup_steps: int = Field(default=0, ge=0)
    """Number of steps in which the value goes evenly from ``warmup_from`` to the one that it starts with."""
    warmup_from: NotNegative = 0.0
    """The value in the first step of a warm-up."""

    def _with_warmup(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values as a file has them; a warm-up that is not there is left out."""
        warmup = {"warmup_steps": self.warmup_steps, "warmup_from": self.warmup_from} if self.warmup_steps else {}
        return values | warmup


class ConstantConfig(_WarmedUpConfig):
    """One value, after a warm-up: ``{kind: constant, value: 0.05, warmup_steps: 100}``."""

    kind: Literal["constant"] = "constant"
    value: NotNegative

    @model_serializer
    def _as_it_is_written(self) -> dict[str, Any]:
        return self._with_warmup({"kind": self.kind, "value": self.value})


class _BetweenConfig(_WarmedUpConfig):
    start: NotNegative = Field(alias="from")
    """The value in the first step, or after the warm-up; it is written ``from``."""
    to: NotNegative
    """The value in the last step."""
    until: int | None = Field(default=None, ge=1)
    """The step, counted from 0, that has the value ``to``; it stays there. Unset: the last step. With
    ``train.steps`` this is the schedule of GSAM's authors, who reach ``to`` one step after the last."""

    @model_validator(mode="after")
    def _until_is_behind_the_warmup(self) -> _BetweenConfig:
        if self.until is not None and self.until <= self.warmup_steps:
            raise ValueError(f"until={self.until} must be more than warmup_steps={self.warmup_steps}")
        return self

    def _between(self, kind: str) -> dict[str, Any]:
        until = {} if self.until is None else {"until": self.until}
        return self._with_warmup({"kind": kind, "from": self.start, "to": self.to} | until)


class LinearConfig(_BetweenConfig):
    """A setting that changes evenly over the steps of a run: ``{kind: linear, from: 0, to: 0.1}``."""

    kind: Literal["linear"] = "linear"

    @model_serializer
    def _as_it_is_written(self) -> dict[str, Any]:
        return self._between(self.kind)


class CosineConfig(_BetweenConfig):
    """A setting that changes along half a cosine, slowly at both ends: ``{kind: cosine, from: 0.2, to: 0.05}``."""

    kind: Literal["cosine"] = "cosine"

    @model_serializer
    def _as_it_is_written(self) -> dict[str, Any]:
        return self._between(self.kind)


class FollowLearningRateConfig(Config):
    """A setting that follows the learning rate, GSAM's rule: ``{kind: follow_lr, max: 0.1, min: 0.02}``.

    The value is ``min + (max - min) lr / train.learning_rate``, with the learning rate that is planned for the step
    about to be taken, warm-up included. (A step that is skipped, because something was not finite, holds back the
    learning rate itself, and not this value.)
    """

    kind: Literal["follow_lr"] = "follow_lr"
    max: NotNegative
    """The value at the highest learning rate, and in the whole run where it is constant."""
    min: NotNegative = 0.0
    """The value where the learning rate is 0."""

    @model_validator(mode="after")
    def _min_is_below_max(self) -> FollowLearningRateConfig:
        if self.min > self.max:
            raise ValueError(f"min={self.min:g} must be at most max={self.max:g}; swap them")
        return self


def _linear_by_default(value: Any) -> Any:
    return {"kind": "linear", **value} if isinstance(value, Mapping) and "kind" not in value else value


ScheduleConfig = ConstantConfig | LinearConfig | CosineConfig | FollowLearningRateConfig
Scheduled = (
    NotNegative
    | Annotated[
        Annotated[ScheduleConfig, Field(discriminator="kind")],
        BeforeValidator(_linear_by_default),
    ]
)
"""A number for the whole run, or one that changes over its steps."""


def value_in_step(setting: float | ScheduleConfig, step: int, steps: int, rate: float = 1.0) -> float:
    """The value of a setting in step ``step`` of ``steps``, which counts from 0.

    Args:
        rate: the learning rate of that step as a share of the highest one.
    """
    if isinstance(setting, ConstantConfig):
        return linear_value(step, setting.value, setting.value, steps - 1, setting.warmup_steps, setting.warmup_from)
    if isinstance(setting, _BetweenConfig):
        value = linear_value if isinstance(setting, LinearConfig) else cosine_value
        end = steps - 1 if setting.until is None else setting.until
        return value(step, setting.start, setting.to, end, setting.warmup_steps, setting.warmup_from)
    if isinstance(setting, FollowLearningRateConfig):
        return following_value(rate, 1.0, 0.0, setting.max, setting.min)
    return setting


def largest(setting: float | ScheduleConfig) -> float:
    """The largest value that a setting takes in a run, or nearly takes."""
    if isinstance(setting, FollowLearningRateConfig):
        return setting.max
    if isinstance(setting, _WarmedUpConfig):
        warmup = [setting.warmup_from] if setting.warmup_steps else []
        values = [setting.value] if isinstance(setting, ConstantConfig) else [setting.start, setting.to]
        return max(values + warmup)
    return setting


def in_words(setting: float | ScheduleConfig) -> str:
    """``0.05``, ``0.2 to 0.05``, ``0.1 to 0.2 by step 101``, ``0.02 to 0.1 with the learning rate``. Steps are counted
    from 1 there, as in records."""
    if isinstance(setting, FollowLearningRateConfig):
        return f"{setting.min:g} to {setting.max:g} with the learning rate"
    if isinstance(setting, _BetweenConfig):
        until = "" if setting.until is None else f" by step {setting.until + 1:,}"
        return f"{setting.start:g} to {setting.to:g}{until}"
    return f"{setting.value:g}" if isinstance(setting, ConstantConfig) else f"{setting:g}"
