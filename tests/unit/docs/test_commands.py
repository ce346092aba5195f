"""Commands that the documents and the recipes' headers show: their verbs, options and settings exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from disam_peft.cli.app import app
from disam_peft.config.recipe import load_recipe
from tests.helpers.paths import RECIPES, ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(RECIPES.rglob("*.md"))]
RECIPE_FILES = sorted(RECIPES.rglob("*.yaml"))
VERBS = typer.main.get_group(app).commands


def commands(text: str) -> list[str]:
    """Lines of fenced blocks and of headers of recipes that call disam-peft, without their remarks."""
    lines = [
        line.strip() for block in re.findall(r"^```[^\n]*\n(.*?)^```$", text, re.M | re.S) for line in block.split("\n")
    ]
    lines += [line.strip("# ") for line in text.split("\n") if re.match(r"# {3}disam-peft ", line)]
    found = [line[match.start() :] for line in lines if (match := re.search(r"\bdisam-peft [a-z-]", line))]
    return [re.sub(r"\s+#.*", "", line) for line in found]


def all_commands() -> list[tuple[str, str]]:
    pages = [*PAGES, *RECIPE_FILES]
    return [
        (str(page.relative_to(ROOT)), line) for page in pages for line in commands(page.read_text(encoding="utf-8"))
    ]


def test_verbs_in_backticks_exist():
    for page in PAGES:
        for verb in re.findall(r"`disam-peft ([a-z][a-z-]*)", page.read_text(encoding="utf-8")):
            assert verb in VERBS, f"{page}: {verb}"


def test_commands_are_found():
    assert len(all_commands()) > 40
    assert commands("```\npip install x && disam-peft train a.yaml b=c   # remark\n```") == [
        "disam-peft train a.yaml b=c"
    ]


@pytest.mark.parametrize(("page", "line"), all_commands())
def test_a_command_can_be_given(page: str, line: str):
    """Parsed by the command line itself; what is optional in the text, as ``[RECIPE]``, counts as given."""
    name, *arguments = shlex.split(re.sub(r"[\[\]](?=[A-Z]|\s|$)", "", line.removeprefix("disam-peft ")))
    if name == "--version":
        return
    assert name in VERBS, f"{page}: {line}"
    verb = VERBS[name]
    context = verb.make_context(name, arguments, resilient_parsing=False)
    given = context.params.get("recipe")
    recipe = None if given is None else ROOT / given
    if recipe is not None and "RECIPE" not in str(given):
        shown = load_recipe(recipe, context.params.get("overrides") or [])
        if name == "train":
            annealed = [p for p in shown.objective.penalties if p.model_dump().get("anneal", 0) >= shown.train.steps]
            assert not annealed, "the weight of a penalty takes effect within the run"


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe_begins_with_its_launch_command_and_its_score(path: Path):
    header = path.read_text(encoding="utf-8").split("\nname:")[0].split("\nquestion:")[0].split("\n")
    assert all(line.startswith("#") for line in header)
    assert all(len(line) <= 120 for line in header)
    here = path.relative_to(ROOT)
    assert any(re.match(rf"# {{3}}disam-peft (train|compare) {here}( |$)", line) for line in header)
    scores = [line for line in header if re.match(r"# (Score|Answer)\b", line)]
    assert len(scores) == 1
    assert re.search(r"\(measured|not measured here", scores[0])


def test_there_are_recipes():
    assert len(RECIPE_FILES) >= 17
