"""Parity with the authors' own optimiser classes."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from disam_peft import DISAM
from tests.helpers import paths

REFERENCE = np.load(paths.REFERENCE / "disam_trajectories.npz")
META = json.loads(str(REFERENCE["meta"]))
DESCENTS = {"erm": "sam", "sam": "sam", "disam": "sam", "gsam": "gsam", "sagm": "sagm"}


def test_every_kind_of_case_is_driven():
    assert {about["kind"] for about in META.values()} == set(DESCENTS)


@pytest.mark.parametrize("case", sorted(META))
def test_trajectory(case):
    about = META[case]
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    params = list(model.parameters())
    nn.utils.vector_to_parameters(torch.from_numpy(REFERENCE[f"{case}/init"]), params)
    optimizer: torch.optim.Optimizer
    if about["base"] == "sgd":
        optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.01)
    variance_weight = about["lam"] if about["kind"] == "disam" else 0.0
    disam = DISAM(
        params,
        about["rho"],
        variance_weight,
        about.get("adaptive", False),
        descent=DESCENTS[about["kind"]],
        alpha=about.get("alpha"),
    )

    for step, expected in enumerate(REFERENCE[f"{case}/params"]):
        x, y, d = (torch.from_numpy(REFERENCE[f"{case}/{key}"][step]) for key in "XYD")
        disam.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y, reduction="none"), d)
        optimizer.step()
        difference = np.abs(nn.utils.parameters_to_vector(params).detach().numpy() - expected).max()
        assert difference <= 1e-10, f"step {step}: {difference:.3g}"
