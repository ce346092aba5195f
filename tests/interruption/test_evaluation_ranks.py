"""Over any number of processes every sample is counted exactly once: nothing is padded, nothing is dropped."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers import evaluation_ranks
from tests.helpers.evaluation_ranks import BATCHES, SIZES, WORLDS
from tests.helpers.paths import environment


@pytest.fixture(scope="module")
def ranks(domains_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, evaluation_ranks.__file__, str(domains_folder), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
        for world in WORLDS
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
@pytest.mark.parametrize("world", WORLDS)
def test_row_45_every_sample_is_counted_once(ranks, world):
    """Sizes that no number of ranks divides, and ranks that get nothing at all."""
    assert len(ranks[world][0]) == len(SIZES) * len(BATCHES)
    for size in SIZES:
        for batch in BATCHES:
            [alone] = [found[f"{size} by {batch}"] for found in ranks[1]]
            shares = [found[f"{size} by {batch}"] for found in ranks[world]]
            assert sum(int(share["seen"]) for share in shares) == size, "padding would count some twice"
            most = -(-size // world)
            assert [int(share["seen"]) for share in shares] == sorted((int(s["seen"]) for s in shares), reverse=True)
            assert int(shares[0]["seen"]) == most
            for share in shares:
                assert torch.equal(share["logits"], alone["logits"]), "each sample's own logits, in its own place"
                assert torch.equal(share["labels"], alone["labels"])
                assert share["top1"] == alone["top1"]
    assert len(ranks[1][0]["25 by 4"]["logits"].unique(dim=0)) == 25, "no two samples could be confused"
