"""Row 76: the tasks of a SLURM step know each other from SLURM's variables."""

import os

import pytest

from disam_peft.common import processes
from disam_peft.common.slurm import SlurmTask, leave_the_step, slurm_task

TWO = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711"}
PORT = 15000 + (31 * 4711) % 17000


def test_row_76_two_tasks_on_one_node():
    task = slurm_task(TWO)
    assert task == SlurmTask(1, 2, 1, 2, "127.0.0.1", PORT)
    assert task.variables() == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(PORT),
    }
    assert slurm_task({**TWO, "SLURM_STEP_NODELIST": "node07", "SLURM_NNODES": "1"}) == task
    assert slurm_task({**TWO, "SLURM_STEP_NODELIST": "node07"}) == task


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[03-07,9],other", "node03"),
        ("a,b", "a"),
        ("gpu-a[12]", "gpu-a12"),
        ("n[1,3]", "n1"),
        ("x1.cluster,x2.cluster", "x1.cluster"),
    ],
)
def test_row_76_several_nodes_meet_at_the_first(nodes, first):
    several = {**TWO, "SLURM_NTASKS": "7", "SLURM_NNODES": "4", "SLURM_STEP_NODELIST": nodes, "SLURM_NODEID": "3"}
    task = slurm_task({**several, "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_PROCID": "6", "SLURM_LOCALID": "0"})
    assert task is not None
    assert (task.address, task.rank, task.tasks, task.local_rank, task.local_tasks) == (first, 6, 7, 0, 1)


def test_row_76_steps_of_one_job_meet_at_different_ports_and_a_given_place_is_kept():
    first, second = (slurm_task({**TWO, "SLURM_STEP_ID": step}) for step in "01")
    assert first is not None and second is not None and second.port == first.port + 1
    given = slurm_task({**TWO, "MASTER_ADDR": "10.0.0.3", "MASTER_PORT": "12345"})
    assert given is not None and (given.address, given.port) == ("10.0.0.3", 12345)


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_NTASKS": "1"},
        {"SLURM_PROCID": ""},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0"},
    ],
    ids=str,
)
def test_row_76_who_is_alone_or_launched_otherwise_is_no_task(changes):
    assert slurm_task({**TWO, **changes}) is None


def test_row_76_srun_in_a_batch_script_is_a_step():
    assert slurm_task({**TWO, "ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}) is not None


def test_row_76_the_first_task_alone_speaks_until_a_process_leaves_the_step(monkeypatch):
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    assert not processes.is_main()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.is_main()
    monkeypatch.setenv("SLURM_PROCID", "1")
    leave_the_step()
    assert processes.is_main() and "SLURM_PROCID" not in os.environ and slurm_task() is None
