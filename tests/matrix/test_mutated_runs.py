"""Every file of a run, damaged in every way: verbs give a result or an error for the user, never a traceback.

``DISAM_PEFT_MUTATIONS=20 pytest --full tests/matrix/test_mutated_runs.py`` takes that many of each file.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from disam_peft.config.recipe import Recipe
from disam_peft.errors import Stopped
from disam_peft.experiments import run
from disam_peft.experiments.evaluate import evaluate
from disam_peft.experiments.export_run import export_run
from disam_peft.report.page import build_report
from disam_peft.report.runs import read_runs
from tests.helpers.mutated_runs import files_of, fresh_copy, mutations, outcome_of

EACH = int(os.environ.get("DISAM_PEFT_MUTATIONS", "24"))
"""Versions of each file; with the files of both runs more than 400 folders."""


@pytest.fixture(scope="module")
def make_recipe(domains_folder: Path, openclip_name: str) -> Callable[..., Recipe]:
    def make(output: Path, adapter: str = "lora") -> Recipe:
        return Recipe.model_validate(
            {
                "name": "try",
                "output": output,
                "backbone": {"name": openclip_name},
                "adapter": {"kind": adapter},
                "data": {"root": domains_folder},
                "protocol": {"held_out": "photo"},
                "average": [{"kind": "none"}, {"kind": "ema"}],
                "train": {"steps": 4, "batch_size": 4, "workers": 0, "save_every": 2, "log_every": 1},
                "evaluation": {
                    "workers": 0,
                    "sharpness": {"samples": 6, "ascent_steps": 1, "hessian_iterations": 3, "slice_points": 3},
                },
            }
        )

    return make


def test_row_61_a_finished_run_with_a_mutated_file(make_recipe, tmp_path):
    recipe = make_recipe(tmp_path / "good")
    run.train(recipe)
    evaluate(recipe.folder("photo"))
    assert_no_faults(recipe, tmp_path, make_recipe, resume=False)


def test_row_61_a_run_that_did_not_finish_with_a_mutated_file(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path / "good", "linear_probe")

    def stop(path, event, **values):
        if values.get("step") == 4:
            raise Stopped("for this test", 15)
        real(path, event, **values)

    real = run.append_event
    monkeypatch.setattr(run, "append_event", stop)
    with pytest.raises(Stopped):
        run.train(recipe)
    monkeypatch.setattr(run, "append_event", real)
    assert_no_faults(recipe, tmp_path, make_recipe, resume=True)


def assert_no_faults(recipe, tmp_path, make_recipe, *, resume):
    good, bad = recipe.output, tmp_path / "bad"
    faults: dict[str, str] = {}  # by the end of the traceback: each fault once
    folders = 0
    for file in files_of(good):
        draw = random.Random(file.name)
        for name, mutate in islice(mutations(file, draw), EACH):
            place = fresh_copy(good, bad) / file.relative_to(good)
            mutate(place)
            folders += 1
            for verb, call in verbs(bad, make_recipe(bad, recipe.adapter.kind), tmp_path, resume=resume):
                if fault := outcome_of(call):
                    where = f"{verb} on {file.relative_to(good)}, {name}"
                    faults.setdefault("\n".join(fault.splitlines()[-4:]), f"{where}:\n{fault}")
    assert not faults, f"{len(faults)} faults in {folders} folders:\n\n" + "\n\n".join(faults.values())


def verbs(folder: Path, recipe: Recipe, tmp_path: Path, *, resume: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    if not resume:
        yield "evaluate", lambda: evaluate(folder)
        yield "report", lambda: build_report(read_runs([folder]), tmp_path / "report.html")
        yield "export", lambda: export_run(folder, "peft", tmp_path / os.urandom(4).hex())
    yield "train", lambda: run.train(recipe, resume=resume)
