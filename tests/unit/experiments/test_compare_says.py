"""What a comparison says before its first run."""

from __future__ import annotations

import pytest

from disam_peft.experiments.compare import run_plan, what_is_run
from disam_peft.experiments.study import load_plan

STUDY = """
recipe:
  backbone: {name: demo}
  adapter: {kind: linear_probe}
  data: {shapes: {images_per_class: 3}, domains: [photo, sketch, cartoon]}
arms: [erm, disam]
held_out: [photo, sketch]
seeds: 2
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return load_plan(path, output=tmp_path / "out")


def test_arms_runs_how_many_at_once_and_kept_ones_are_said(plan):
    assert what_is_run(plan, plan.cells, 3) == "compare: 8 runs of erm, disam; 8 to do, 3 at once"
    assert what_is_run(plan, plan.cells, 16) == "compare: 8 runs of erm, disam; 8 to do, 4 at once", "they share data"
    assert what_is_run(plan, plan.cells[:2], 1).endswith("; 6 are finished and kept; 2 to do, one after the other")
    assert what_is_run(plan, [], 2) == "compare: 8 runs of erm, disam; 8 are finished and kept"


def test_it_is_said_before_the_first_run(plan, tmp_path, monkeypatch):
    class TheFirstRunBegins(Exception):
        pass

    def begin(*args, **kwargs):
        raise TheFirstRunBegins

    said = []
    monkeypatch.setattr("disam_peft.experiments.compare.run_cell", begin)
    with pytest.raises(TheFirstRunBegins):
        run_plan(plan, tmp_path / "out", jobs=1, say=said.append)
    assert said == ["compare: 8 runs of erm, disam; 8 to do, one after the other"]
