"""The tutorials in docs/extending.md fit the code."""

import ast

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tutorials import PAGE, Block, applied, blocks

BLOCKS = blocks(PAGE.read_text(encoding="utf-8"))
HEADINGS = list(dict.fromkeys(block.heading for block in BLOCKS))


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_tutorial_fits_the_code_as_it_is(heading: str):
    files: dict[str, str] = {}
    for block in (block for block in BLOCKS if block.heading == heading):
        path = ROOT / block.path
        before = files.get(block.path) or (path.read_text(encoding="utf-8") if path.exists() else None)
        files[block.path] = applied(block, before)
    assert any(path.startswith("tests/unit/") for path in files), "a tutorial has a test"
    for name, text in files.items():
        if name.endswith(".py"):
            ast.parse(text, name)


def test_the_tutorials_are_found():
    assert len(HEADINGS) >= 2
    assert len(BLOCKS) >= 3 * len(HEADINGS)


def change(text: str) -> Block:
    return Block("", "diff", "a.py", text)


def test_a_hunk_keeps_the_rest_of_a_line():
    assert applied(change(" LIST = [\n-    One | ...\n+    New | One | ...\n"), "LIST = [\n    One | Two,\n]\n") == (
        "LIST = [\n    New | One | Two,\n]\n"
    )


@pytest.mark.parametrize("before", ["b = 1\n", "a = 1\na = 1\n", None])
def test_a_hunk_that_does_not_fit_is_found(before: str | None):
    with pytest.raises(ValueError, match=r"a\.py"):
        applied(change(" a = 1\n+c = 2\n"), before)


def test_a_new_file_may_not_be_there():
    with pytest.raises(ValueError, match="there already"):
        applied(Block("", "python", "a.py", "a = 1\n"), "")
