"""The one exception for what a user can mend, and the nearest-name hint that its messages carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can mend: the message says the value, the cause and what to do.

    The command line prints it without a traceback and exits with 2.
    """


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to ``count`` of the ``known`` names that look like ``name``, best first."""
    by_lower = {option.lower(): option for option in known}
    return [by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or an empty string where nothing is near."""
    close = nearest(name, known)
    return f"; did you mean {' or '.join(repr(option) for option in close)}?" if close else ""
