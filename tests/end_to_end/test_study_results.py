"""What the studies found is what their records say: everybody makes the page again, without a run."""

import re
import subprocess
import sys
from statistics import fmean

from disam_peft.experiments.demo import PAIRS, SINGLE_RUNS
from disam_peft.report.cell_records import read_records
from disam_peft.report.comparison import is_zero_shot
from tests.helpers.paths import RECIPES, ROOT, SCRIPTS, environment

RECORDS = sorted((RECIPES / "studies/records").glob("*.csv"))


def test_the_page_and_what_the_manual_shows_are_made_from_the_records(tmp_path):
    command = [sys.executable, str(SCRIPTS / "study_results.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment())
    written = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.suffix in (".md", ".svg")]
    assert {path.name for path in written} == {
        *("RESULTS.md", "README.md", "averages.md", "which_method.md", "which_method.svg"),
    }
    for name in written:
        if name.suffix == ".md":
            assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name
        else:  # another version of matplotlib draws the same with other bytes
            drawn = [re.findall(r">(\d+  [^<]+)<", (folder / name).read_text()) for folder in (tmp_path, ROOT)]
            assert drawn[0] == drawn[1]
            assert len(drawn[0]) > 20


def test_what_the_demo_says_of_single_runs_is_what_the_main_study_measured():
    values = {}
    for line in read_records(RECIPES / "studies/records/c_methods.csv"):
        values.setdefault(line.arm, {})[line.held_out, line.seed] = 100 * line.values["top1"]
    for (first, second), told in SINGLE_RUNS.items():
        differences = [values[first][place] - values[second][place] for place in values[first]]
        assert len(differences) == PAIRS
        assert told == tuple(round(x, 1) for x in (fmean(differences), min(differences), max(differences)))


def test_every_run_of_the_records_trained():
    assert RECORDS
    for path in RECORDS:
        lines = [line for line in read_records(path) if not is_zero_shot(line.arm)]
        assert len({line.key for line in lines}) == len(lines), "a line for each run and reading"
        assert all(line.values["gradients"] > 0 and 0 < line.values["source_top1"] < 1 for line in lines)
