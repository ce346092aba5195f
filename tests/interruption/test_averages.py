"""Every average over kills, micro-batches and ranks: that of a run of whole batches on one process."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from disam_peft.disam.perturbation import AscentDirection
from tests.helpers import averaged_runs
from tests.helpers.averaged_runs import AVERAGES, ON_RANKS
from tests.helpers.interrupted import ended, ends_itself, result, saved
from tests.helpers.ranks import saved_by_ranks

NAMES = ["raw", "ema", "swa", "bma", "swad", "swad_2", "swad_3"]


@pytest.fixture(scope="module")
def alone(twins, domains_folder):
    found = averaged_runs.run(twins, domains_folder, 1)
    assert sorted(found) == sorted(NAMES)
    for name, other in ((name, other) for name in NAMES for other in NAMES if name < other):
        assert (found[name] - found[other]).abs().max() > 1e-5, f"{name} and {other} differ"
    return found


def test_micro_batches_make_no_other_average(alone, twins, domains_folder):
    for pieces in (2, 4):
        found = averaged_runs.run(twins, domains_folder, pieces)
        for name in NAMES:
            assert (found[name] - alone[name]).abs().max() <= 1e-12, (pieces, name)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo between forks is tested on POSIX systems")
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_make_no_other_average(alone, twins, domains_folder: Path, tmp_path: Path, size: int):
    ranks = saved_by_ranks(averaged_runs, size, *twins, str(domains_folder), folder=tmp_path)
    for how in ON_RANKS:
        for name in NAMES:
            assert all(torch.equal(rank[how][name], ranks[0][how][name]) for rank in ranks), (how, name)
            assert (ranks[0][how][name] - alone[name]).abs().max() <= 1e-12, (how, name)


@pytest.mark.skipif(os.name == "nt", reason="processes are forked and killed as POSIX systems do it")
def test_row_33_killed_in_every_step_a_run_ends_in_the_same_bits(finished, make_recipe, start):
    averages = [average.model_dump(mode="json") for average in AVERAGES]
    changes = {"average": averages, "train": {"save_every": 1}}
    expected, recipe = finished(**changes), make_recipe(**changes)
    for step in range(1, 12):  # each goes one step further
        assert ended(start(recipe, ends_itself(AscentDirection, "add_", 2))) == -signal.SIGKILL
        assert saved(recipe)[-1] == f"step-{step:06}"
    assert ended(start(recipe)) == 0
    assert result(recipe) == expected
