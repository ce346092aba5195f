"""Every objective on two and on four ranks: the step of one process, bit-equal on all."""

import subprocess
import sys

import pytest
import torch

from tests.helpers import objectives
from tests.helpers.objectives import CASES, EVERYTHING, OBJECTIVES, WRAPPED, Problem, coral_objective
from tests.helpers.paths import environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over processes is tested on POSIX systems")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank has found, by the number of ranks."""
    found = {}

    def of(size):
        if size not in found:
            folder = tmp_path_factory.mktemp("ranks")
            command = [sys.executable, objectives.__file__, str(folder), str(size)]
            done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
            found[size] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]
        return found[size]

    return of


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("how", ["whole", "micro-batches"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_process(ranks, name, method, how, size):
    """Unequal shares, none among them, and domains that a rank lacks; micro-batches of another number on each rank."""
    gradients, report = Problem().step(OBJECTIVES[name](), method, EVERYTHING)
    on_rank = [of[f"{name}/{method}/{how}"] for of in ranks(size)]
    for found in on_rank:
        assert torch.equal(found["gradients"], on_rank[0]["gradients"])
        assert (found["gradients"] - gradients).abs().max() <= 1e-12
        assert found["objective"].item() == pytest.approx(report.objective.item(), abs=1e-12)
        assert found["loss"].item() == pytest.approx(report.loss.item(), abs=1e-12)
        assert bool(found["is_finite"])
        assert found["terms"].keys() == {**report.terms, **report.domain_terms}.keys()
        for kind, value in {**report.terms, **report.domain_terms}.items():
            assert (found["terms"][kind] - value).abs().max() <= 1e-12, kind
        assert found["state"].keys() == on_rank[0]["state"].keys()
        for key, value in found["state"].items():
            assert torch.equal(value, on_rank[0]["state"][key]), key


@pytest.mark.parametrize("name", WRAPPED)
def test_a_wrapper_that_averages_gradients(ranks, name):
    """Each rank's part of the surrogate counts twice then, the statistics' part too."""
    gradients, report = Problem().step(OBJECTIVES[name](), "disam", EVERYTHING)
    for found in (of[f"{name}/disam/wrapped"] for of in ranks(2)):
        assert (found["gradients"] - gradients).abs().max() <= 1e-12
        assert found["objective"].item() == pytest.approx(report.objective.item(), abs=1e-12)


def test_a_rank_that_runs_no_forward_cannot_know_the_sums_of_outputs(monkeypatch):
    """It would leave the others waiting in a collective of another size."""
    monkeypatch.setattr("disam_peft.disam.ranks.dist.is_initialized", lambda: True)
    monkeypatch.setattr("disam_peft.disam.ranks.dist.get_world_size", lambda group: 2)
    with pytest.raises(ValueError, match="also for a batch without samples"):
        Problem().step(coral_objective(), "sam", [], num_domains=3, reduce_gradients=True)
