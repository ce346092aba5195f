"""The names that a program may rely on: all there, imported when used, seen by type checkers, used by the examples."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import warnings
from typing import Any

import pytest

import disam_peft
from tests.helpers.paths import RECIPES, ROOT

untyped: Any = disam_peft
NAMES = sorted(set(disam_peft.__all__) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_can_be_imported(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        value = getattr(disam_peft, name)
    assert callable(value) or name.endswith("Config")
    assert value.__doc__, "a public name is documented"


def test_the_table_is_the_list_of_names() -> None:
    assert len(NAMES) > 40
    assert disam_peft.__all__ == ["__version__", *disam_peft._HOMES]
    assert dir(disam_peft) == sorted(disam_peft.__all__)


def test_type_checkers_see_the_names_of_the_table() -> None:
    tree = ast.parse((ROOT / "disam_peft/__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen: dict[str, str] = {}
    modules: dict[str, str] = {}
    for node in block.body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names), "re-exported by that form alone"
            seen |= {alias.name: str(node.module) for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {str(alias.asname): alias.name for alias in node.names}
        else:  # load_data = _data.load
            assert isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute)
            [target] = node.targets
            seen[ast.unparse(target)] = f"{modules[ast.unparse(node.value.value)]}:{node.value.attr}"
    assert seen == disam_peft._HOMES


def test_importing_the_package_loads_nothing_else() -> None:
    code = "import sys, disam_peft; print(*(name for name in sys.modules if name.startswith(('disam_peft.', 'torch'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["disam_peft.errors"]


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_bakbone'; did you mean 'load_backbone'"):
        untyped.load_bakbone  # noqa: B018


def test_a_renamed_name_keeps_working_and_names_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(disam_peft._RENAMED, "Disam", ("DISAM", "9.9"))
    with pytest.warns(DeprecationWarning) as caught:
        found = untyped.Disam
    assert found is disam_peft.DISAM
    [warning] = caught
    assert str(warning.message) == "disam_peft.Disam is now called disam_peft.DISAM; the old name goes with version 9.9"
    assert warning.filename == __file__, "it points at the line that uses the old name"


def overdue(renamed: dict[str, tuple[str, str]]) -> list[str]:
    """Old names whose last version is over, lead nowhere, or hide a public one."""

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    here = number(disam_peft.__version__)
    return [
        old
        for old, (new, gone) in renamed.items()
        if number(gone) <= here or new not in disam_peft._HOMES or old in disam_peft._HOMES
    ]


def test_no_renamed_name_stays_longer_than_its_release() -> None:
    assert overdue(disam_peft._RENAMED) == []
    assert overdue({"Disam": ("DISAM", "99.0")}) == []
    assert overdue({"Disam": ("DISAM", "0.1"), "a": ("nowhere", "99.0"), "fit": ("DISAM", "99.0")}) == [
        *("Disam", "a", "fit")
    ]


def python_examples() -> dict[str, str]:
    """Where -> Python code that a user reads: the blocks of README and guide, and the scripts of recipes/."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]
    found = {
        f"{page.name} {number}": block
        for page in pages
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        )
    }
    return found | {path.name: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.py"))}


def test_examples_import_public_names_alone() -> None:
    examples = python_examples()
    assert {"README.md 0", "README.md 1", "own_loop.py", "own_objective.py", "finetune_folder.py"} <= set(examples)
    for where, code in examples.items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("disam_peft"):
                assert node.module == "disam_peft", where
                assert {alias.name for alias in node.names} <= set(disam_peft.__all__), where
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("disam_peft.")], where
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dp":
                assert node.attr in disam_peft.__all__, where


def test_the_pipeline_of_the_readme_uses_names_that_it_has() -> None:
    tree = ast.parse(python_examples()["README.md 1"])
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    assert used - stored == {"dp", "folder", "print"}
