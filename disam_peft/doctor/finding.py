"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "failed", "not available"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was claimed.
        what: what was measured, in which precision; or why nothing was.
        measured, limit: the claim holds where ``measured <= limit``; None where nothing was measured.
    """

    check: str
    what: str
    measured: float | None
    limit: float | None
    verdict: Verdict


def judged(check: str, what: str, measured: float, limit: float) -> Finding:
    """Ok up to the limit; NaN is no number up to any limit."""
    return Finding(check, what, measured, limit, "ok" if measured <= limit else "failed")


def unavailable(check: str, reason: str) -> Finding:
    """Not measured, and nobody's fault."""
    return Finding(check, reason, None, None, "not available")


def raised(check: str, error: Exception) -> Finding:
    """The check itself broke off."""
    return Finding(check, f"{type(error).__name__}: {error}", None, None, "failed")
