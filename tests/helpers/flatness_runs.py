"""Runs of ``fit`` with every method and kind of schedule; run as a program, on several gloo processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor

from disam_peft.config.method import MethodConfig
from tests.helpers import accumulated_runs
from tests.helpers.ranks import fork_ranks

STEPS = 5
METHODS: dict[str, dict[str, Any]] = {
    "gsam": {"name": "gsam", "rho": {"kind": "follow_lr", "max": 0.3, "min": 0.1}, "rho_factors": {"*lora_A*": 0.5}},
    "sagm": {"name": "sagm", "rho": {"kind": "cosine", "from": 0.4, "to": 0.1, "warmup_steps": 1}, "alpha": 0.5},
    "disam_gsam": {
        "name": "disam_gsam",
        "rho": {"kind": "linear", "from": 0.4, "to": 0.1},
        "variance_weight": 0.6,
        "variance_scale": "relative",
        "from": 0.2,
        "every": 2,
    },
    "disam_sagm": {
        "name": "disam_sagm",
        "rho": {"kind": "constant", "value": 0.3, "warmup_steps": 2, "warmup_from": 0.1},
        "variance_weight": {"kind": "linear", "from": 0.2, "to": 0.9},
        "variance_form": "entropic",
        "alpha": 0.5,
    },
    "disam adaptive": {"adaptive": True, "rho": {"kind": "cosine", "from": 1.0, "to": 0.0}, "variance_over": "samples"},
}
ON_RANKS = {"whole": 1, "micro-batches": 3}


def run(twins: tuple[str, str], folder: Path, method: str, pieces: int) -> Tensor:
    """The trained weights after a few steps of SGD with momentum in float64, ``pieces`` micro-batches to a step."""
    accumulated_runs.METHODS[method] = MethodConfig.model_validate(METHODS[method])
    return accumulated_runs.run(twins, folder, pieces, method=method, batch=13, steps=STEPS)[0]


def main(size: str, port: str, open_clip: str, transformers: str, folder: str, output: str) -> None:
    """Every method in each way of ``ON_RANKS`` on ``size`` ranks, forks of this process."""
    torch.set_num_threads(1)

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = {
            method: {
                way: run((open_clip, transformers), Path(folder), method, pieces) for way, pieces in ON_RANKS.items()
            }
            for method in METHODS
        }
        assert PartialState().num_processes == int(size)
        torch.save(found, f"{output}/{rank}.pt")

    fork_ranks(int(size), work)


if __name__ == "__main__":
    main(*sys.argv[1:])
