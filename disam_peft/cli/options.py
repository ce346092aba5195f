"""What several verbs take from the command line: recipe overrides and comma-separated lists."""

from __future__ import annotations

from typing import Annotated

import typer

from disam_peft.errors import UserError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe settings, e.g. train.steps=200.")
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
