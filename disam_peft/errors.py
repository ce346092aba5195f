"""What a user can mend, how a signal ends the work, and the nearest-name hint that messages carry."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# C0 and C1 controls with the escape that begins a terminal's commands, line breaks that Unicode has besides, signs
# that turn the direction of what follows them, and halves of characters, which cannot be printed at all.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_LONGEST_WORD = 5_000
"""Characters without a space between them: more than any path has. A damaged file may hold longer ones."""
_LONG_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")


def printable(text: str) -> str:
    """``text`` as a terminal may be given it: what would command the terminal, in names from data or in paths, is shown
    as an escape such as ``\\x1b``. Line breaks and tabs stay, for messages have them."""
    return _COMMANDS.sub(lambda found: ascii(found[0])[1:-1], text)


class UserError(ValueError):
    """Something that the user can mend: the message says the value, the cause and what to do.

    The command line prints it without a traceback and exits with 2. Names in it are made ``printable``, and of a value
    that nobody would read to its end the beginning is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(_LONG_WORD.sub(_beginning, message)))


def _beginning(word: re.Match[str]) -> str:
    return f"{word[0][:200]}... ({len(word[0])} characters)"


class Diverged(UserError):
    """Training came to losses or gradients that are not finite. The same settings would come to the same again."""


class Stopped(BaseException):
    """A signal ended the work. No Exception, as KeyboardInterrupt is none: a loop over runs that goes on after
    failures must end too. ``exit_code`` is what a shell would report, 143 for SIGTERM and 130 for Ctrl-C."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Notice(UserWarning):
    """Something worth knowing that is no cause for concern."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to ``count`` of the ``known`` names that look like ``name``, best first."""
    by_lower = {option.lower(): option for option in known}
    return [by_lower[m] for m in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.5)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"``, or an empty string where nothing is near."""
    close = nearest(name, known)
    return f"; did you mean {' or '.join(repr(option) for option in close)}?" if close else ""
