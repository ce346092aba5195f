"""Every method and kind of schedule over kills, micro-batches and ranks: as whole batches on one process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from disam_peft.common.records import read_events
from disam_peft.disam.perturbation import AscentDirection
from disam_peft.training.trainer import Trainer
from tests.helpers import flatness_runs
from tests.helpers.flatness_runs import METHODS, ON_RANKS
from tests.helpers.interrupted import ended, ends_itself, result, saved
from tests.helpers.ranks import saved_by_ranks


@pytest.fixture(scope="module")
def alone(twins, domains_folder):
    found = {method: flatness_runs.run(twins, domains_folder, method, 1) for method in METHODS}
    for name, other in ((name, other) for name in METHODS for other in METHODS if name < other):
        assert (found[name] - found[other]).abs().max() > 1e-5, f"{name} and {other} differ"
    return found


def test_micro_batches_are_the_whole_batch(alone, twins, domains_folder):
    for method in METHODS:
        for pieces in (2, 4):
            found = flatness_runs.run(twins, domains_folder, method, pieces)
            assert (found - alone[method]).abs().max() <= 1e-12, (method, pieces)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo between forks is tested on POSIX systems")
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_are_one_process(alone, twins, domains_folder: Path, tmp_path: Path, size: int):
    ranks = saved_by_ranks(flatness_runs, size, *twins, str(domains_folder), folder=tmp_path)
    for method in METHODS:
        for way in ON_RANKS:
            assert all(torch.equal(rank[method][way], ranks[0][method][way]) for rank in ranks), (method, way)
            assert (ranks[0][method][way] - alone[method]).abs().max() <= 1e-12, (method, way)


SCHEDULED = {
    "name": "disam_gsam",
    "rho": {"kind": "follow_lr", "max": 0.3, "min": 0.1},
    "variance_weight": {"kind": "linear", "from": 0.1, "to": 0.7},
    "from": 0.2,
    "every": 2,
    "rho_factors": {"*lora_A*": 0.5},
}
PERTURBED = [4, 6, 8, 10, 12]
"""Of twelve steps that count from 1: three (0.2 of 12, rounded up) and then every second one are left out."""


@pytest.mark.skipif(os.name == "nt", reason="processes are forked and killed as POSIX systems do it")
def test_row_33_killed_in_every_step_a_scheduled_run_ends_in_the_same_bits(finished, make_recipe, start):
    changes = {"method": SCHEDULED, "train": {"save_every": 1}}
    expected, recipe = finished(**changes), make_recipe(**changes)
    for step in range(1, 12):  # each goes one step further, and is killed behind the next one
        assert ended(start(recipe, ends_itself(Trainer, "train_step", 2))) == -signal.SIGKILL
        assert saved(recipe)[-1] == f"step-{step:06}"
    assert ended(start(recipe)) == 0
    steps = [event for event in read_events(recipe.folder("photo") / "metrics.jsonl") if event["event"] == "step"]
    assert [event["step"] for event in steps if event["rho"] > 0] == PERTURBED
    assert result(recipe) == expected


@pytest.mark.skipif(os.name == "nt", reason="processes are forked and killed as POSIX systems do it")
def test_row_33_killed_while_perturbed_it_ends_in_the_same_bits(finished, make_recipe, start):
    changes = {"method": SCHEDULED, "train": {"save_every": 1}}
    expected, recipe = finished(**changes), make_recipe(**changes)
    for step in PERTURBED:  # steps that perturb nothing are in between
        assert ended(start(recipe, ends_itself(AscentDirection, "add_", 1 if step == 4 else 2))) == -signal.SIGKILL
        assert saved(recipe)[-1] == f"step-{step - 1:06}"
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected
