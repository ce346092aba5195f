"""The numbers and choices of a step, which are checked whenever one of them is set."""

from __future__ import annotations

import math
from typing import Generic, TypeVar, cast, overload

from disam_peft.disam.ascent import (
    VARIANCE_FORMS,
    VARIANCE_OVER,
    VARIANCE_SCALES,
    VarianceForm,
    VarianceOver,
    VarianceScale,
)
from disam_peft.disam.descent import DESCENTS, Descent

Word = TypeVar("Word")


class NotNegative:
    """An attribute that is a finite number >= 0."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> NotNegative: ...

    @overload
    def __get__(self, instance: object, owner: type) -> float: ...

    def __get__(self, instance: object | None, owner: type) -> float | NotNegative:
        return self if instance is None else float(vars(instance)[f"_{self._name}"])

    def __set__(self, instance: object, value: float) -> None:
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._name} must be a finite number >= 0, not {value!r}") from error
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{self._name} must be a finite number >= 0, not {value}")
        vars(instance)[f"_{self._name}"] = number


class OneOf(Generic[Word]):
    """An attribute that is one of a few words."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> OneOf[Word]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Word: ...

    def __get__(self, instance: object | None, owner: type) -> Word | OneOf[Word]:
        return self if instance is None else cast(Word, vars(instance)[f"_{self._name}"])

    def __set__(self, instance: object, value: Word) -> None:
        if value not in self._words:
            raise ValueError(f"{self._name} must be one of {', '.join(self._words)}, not {value!r}")
        vars(instance)[f"_{self._name}"] = value


class StepSettings:
    """Settings that may change between steps; see ``DISAM`` for what they do."""

    rho = NotNegative()
    variance_weight = NotNegative()
    variance_over = OneOf[VarianceOver](VARIANCE_OVER)
    variance_scale = OneOf[VarianceScale](VARIANCE_SCALES)
    variance_form = OneOf[VarianceForm](VARIANCE_FORMS)
    descent = OneOf[Descent](DESCENTS)
    alpha = NotNegative()
    adaptive: bool
