"""docs/failures.md and the tests name the same rows."""

import re
from collections import Counter

from tests.helpers.paths import ROOT

TESTS = ROOT / "tests"


def rows_of_the_page() -> list[int]:
    lines = (ROOT / "docs/failures.md").read_text(encoding="utf-8").splitlines()
    return [int(match[1]) for line in lines if (match := re.match(r"\| (\d+) \|", line))]


def rows_of_tests() -> dict[int, list[str]]:
    """Row -> names of the tests that have its number; ``test_row_33_and_39_...`` stands for both."""
    found: dict[int, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name in re.findall(r"^def (test_row_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            numbers = re.match(r"test_row_(\d+(?:_and_\d+)*)", name)
            assert numbers, f"{path}: {name} has no number after row_"
            for number in numbers[1].split("_and_"):
                found.setdefault(int(number), []).append(name)
    return found


def test_every_row_of_the_page_has_a_test_and_every_row_of_a_test_stands_on_the_page():
    page, tests = rows_of_the_page(), rows_of_tests()
    assert len(page) >= 46
    assert not (twice := [row for row, count in Counter(page).items() if count > 1]), twice
    assert page == sorted(page)
    assert not (untested := sorted(set(page) - set(tests))), f"rows without a test: {untested}"
    assert not (unknown := {row: names for row, names in tests.items() if row not in set(page)}), unknown
