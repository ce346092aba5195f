"""What verbs take from the command line: ranges of alphas."""

from __future__ import annotations

import pytest

from disam_peft.cli.options import MOST_ALPHAS, alpha_range
from disam_peft.errors import UserError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0:1.2:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2]),
        (" 0.5 : 1 : 0.2 ", [0.5, 0.7, 0.9]),
        ("1:1:0.1", [1]),
        ("0,0.5,1", [0, 0.5, 1]),
        ("0.3", [0.3]),
    ],
)
def test_a_range_has_both_of_its_ends_and_decimal_numbers(text: str, wanted: list[float]) -> None:
    assert alpha_range("--alphas", text) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0:1", "is not START:STOP:STEP"),
        ("0:1:0.1:2", "is not START:STOP:STEP"),
        ("a:1:0.1", "is not START:STOP:STEP"),
        ("0:inf:0.1", "is not START:STOP:STEP"),
        ("0:nan:0.1", "is not START:STOP:STEP"),
        ("0:1:0", "the step is 0"),
        ("0:1:-0.1", "has no number"),
        ("1:0:0.1", "has no number"),
        ("", "has no number"),
        ("0,x", "is not a list of numbers"),
        ("0:1:1e-9", f"at most {MOST_ALPHAS} are taken"),
        ("0:1e400:1e-400", f"at most {MOST_ALPHAS} are taken"),
    ],
)
def test_what_is_no_range_is_refused_by_the_name_of_the_option(text: str, told: str) -> None:
    with pytest.raises(UserError, match=f"^--alphas '.*{told}"):
        alpha_range("--alphas", text)
