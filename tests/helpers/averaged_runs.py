"""Runs of ``fit`` with averages of every kind; run as a program, on several gloo processes. Imports no pytest."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from disam_peft.adapters.prompts import ClassPrompts
from disam_peft.config.average import BmaConfig, EmaConfig, KeptAverageConfig, SwaConfig, SwadConfig
from disam_peft.config.data import AugmentConfig, DataConfig
from disam_peft.config.method import MethodConfig
from disam_peft.config.training import TrainConfig
from disam_peft.data.load import load
from disam_peft.training.accelerator import start_accelerator
from disam_peft.training.fit import fit
from disam_peft.training.selection import Validation
from tests.helpers.adapter_cells import CELLS, tiny_backbone, tiny_classifier
from tests.helpers.ranks import fork_ranks

STEPS = 6
AVERAGES: tuple[KeptAverageConfig, ...] = (
    EmaConfig(decay=0.6),
    SwaConfig(start=0.3, every=2, judged="always"),
    BmaConfig(),
    SwadConfig(n_converge=1, n_tolerance=2, tolerance_ratio=5.0),
    SwadConfig(n_converge=1, n_tolerance=2, tolerance_ratio=0.0),
    SwadConfig(n_converge=1, n_tolerance=3, tolerance_ratio=5.0, variant="published"),
)
"""Of SWAD a window without an end, one with an end, and one of the published variant."""
ON_RANKS = {"whole": 1, "micro-batches": 3}


def run(twins: tuple[str, str], folder: Path, pieces: int) -> dict[str, Tensor]:
    """The last state of the weights (``raw``) and of every average after a few steps in float64, ``pieces`` to a step.

    The validation loss grows with the distance from the start, so that it depends on the weights.
    """
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    dataset = load(DataConfig(root=folder))
    prompts = ClassPrompts(dataset.prompt_names, ("a photo of a {}.",))
    classifier = tiny_classifier(tiny_backbone(twins, "open_clip"), CELLS["lora-image"], prompts=prompts)
    judged = 0

    def vector() -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in classifier.trainable().values()])

    start = vector()

    def validate() -> Validation:
        nonlocal judged
        judged += 1  # the last state that is judged is the best one
        return Validation((float(judged),), {}, loss=1.0 + float((vector() - start).norm()))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*of the domain weights were negative.*")
        found = fit(
            classifier,
            dataset,
            method=MethodConfig(rho=0.3, variance_weight=0.6),
            config=TrainConfig(
                steps=STEPS,
                batch_size=13,
                gradient_accumulation_steps=pieces,
                optimizer="sgd",
                schedule="constant",
                learning_rate=0.05,
                validate_every=1,
                workers=0,
            ),
            averages=AVERAGES,
            augment=AugmentConfig(kind="none"),
            accelerator=start_accelerator(),
            validate=validate,
        )
    return {
        name: torch.cat([tensor.reshape(-1) for tensor in state.tensors.values()])
        for name, state in found.states.items()
    }


def main(size: str, port: str, open_clip: str, transformers: str, folder: str, output: str) -> None:
    """All of ``ON_RANKS`` on ``size`` ranks, forks of this process."""
    torch.set_num_threads(1)

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = {name: run((open_clip, transformers), Path(folder), pieces) for name, pieces in ON_RANKS.items()}
        assert PartialState().num_processes == int(size)
        torch.save(found, f"{output}/{rank}.pt")

    fork_ranks(int(size), work)


if __name__ == "__main__":
    main(*sys.argv[1:])
