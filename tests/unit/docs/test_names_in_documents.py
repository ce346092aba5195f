"""Paths and modules that the documents name are there."""

import importlib.util
import re
from dataclasses import fields

import pytest

from disam_peft.common.records import ResultRow
from tests.helpers.paths import RECIPES, ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(RECIPES.rglob("*.md"))]


def paths(text: str) -> list[str]:
    """Paths of files and folders in backticks; not those with a place to fill in."""
    found = re.findall(r"`([\w./-]+/[\w.-]*)`", text)
    return [path for path in found if re.search(r"\.(py|ya?ml|md|npz|toml)$|/$", path)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_a_document_are_there(page):
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":
        text = text[: text.index("## [0.1.0]")]
    # what runs leave, and what is planned and says so
    elsewhere = {
        "runs/",
        "adapter/",
        "checkpoints/",
        "repairs/",
        "disam-peft-demo/",
        "inference/",
        "integrations/",
        "app/",
        "data/prepare/",
    }
    folders = (ROOT, ROOT / "disam_peft", page.parent)
    missing = [p for p in paths(text) if p not in elsewhere and not any((folder / p).exists() for folder in folders)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert not [target for target in targets if target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", ["README.md", "docs/guide/runs.md"])
def test_the_fields_of_a_row_of_results_are_all_named(page):
    [listed] = re.findall(r"a flat list of rows\s\{([^}]*)\}", (ROOT / page).read_text(encoding="utf-8"))
    assert listed.split(", ") == [field.name for field in fields(ResultRow)]


def test_the_paths_are_found():
    assert sum(len(paths(page.read_text(encoding="utf-8"))) for page in PAGES) > 40
    assert paths("see `disam/ascent.py`, `no_path.py`, `runs/<name>/` and `recipes/`") == [
        "disam/ascent.py",
        "recipes/",
    ]


def modules_of_the_table() -> list[str]:
    """Modules in the right column of the changelog's table; ``.splits`` follows the folder of the one before it."""
    found: list[str] = []
    for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines():
        cells = line.split("|")
        if len(cells) == 4 and cells[1].strip().startswith("`disam_peft"):
            for name in re.findall(r"`([\w.]+)`", cells[2]):
                found.append(found[-1].rpartition(".")[0] + name if name.startswith(".") else name)
    return found


def test_modules_that_the_changelog_sends_to_can_be_imported():
    names = modules_of_the_table()
    assert len(names) > 30
    assert not [name for name in names if importlib.util.find_spec(name) is None]
