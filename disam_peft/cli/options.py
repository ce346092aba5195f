"""What several verbs take from the command line: recipe overrides and comma-separated lists."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

import typer

from disam_peft.errors import UserError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe settings, e.g. train.steps=200.")
]

EvaluationOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of data, evaluation, features.store and precision."),
]


def names(text: str | None) -> list[str]:
    """The parts of ``a,b``; none where the option was not given."""
    return [name.strip() for name in text.split(",") if name.strip()] if text is not None else []


def numbers(option: str, text: str) -> list[float]:
    """The numbers of ``0.02,0.05``; none where ``text`` is empty.

    Raises:
        UserError: a part that is not a number; the message names the ``option``.
    """
    try:
        return [float(part) for part in names(text)]
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of numbers such as 0.02,0.05,0.1") from error


MOST_ALPHAS = 1000


def alpha_range(option: str, text: str) -> list[float]:
    """The numbers of ``0:1.2:0.1`` (start, stop and step, both ends included) or of ``0,0.5,1``. They are the decimal
    numbers that one reads: 0.3, and not 0.30000000000000004.

    Raises:
        UserError: neither; no number, or more than ``MOST_ALPHAS``; the message names the ``option``.
    """
    if ":" not in text:
        found = numbers(option, text)
    else:
        try:
            start, stop, step = (Decimal(part.strip()) for part in text.split(":"))
            if step == 0:
                raise UserError(f"{option} {text!r}: the step is 0; use for example {start}:{stop}:0.1")
            count = int((stop - start) / step) + 1 if step > 0 and stop >= start else 0
        except UserError:
            raise
        except (ValueError, ArithmeticError) as error:
            raise UserError(f"{option} {text!r} is not START:STOP:STEP such as 0:1.2:0.1") from error
        if count > MOST_ALPHAS:
            raise UserError(
                f"{option} {text!r} has {count} numbers, at most {MOST_ALPHAS} are taken; use a larger step"
            )
        found = [float(start + number * step) for number in range(count)]
    if not found:
        raise UserError(f"{option} {text!r} has no number; use for example 0:1.2:0.1 or 0,0.5,1")
    return found


_SECONDS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def seconds(option: str, text: str | None) -> float | None:
    """The seconds of ``12h``, ``30d`` or ``2w``; None where the option was not given.

    Raises:
        UserError: no such time; the message names the ``option``.
    """
    return None if text is None else _quantity(option, text, _SECONDS, "a time such as 12h, 30d or 2w")


def num_bytes(option: str, text: str | None) -> int | None:
    """The bytes of ``500MB`` or ``20GB`` (10^9); None where the option was not given.

    Raises:
        UserError: no such size; the message names the ``option``.
    """
    return None if text is None else int(_quantity(option, text, _BYTES, "a size such as 500MB or 20GB"))


def _quantity(option: str, text: str, units: dict[str, float], what: str) -> float:
    for unit, factor in units.items():
        number = text.strip()[: -len(unit)]
        if text.strip().lower().endswith(unit.lower()) and number.replace(".", "", 1).strip().isdecimal():
            return float(number) * factor
    raise UserError(f"{option} {text!r} is not {what}")
