"""Printing: the one way in which verbs write to the terminal, so that no name from data can command it.

Tables are printed by ``output.Terminal``, which does the same.
"""

from __future__ import annotations

import typer

from disam_peft.errors import printable


def say(text: object, *, err: bool = False, colour: str | None = None) -> None:
    """Print one message: to standard error with ``err``, in a colour where a terminal shows it."""
    typer.secho(printable(str(text)), err=err, fg=colour)
