"""Every file of a run, damaged in every way: verbs give a result or an error for the user, never a traceback.

``DISAM_PEFT_MUTATIONS=60 pytest --full tests/matrix/test_mutated_runs.py`` takes that many versions of each file, and
``DISAM_PEFT_MUTATIONS_SEED=1`` others. ``-rP`` shows how many verbs were called, and which took longest.
"""

from __future__ import annotations

import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from disam_peft.cli import result_verbs, run_verbs, training_verbs
from disam_peft.config.recipe import Recipe, as_yaml
from disam_peft.errors import Stopped
from disam_peft.experiments import run
from disam_peft.experiments.evaluate import evaluate
from tests.helpers.folders import write_domains
from tests.helpers.mutated_runs import files_of, fresh_copy, outcome, some_mutations
from tests.helpers.shared_work import shared_work

EACH = int(os.environ.get("DISAM_PEFT_MUTATIONS", "10"))
"""Versions of each file; with the files of both runs more than 200 folders."""
SEED = os.environ.get("DISAM_PEFT_MUTATIONS_SEED", "")


@pytest.fixture
def make_recipe(tmp_path: Path, openclip_name: str) -> Callable[..., Recipe]:
    images = write_domains(tmp_path / "domains", count=4)

    def make(output: Path, adapter: str, **evaluation: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "name": "try",
                "output": output,
                "backbone": {"name": openclip_name},
                "adapter": {"kind": adapter},
                "data": {"root": images},
                "protocol": {"held_out": "photo"},
                "average": [{"kind": "none"}, {"kind": "ema"}],
                "train": {"steps": 4, "batch_size": 4, "workers": 0, "save_every": 2, "log_every": 1},
                "evaluation": {"workers": 0, **evaluation},
            }
        )

    return make


def test_row_61_a_finished_run_with_a_mutated_file(make_recipe, tmp_path, capsys):
    sharpness = {"samples": 6, "ascent_steps": 1, "hessian_iterations": 3, "slice_points": 3}
    recipe = make_recipe(tmp_path / "good", "lora", sharpness=sharpness)
    run.train(recipe)
    evaluate(recipe.folder("photo"))
    assert_no_faults(recipe, tmp_path, capsys)


def test_row_61_a_run_that_did_not_finish_with_a_mutated_file(make_recipe, tmp_path, monkeypatch, capsys):
    def stop(path, event, **values):
        if values.get("step") == 4:
            raise Stopped("for this test", 15)
        real(path, event, **values)

    recipe = make_recipe(tmp_path / "good", "linear_probe")
    real = run.append_event
    monkeypatch.setattr(run, "append_event", stop)
    with pytest.raises(Stopped):
        run.train(recipe)
    monkeypatch.setattr(run, "append_event", real)
    assert_no_faults(recipe, tmp_path, capsys)


def assert_no_faults(recipe, tmp_path, capsys):
    good, bad = recipe.output, tmp_path / "bad"
    again = tmp_path / "recipe.yaml"
    again.write_text(as_yaml(recipe.model_copy(update={"output": bad})))
    faults: dict[str, str] = {}  # by the end of the traceback: each fault once
    ends: Counter[tuple[str, str]] = Counter()
    seconds: dict[str, float] = defaultdict(float)
    longest = (0.0, "")
    folders = 0
    with shared_work():
        for file in files_of(good):
            name = file.relative_to(recipe.folder("photo")).as_posix()
            draw = random.Random(name + SEED)
            for label, mutate in some_mutations(file, draw, EACH):
                mutate(fresh_copy(good, bad) / file.relative_to(good))
                folders += 1
                for verb, call in verbs(bad, again, tmp_path / "exported" / str(folders)):
                    end = outcome(call)
                    shown = capsys.readouterr()
                    ends[verb, end.kind] += 1
                    seconds[verb] += end.seconds
                    longest = max(longest, (end.seconds, f"{verb} on {name}, {label[:80]}"))
                    if end.kind == "fault":
                        faults.setdefault(
                            "\n".join(end.text.splitlines()[-4:]), f"{verb} on {name}, {label}:\n{end.text}"
                        )
                    elif "\x1b" in shown.out + shown.err:
                        faults.setdefault(f"{verb} commands the terminal", f"{verb} on {name}, {label}: {shown}")
    print(f"{folders} folders, {ends.total()} verbs: {dict(sorted(ends.items()))}")
    print(f"seconds: { {verb: round(spent, 1) for verb, spent in seconds.items()} }; the longest call: {longest}")
    assert not faults, f"{len(faults)} faults in {folders} folders:\n\n" + "\n\n".join(faults.values())
    assert {kind for _, kind in ends} == {"result", "error"}, "some files matter, and some do not"


def verbs(folder: Path, recipe: Path, exported: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Those first that change nothing in the folder, so that each meets the file as it was mutated."""
    page = folder.parent / "report.html"
    yield "runs", lambda: run_verbs.runs(folder)
    yield "runs --json", lambda: run_verbs.runs(folder, as_json=True)
    yield "report", lambda: result_verbs.report([folder], page)
    yield "export", lambda: result_verbs.export(folder, "peft", exported)
    yield "train", lambda: training_verbs.train(recipe)
    yield "evaluate", lambda: result_verbs.evaluate(folder)
    yield "train --resume", lambda: training_verbs.train(recipe, resume=True)
