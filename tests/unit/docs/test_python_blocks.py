"""Python in README and in the guide: it compiles, what it imports exists, and it uses no name that nothing defines."""

import ast
import builtins
import importlib
import re

import pytest

from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]
GIVEN = {"params", "optimizer", "per_sample_loss", "domains", "folder", "loader", "body", "head"}
"""What the reader's own program has."""


def undefined(tree: ast.Module) -> set[str]:
    """Names that are read and never bound: by an import, an assignment, a definition or as an argument."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_names_only_what_is_there(block: str):
    tree = ast.parse(block)
    assert not undefined(tree) - GIVEN
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                used = attributes(tree, alias.asname or alias.name)
                assert not [name for name in used if not hasattr(module, name)]


def attributes(tree: ast.Module, name: str) -> set[str]:
    """Attributes of a name that are read, as ``fit`` of ``dp.fit``."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == name}


def test_undefined_names_are_found():
    assert undefined(ast.parse("from a import b\nc = lambda d: b(d, e)\nprint(c)")) == {"e"}
    assert attributes(ast.parse("import a as b\nb.c(b.d.e)"), "b") == {"c", "d"}
    assert len(BLOCKS) >= 3
