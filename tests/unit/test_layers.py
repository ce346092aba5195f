"""The floors of the package, read from its imports: a module imports from lower floors or from its own folder.

The same table stands in docs/architecture.md, in words. There are no exceptions: an import that does not fit means that
something is in the wrong folder.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "disam_peft"
PAGE = ROOT / "docs" / "architecture.md"

FLOORS = {
    "errors": 0,
    "config": 1,
    "common": 1,
    "disam": 1,
    "objectives": 2,
    "data": 2,
    "backbones": 2,
    "adapters": 3,
    "classification": 4,
    "training": 5,
    "evaluation": 5,
    "export": 5,
    "report": 5,
    "experiments": 6,
    "inference": 7,
    "doctor": 7,
    "integrations": 7,
    "app": 7,
    "cli": 8,
}
# Where a library may be imported, as beginnings of module names. Everything else gets at it through these modules.
HOMES = {
    "open_clip": ("backbones.open_clip",),
    "timm": ("backbones.open_clip",),
    "transformers": ("backbones.transformers",),
    "peft": ("adapters.peft",),
    "accelerate": ("training", "common.processes", "experiments.run"),
    "datasets": ("data", "experiments.demo"),
    "PIL": ("data", "classification.frozen_features", "evaluation.mistakes", "experiments.demo"),
    "matplotlib": ("report",),
    "jinja2": ("report",),
    "scipy": ("report", "evaluation", "classification.domain_inference"),
    "filelock": ("common.locks",),
    "xxhash": ("data.stores.stored_rows",),
    "yaml": ("config", "experiments.run_folder"),
    "typer": ("cli",),
}
# What a folder may import besides the standard library, itself and what its floor allows.
ALONE = {"disam": {"torch"}, "config": {"pydantic", "pydantic_core", "yaml", "disam_peft.errors"}}
LOOSE_MODULES = 3
REPEATED = {"base", "__init__", "__main__"}


def modules(folder: Path = PACKAGE) -> dict[str, Path]:
    """Dotted names below the package, without its own ``__init__``: ``data.splits`` for disam_peft/data/splits.py."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports: at the top, in functions, and for the type checker alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def used(name: str) -> set[str]:
    """Modules of this package that a module imports."""
    ours = {found.removeprefix("disam_peft.") for found in imported(MODULES[name]) if found.startswith("disam_peft.")}
    known = {found for found in ours if found in MODULES}
    return {found for found in known if not any(longer.startswith(f"{found}.") for longer in known)}


def top(name: str) -> str:
    return name.split(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, its first node repeated at the end; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := walk(other, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_every_folder_has_a_floor():
    assert len(MODULES) > 100
    assert {top(name) for name in MODULES} <= set(FLOORS)
    loose = [name for name, path in MODULES.items() if path.parent == PACKAGE]
    assert len(loose) <= LOOSE_MODULES, loose


def test_imports_go_down():
    wrong = [
        f"{name} (floor {FLOORS[top(name)]}) imports {other} (floor {FLOORS[top(other)]})"
        for name in MODULES
        for other in used(name)
        if top(other) != top(name) and FLOORS[top(other)] >= FLOORS[top(name)]
    ]
    assert not wrong


def test_there_is_no_circle():
    """Inside of folders too, and among imports for the type checker."""
    graph = {name: used(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 300, "imports are found"
    assert not circle(graph)


def test_circles_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("folder", ALONE)
def test_some_folders_need_little(folder):
    own = f"disam_peft.{folder}"
    others = {
        f"{name} imports {found}"
        for name, path in MODULES.items()
        if top(name) == folder
        for found in imported(path)
        if top(found) not in sys.stdlib_module_names | ALONE[folder]
        and not any(found == allowed or found.startswith(f"{allowed}.") for allowed in {own, *ALONE[folder]})
        and found != "disam_peft"
    }
    assert any(top(name) == folder for name in MODULES)
    assert not others


@pytest.mark.slow
@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_one_home(library):
    users = {name for name, path in MODULES.items() if any(top(found) == library for found in imported(path))}
    assert users or library in ("timm",), f"nobody imports {library}"
    strangers = {name for name in users if not any(name == h or name.startswith(f"{h}.") for h in HOMES[library])}
    assert not strangers


def test_module_names_do_not_repeat():
    """But in config/, which mirrors the folders that it configures."""
    places: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        if path.stem not in REPEATED and top(name) != "config":
            places.setdefault(path.stem, []).append(name)
    assert not {stem: names for stem, names in places.items() if len(names) > 1}


def folders_on_the_page(text: str) -> set[str]:
    """Names with a slash in the page's layout, which is the fenced block that begins with ``disam_peft/``."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    [block] = [found for found in blocks if found.startswith("disam_peft/")]
    return set(_names(block.split("\n")[1:]))


def _names(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line and not line.startswith(" "):
            return  # docs/, tests/ and what else stands beside the package
        yield from re.findall(r"^ {2}(?: {4}){0,2}(\w+)/", line)


def test_the_page_and_the_tree_agree():
    if not PAGE.exists():
        pytest.skip(f"no {PAGE.relative_to(ROOT)} yet")
    text = PAGE.read_text(encoding="utf-8")
    on_page = folders_on_the_page(text)
    in_tree = {path.parent.name for path in MODULES.values() if path.parent != PACKAGE}
    assert on_page == in_tree
    for folder in {top(name) for name in MODULES}:
        found = re.search(rf"^ {{2}}{folder}(?:/|\.py) +\[(\d)\]", text, re.M)
        assert found, f"the page gives no floor for {folder}"
        assert int(found[1]) == FLOORS[folder], folder
