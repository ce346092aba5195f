"""Every anchor on two ranks: the step of one process, bit-equal on both."""

import subprocess
import sys

import pytest
import torch

from tests.helpers import anchors
from tests.helpers.anchors import CASES, step
from tests.helpers.objectives import EVERYTHING
from tests.helpers.paths import environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over processes is tested on POSIX systems")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, anchors.__file__, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("how", ["whole", "micro-batches"])
def test_two_ranks_equal_one_process(ranks, name, method, how):
    """Unequal shares, and a domain that rank 1 lacks; micro-batches of another number on each rank. A distance of the
    model counts once, although both ranks compute it."""
    gradients, report = step(name, method, EVERYTHING)
    on_rank = [of[f"{name}/{method}/{how}"] for of in ranks]
    assert torch.equal(on_rank[0]["gradients"], on_rank[1]["gradients"])
    for found in on_rank:
        assert (found["gradients"] - gradients).abs().max() <= 1e-12
        assert found["objective"].item() == pytest.approx(report.objective.item(), abs=1e-12)
        assert list(found["terms"]) == list(report.terms) != []
        for kind, value in found["terms"].items():
            assert value.item() == pytest.approx(report.terms[kind].item(), abs=1e-12), kind
            assert torch.equal(value, on_rank[0]["terms"][kind]), "to the bit"
