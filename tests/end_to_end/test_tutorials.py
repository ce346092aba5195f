"""The tutorials of docs/extending.md, followed on a copy of the repository: tests pass, and a recipe uses them all."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT, environment
from tests.helpers.tutorials import PAGE, apply_all, blocks

BLOCKS = blocks(PAGE.read_text(encoding="utf-8"))
NEW = [block.path for block in BLOCKS if block.language == "python"]
# Tests of what every member of a kind promises; they find the new members by themselves.
OF_THE_KINDS = (
    "tests/unit/adapters/test_registry.py",
    "tests/unit/config",
    "tests/unit/objectives/test_contract.py",
    "tests/unit/objectives/test_every_term.py",
    "tests/unit/training/test_weight_averages.py",
    "tests/unit/training/test_selection.py",
    "tests/unit/training/test_trackers.py",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with every tutorial followed."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("disam_peft", "tests", "recipes", "docs", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    apply_all(BLOCKS, root)
    return root


def python(copy: Path, *arguments: str) -> str:
    """What a Python of the copy prints."""
    variables = environment(PYTHONPATH=str(copy))
    done = subprocess.run([sys.executable, *arguments], cwd=copy, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_tests(copy: Path, *arguments: str) -> None:
    """Run tests of the copy, which must pass, and of which there must be some."""
    printed = python(copy, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments)
    assert re.search(r"\b\d+ passed", printed), printed[-3000:]


def test_their_tests_and_those_of_their_kinds_pass(copy):
    own = [path for path in NEW if path.startswith("tests/")]
    assert len(own) >= 5
    run_tests(copy, *own, *OF_THE_KINDS)


def test_the_new_adapter_and_the_new_penalty_keep_what_all_of_their_kind_promise(copy):
    which = "feature_scale or (mean_prediction and (acts or whole or bits))"
    printed = python(copy, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/matrix", "-k", which, "--full")
    assert "failed" not in printed
    for new in ("feature_scale", "mean_prediction"):
        assert sum("PASSED" in line and new in line for line in printed.splitlines()) > 5, new


def test_they_keep_the_house_style(copy):
    python(copy, "-m", "ruff", "check", "--no-cache", *NEW)
    python(copy, "-m", "ruff", "format", "--no-cache", "--check", *NEW)


def test_a_recipe_uses_them_all(copy, tmp_path):
    python(
        copy,
        "-m",
        "disam_peft.cli",
        "train",
        "recipes/studies/lora.yaml",
        "adapter={kind: feature_scale}",
        "objective={penalties: [{kind: mean_prediction, weight: 0.5}]}",
        "average={kind: tail_mean, skip: 2}",
        "selection.rule=median_source",
        "train.tracker=csv",
        "train.steps=12",
        "data.shapes.images_per_class=4",
        "augment={kind: none}",
        f"output={tmp_path}",
    )
    [run] = tmp_path.glob("*/painting")
    rows = json.loads((run / "results.json").read_text())
    assert {"raw", "tail_mean"} == {row["weights"] for row in rows if row["method"] == "erm"}
    assert {row["adapter"] for row in rows} >= {"feature_scale"}
    assert (run / "tracking.csv").read_text().startswith("1,")
