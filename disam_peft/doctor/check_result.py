"""What one check of the doctor found, and how its numbers are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

CheckVerdict = Literal["ok", "failed", "not available"]


@dataclass(frozen=True)
class CheckResult:
    """One line of the doctor's table.

    Attributes:
        check: what was claimed.
        what: what was measured, and in which precision; or why nothing was measured.
        measured, limit: the claim holds where ``measured <= limit``. None where nothing was measured.
    """

    check: str
    what: str
    measured: float | None
    limit: float | None
    verdict: CheckVerdict


def measured(check: str, what: str, value: float, limit: float) -> CheckResult:
    """The result of a measurement: ok up to the limit. A value that is NaN fails, whatever the limit."""
    return CheckResult(check, what, value, limit, "ok" if value <= limit else "failed")


def failed(check: str, reason: str) -> CheckResult:
    """A check that failed before there was a number to compare."""
    return CheckResult(check, reason, None, None, "failed")


def unavailable(check: str, reason: str) -> CheckResult:
    """A check that could not be made here, which is no fault of the step."""
    return CheckResult(check, reason, None, None, "not available")


def largest_relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference between two tensors, divided by the largest number of ``wanted``."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def differing(some: Tensor, others: Tensor) -> int:
    """How many numbers differ in any bit. NaN differs from every number, also from itself."""
    return int((some != others).sum())
