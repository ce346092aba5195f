"""Help, the version and mistakes in a recipe are answered before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import disam_peft

ROOT = Path(disam_peft.__file__).parents[1]
HEAVY = ("torch", "numpy", "transformers", "accelerate", "open_clip", "peft", "datasets", "torchvision", "matplotlib")
VERBS = (
    "cache",
    "check-data",
    "train",
    "sweep",
    "compare",
    "evaluate",
    "frontier",
    "soup",
    "export",
    "predict",
    "report",
    "demo",
    "doctor",
    "models",
)
CALL = """
import sys
from disam_peft.cli.app import main
sys.argv = ["disam-peft", *sys.argv[1:]]
try:
    main()
finally:
    print("heavy:", sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)
"""


def answer(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; what it imported stands at the end of standard error."""
    code = CALL.format(heavy=HEAVY)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    done = answer(*words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "heavy: []"
    assert done.stdout.strip() == f"disam-peft {disam_peft.__version__}" if words == ["--version"] else done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["train", "recipes/pacs/lora_disam.yaml"],
        ["sweep", "recipes/pacs/linear_probe_disam.yaml"],
        ["compare", "recipes/studies/c_methods.yaml"],
        ["compare", "recipes/pacs/lora_disam.yaml"],
        ["doctor", "recipes/pacs/lora_disam.yaml"],
    ],
    ids=" ".join,
)
def test_a_mistake_in_a_recipe_is_found_before_anything_heavy_is_imported(words: list[str]) -> None:
    done = answer(*words, "trian.steps=3")
    assert done.returncode == 2, done.stderr
    assert "trian: unknown key; did you mean 'train'" in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "heavy: []"


@pytest.mark.slow
def test_a_mistake_in_the_overrides_of_evaluate_is_found_as_early(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    text = (ROOT / "recipes/pacs/lora_disam.yaml").read_text(encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    done = answer("evaluate", tmp_path, "evaluation.batch_sice=3")
    assert done.returncode == 2, done.stderr
    assert "evaluation.batch_sice: unknown key; did you mean 'batch_size'" in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "heavy: []"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["linear_probe_disam.yaml", "--rho", "0.1;0.2"], "--rho '0.1;0.2' is not a list of numbers"),
        (["linear_probe_disam.yaml", "--rho", "0.1,-1"], "rhos: -1 is not 0 or more"),
        (["lora_disam.yaml", "--rho", "0.1"], "adapter.kind is 'lora'"),
    ],
)
def test_what_cannot_be_swept_is_found_as_early(words: list[str], message: str) -> None:
    recipe, *options = words
    done = answer("sweep", f"recipes/pacs/{recipe}", *options)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.strip().splitlines()[-1] == "heavy: []"


def test_python_m_runs_the_command_line() -> None:
    command = [sys.executable, "-m", "disam_peft.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"disam-peft {disam_peft.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", ".", "--to", "pefft", "--output", "out"], "--to 'pefft' is not one of peft, merged, lora; did you"),
        (["export", "docs", "--to", "peft", "--output", "out"], "no finished run in docs"),
    ],
)
def test_export_answers_mistakes_before_torch_is_imported(words: list[str], message: str) -> None:
    done = answer(*words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "torch" not in done.stderr.strip().splitlines()[-1]
