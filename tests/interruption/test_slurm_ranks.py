"""Row 76: ``srun -n 2`` without torchrun trains one run in two processes."""

import hashlib
import os
import random

import pytest

from disam_peft.experiments import run
from disam_peft.training import accelerator
from tests.helpers.interrupted import ended, forked

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are forked")


def step(job: int) -> list[dict[str, str]]:
    """What srun tells its two tasks."""
    shared = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_NODELIST": "node07", "SLURM_JOB_ID": str(job)}
    return [{**shared, "SLURM_STEP_ID": "0", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]


def test_row_76_two_tasks_are_two_processes_of_one_run(make_recipe, start_two, finished, warm):
    expected = finished(start_two)
    recipe = make_recipe()
    folder = recipe.folder(recipe.protocol.held_out)

    def train() -> None:
        warm()
        [outcome] = run.train(recipe)
        assert outcome.fit is not None

    pids = [forked(train, environment=environment) for environment in step(random.randrange(10**6))]
    assert [ended(pid) for pid in pids] == [0, 0]
    assert (folder / "results.json").is_file()
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == set(expected), "one run, and no traces of a second one"
    adapter = "adapter/adapter_model.safetensors"
    assert hashlib.sha256((folder / adapter).read_bytes()).hexdigest() == expected[adapter]


def test_row_76_tasks_that_cannot_meet_are_told_the_right_command(make_recipe, warm, capfd):
    recipe, [first, _] = make_recipe(train={"timeout_minutes": 0.05}), step(4711)

    def train() -> None:
        warm()
        run.train(recipe)

    assert ended(forked(train, environment={**first, "MASTER_PORT": "1", "MASTER_ADDR": "127.0.0.1"})) == 2
    err = capfd.readouterr().err
    assert "the 2 tasks of this SLURM step could not meet at 127.0.0.1, port 1" in err
    assert "torchrun" in err and "MASTER_ADDR" in err
    assert not recipe.folder("photo").exists()


def test_row_76_a_batch_script_is_one_process_and_says_so(monkeypatch):
    for name, value in {"ENVIRONMENT": "BATCH", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"may start 4 tasks, and this is one process; srun disam-peft"):
        assert accelerator.start_accelerator().num_processes == 1
