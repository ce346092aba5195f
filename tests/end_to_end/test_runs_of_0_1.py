"""What version 0.1 left behind keeps its worth: runs are kept, evaluated, reported, exported, compared, continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from disam_peft.common.records import ResultRow, read_results
from disam_peft.config.recipe import Recipe, load_recipe
from disam_peft.errors import UserError
from disam_peft.experiments import compare as comparing
from disam_peft.experiments import evaluate as evaluating
from disam_peft.experiments import run
from disam_peft.experiments.compare import compare
from disam_peft.experiments.export_run import export_run
from disam_peft.report.page import build_report
from disam_peft.report.runs import read_runs
from tests.helpers.paths import ROOT

OLD = ROOT / "tests/reference/runs_of_0.1"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder in which 0.1 worked; it is the current folder, as it was then."""
    shutil.copytree(OLD, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_key(rows: list[ResultRow]) -> dict[tuple[str, ...], float | None]:
    return {(row.adapter, row.method, row.held_out, row.split, row.domain, row.metric): row.value for row in rows}


def the_recipe(**changes: str) -> Recipe:
    return load_recipe(Path("r.yaml"), [f"{key}={value}" for key, value in changes.items()])


def test_the_recipe_lacks_settings_that_came_later(old: Path) -> None:
    """Or the tests below would prove nothing."""
    kept = yaml.safe_load((old / "runs/old/painting/recipe.yaml").read_text(encoding="utf-8"))
    assert Recipe.model_fields.keys() - kept.keys() >= {"average", "selection"}


def test_row_63_a_finished_run_is_kept_as_it_is(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(old / "runs/old")
    monkeypatch.setattr(run, "fit", lambda *_, **__: pytest.fail("a finished run was trained again"))
    [outcome] = run.train(the_recipe())
    assert outcome.fit is None
    assert outcome.rows == read_results(old / "runs/old/painting/results.json")
    assert {row.weights for row in outcome.rows} == {"raw"}, "of which 0.1 said nothing"
    assert {k: v for k, v in contents(old / "runs/old").items() if not k.endswith(".lock")} == before


def test_row_63_a_finished_run_is_evaluated_with_the_same_numbers(old: Path) -> None:
    recorded = by_key([row for row in read_results(old / "runs/old/painting/results.json") if row.method == "disam"])
    [outcome] = evaluating.evaluate(old / "runs/old")
    again = by_key(outcome.rows)
    assert again.keys() == recorded.keys()
    assert len(again) > 40
    for key, value in again.items():
        # 0.1 computed macro accuracy and ECE in float32; another machine rounds the rest in another order
        assert value == pytest.approx(recorded[key], abs=2e-6), key


def test_row_63_a_finished_run_is_reported(old: Path) -> None:
    build_report(read_runs([old / "runs/old"]), old / "report.html")
    rows = read_results(old / "runs/old/painting/results.json")
    [top1] = [row.value for row in rows if row.method == "disam" and row.domain == "painting" and row.metric == "top1"]
    assert top1 is not None
    assert f"{100 * top1:.1f}" in (old / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("to", "file"), [("peft", "adapter_model.safetensors"), ("merged", "open_clip_config.json")])
def test_row_63_a_finished_run_is_exported(old: Path, to: str, file: str) -> None:
    export_run(old / "runs/old", to, old / "out")
    assert (old / "out" / file).is_file()


def test_row_63_a_grid_is_kept(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = old / "comparisons/grid"
    before = contents(folder / "runs")
    verdicts = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(comparing, "run_cell", lambda *_: pytest.fail("a finished cell was run again"))
    found = compare(Path("grid.yaml"), Path("comparisons/grid"), jobs=1)
    assert len(found.runs) == 4
    assert not found.failed
    assert [[row.arm, row.metric, row.value] for row in found.rows if row.metric == "top1"] == [
        [row["arm"], row["metric"], row["value"]] for row in verdicts["rows"] if row["metric"] == "top1"
    ]
    assert contents(folder / "runs") == before


def test_row_63_an_interrupted_run_goes_on_or_says_how_to_start_again(old: Path) -> None:
    recipe = the_recipe(name="half")
    with pytest.raises(UserError, match="did not finish; --resume continues it, --overwrite starts it again"):
        run.train(recipe)
    before = contents(old / "runs/half/painting/checkpoints")
    with pytest.raises(UserError, match=r"0\.1.*--overwrite"):
        run.train(recipe, resume=True)
    assert contents(old / "runs/half/painting/checkpoints") == before, "nothing is lost by the attempt"
