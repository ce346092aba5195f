"""The page of reference values names functions that are there, with the arguments that they have."""

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "reference_values.md"


def rows(page: str) -> list[list[str]]:
    """The cells of every row of every table, without headings."""
    found = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")]
    stripped = [[cell.strip() for cell in cells] for cells in found]
    return [cells for cells in stripped if not cells[0].startswith("---") and cells[1:2] != ["function"]]


def function(path: str) -> Callable[..., object]:
    module, _, name = path.rpartition(".")
    found: Callable[..., object] = getattr(importlib.import_module(module), name)
    assert callable(found)
    return found


def faults(page: str) -> list[str]:
    """What is wrong with the page, in words."""
    found = []
    for cells in rows(page):
        if len(cells) != 4:
            found.append(f"{cells}: four cells a row")
            continue
        paths = re.findall(r"`(disam_peft\.[\w.]+)`", cells[1])
        if len(paths) != 1:
            found.append(f"{cells[1]}: one function a row")
            continue
        try:
            there = list(inspect.signature(function(paths[0])).parameters)
        except (ImportError, AttributeError) as error:
            found.append(f"{paths[0]}: {error}")
            continue
        # a name in backticks is an argument; words that an argument may be stand in quotation marks
        told = re.findall(r"`(\w+)`", cells[2])
        if told != there:
            found.append(f"{paths[0]}: takes {there}, the page says {told}")
        if not re.fullmatch(r"(`\w+\.npz`|no file): \S.*", cells[0]):
            found.append(f"{cells[0]}: a file and its cases")
        if not cells[3]:
            found.append(f"{paths[0]}: what does it return?")
    return found


def test_every_function_of_the_page_is_there_with_its_arguments() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert len(rows(page)) >= 3
    assert not faults(page)


def test_every_file_of_the_page_is_there() -> None:
    names = {name for cells in rows(PAGE.read_text(encoding="utf-8")) for name in re.findall(r"`(\w+\.npz)`", cells[0])}
    assert names
    assert not [name for name in names if not Path(ROOT / "tests" / "reference" / name).exists()]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("disam.ascent.ascent_weights", "disam.ascent.ascent_weight"),
        ("disam_peft.disam.ascent.", "disam_peft.disam.descent."),
        ("`count_D` (D,)", "`counts_D` (D,)"),
        ("`mean_D` (D,) mean losses, `count_D`", "`count_D`"),
        ("`ratio` |", "`ratio`, `bias` |"),
    ],
)
def test_a_page_that_is_wrong_is_told(before: str, after: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert before in page
    assert len(faults(page.replace(before, after))) == 1
