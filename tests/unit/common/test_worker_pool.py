"""Processes that live for many tasks. This file imports little: each of them imports it again."""

import os
import signal

import pytest

from disam_peft.common.worker_pool import Died, Finished, spread


def work(task):
    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid(), task


def test_processes_keep_their_group_and_one_that_dies_takes_nothing_with_it():
    groups = [["a1", "a2", "a3"], ["b1", "die", "b3"], ["c1"]]
    found = dict(spread(groups, work, 2))
    assert set(found) == {task for group in groups for task in group}
    assert found["die"] == Died(-signal.SIGKILL)
    values = {task: result.value for task, result in found.items() if isinstance(result, Finished)}
    assert all(value[1] == task for task, value in values.items())
    process = {task: value[0] for task, value in values.items()}
    assert process["a1"] == process["a2"] == process["a3"] != process["b1"]
    assert process["b3"] not in (process["b1"], process["a1"]), "a new one took over"


def test_leaving_early_ends_the_processes():
    work_to_do = spread([["a"], ["b"], ["c"], ["d"]], work, 1)
    _, result = next(work_to_do)
    work_to_do.close()  # type: ignore[attr-defined]  # it is a generator
    with pytest.raises(ProcessLookupError):
        os.kill(result.value[0], 0)
