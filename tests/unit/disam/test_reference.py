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
CASES = sorted(name for name, about in META.items() if about["kind"] in ("erm", "sgd", "sam", "disam"))
OTHERS = sorted(set(META) - set(CASES))


def test_every_case_but_gsam_and_sagm_is_driven():
    assert len(CASES) >= 5
    assert all(META[name]["kind"] in ("gsam", "sagm") for name in OTHERS), OTHERS


@pytest.mark.parametrize("case", CASES)
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
    disam = DISAM(params, about["rho"], variance_weight, about.get("adaptive", False))

    for step, expected in enumerate(REFERENCE[f"{case}/params"]):
        x, y, d = (torch.from_numpy(REFERENCE[f"{case}/{key}"][step]) for key in "XYD")
        disam.backward(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y, reduction="none"), d)
        optimizer.step()
        difference = np.abs(nn.utils.parameters_to_vector(params).detach().numpy() - expected).max()
        assert difference <= 1e-10, f"step {step}: {difference:.3g}"
