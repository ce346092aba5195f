"""Adapters that start from training features start alike on any number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import class_means
from tests.helpers.paths import environment


@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
def test_two_and_four_processes_share_the_images_and_start_with_the_bits_of_one(
    openclip_name: str, domains_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, class_means.__file__, openclip_name, str(domains_folder), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    [alone] = [torch.load(tmp_path / "1" / "0.pt", weights_only=True)]
    ranks = [torch.load(tmp_path / "2" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert int(alone["images seen"]) == 96
    assert [int(rank["images seen"]) for rank in ranks] == [64, 32], "whole batches to each, no image twice"
    four = [torch.load(tmp_path / "4" / f"{rank}.pt", weights_only=True) for rank in range(4)]
    assert [int(rank["images seen"]) for rank in four] == [64, 32, 0, 0]
    names = [name for name in alone if not name.endswith("seen")]
    assert {
        "images weight",
        "store images_CD",
        "images probe head.weight",
        "store probe training_loss",
        "images cache alpha",
        "images ridge scale",
    } < set(names)
    for name in names:
        assert alone[name].count_nonzero() > 0
        assert all(torch.equal(rank[name], alone[name]) for rank in (*ranks, *four)), name
