"""Row 77: several processes work on the runs of one folder, each run is done once, and nobody fails."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from disam_peft.common.locks import locked
from disam_peft.common.records import METRICS, read_events
from disam_peft.errors import UserError
from disam_peft.experiments import run
from disam_peft.experiments.compare import run_plan
from disam_peft.experiments.study import load_plan
from disam_peft.report.comparison import read_comparison
from tests.helpers.interrupted import ended, forked

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="processes are forked"),
    pytest.mark.filterwarnings("ignore::disam_peft.errors.Notice"),
]
STUDY = """
recipe:
  backbone: {name: demo}
  adapter: {kind: linear_probe}
  augment: {kind: none}
  data: {shapes: {images_per_class: 2}, domains: [photo, sketch, cartoon]}
  train: {steps: 4, batch_size: 6, learning_rate: 0.01, workers: 0}
  evaluation: {workers: 0}
arms: [erm, disam]
held_out: [photo, sketch, cartoon]
seeds: 1
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY)
    return load_plan(path, output=tmp_path / "out")


def until(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_row_77_two_comparisons_share_the_cells(plan, tmp_path):
    output, report = tmp_path / "out", tmp_path / "trained"
    report.mkdir()

    def compared(number: int) -> None:
        real = run._train_one

        def counted(recipe, *arguments, **options):
            with open(report / str(number), "a") as file:
                file.write(f"{recipe.folder(recipe.protocol.held_out)}\n")
            return real(recipe, *arguments, **options)

        run._train_one = counted
        found = run_plan(plan, output, jobs=1)
        assert not found.failed and len(found.runs) == 6

    processes = [forked(lambda number=number: compared(number)) for number in range(2)]
    assert [ended(pid) for pid in processes] == [0, 0]
    trained = [line for path in report.iterdir() for line in path.read_text().splitlines()]
    assert sorted(trained) == sorted(str(cell.folder) for cell in plan.cells), "each once"
    assert len(list(report.iterdir())) == 2, "both took some"
    assert len(read_comparison(output).runs) == 6 and (output / "comparison.html").is_file()


def test_row_77_a_busy_cell_is_done_last_and_waited_for(plan, tmp_path):
    output, busy, free = tmp_path / "out", plan.cells[0].folder, tmp_path / "free"

    def holds() -> None:
        with locked(busy):
            (tmp_path / "held").touch()
            until(free)

    holder = forked(holds)
    until(tmp_path / "held")
    comparing = forked(lambda: run_plan(plan, output, jobs=1))
    for cell in plan.cells[1:]:
        until(cell.folder / "finished.json")
    time.sleep(1.5)
    assert os.waitpid(comparing, os.WNOHANG) == (0, 0) and not (output / "comparison.json").exists()
    free.touch()
    assert ended(holder) == ended(comparing) == 0
    assert not read_comparison(output).failed and (busy / "finished.json").is_file()


def test_row_77_without_waiting_a_busy_cell_is_the_error_of_row_36(plan, tmp_path):
    with locked(plan.cells[0].folder):
        found = run_plan(plan, tmp_path / "out", jobs=1, wait=False)
    [failed] = found.failed
    assert f"{plan.cells[0].folder} is in use by process {os.getpid()}" in failed.error
    assert len(found.runs) == 5


def test_row_77_a_cell_of_a_killed_comparison_goes_on(plan, tmp_path):
    output = tmp_path / "out"

    def killed() -> None:
        real = run.append_event

        def append(path, event, **values):
            real(path, event, **values)
            if event == "validation":
                (tmp_path / "begun").touch()
                time.sleep(60)

        run.append_event = append
        run_plan(plan, output, jobs=1)

    first = forked(killed)
    until(tmp_path / "begun")
    second = forked(lambda: run_plan(plan, output, jobs=1))
    until(plan.cells[-1].folder / "finished.json")
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert ended(second) == 0
    assert not read_comparison(output).failed


def test_a_cell_that_cannot_go_on_says_how_to_run_it_alone_again(plan, tmp_path):
    cell = plan.cells[1]
    run_plan(plan, tmp_path / "out", jobs=1)
    recipe = cell.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("steps: 4", "steps: 5"))
    found = run_plan(plan, tmp_path / "out", jobs=1)
    [failed] = found.failed
    assert "holds another run" in failed.error
    assert failed.error.endswith(
        f"Here --overwrite runs every cell again: to run this one alone again, remove {cell.folder}"
    )


def test_row_77_held_out_all_is_shared_by_two_processes(make_recipe, warm, tmp_path):
    recipe, report = make_recipe(protocol={"held_out": "all"}), tmp_path / "trained"
    report.mkdir()

    def trained(number: int) -> None:
        warm()
        outcomes = run.train(recipe)
        assert [outcome.held_out for outcome in outcomes] == ["art", "cartoon", "photo"]
        (report / str(number)).write_text(json.dumps([o.held_out for o in outcomes if o.fit is not None]))

    processes = [forked(lambda number=number: trained(number)) for number in range(2)]
    assert [ended(pid) for pid in processes] == [0, 0]
    done = [json.loads(path.read_text()) for path in sorted(report.iterdir())]
    assert sorted(done[0] + done[1]) == ["art", "cartoon", "photo"] and all(done)
    for domain in ("art", "cartoon", "photo"):
        assert len(read_events(recipe.folder(domain) / METRICS, "trained")) == 1


def test_row_77_held_out_all_refuses_before_it_begins(make_recipe, start):
    recipe = make_recipe(protocol={"held_out": "all"})
    with locked(recipe.folder("photo")), pytest.raises(UserError, match="in use by process"):
        run.train(recipe, wait=False)
    folder = recipe.folder("photo")
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no run"):
        run.train(recipe)
    assert not recipe.folder("art").exists() and not recipe.folder("cartoon").exists()
