"""The exponential moving average: torch's values, skipped steps, several tensors, its state."""

import json

import numpy as np
import pytest
import torch

from disam_peft.config.average import EmaConfig
from disam_peft.training.averages.ema import Ema, ema
from disam_peft.training.checkpoint.serialization import from_json_and_tensors, to_json_and_tensors
from tests.helpers.paths import REFERENCE

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


@pytest.fixture(scope="module")
def reference():
    return np.load(REFERENCE / "averaging.npz")


def test_values_of_torchs_averaged_model(reference):
    cases = {n: c for n, c in json.loads(str(reference["meta"]))["cases"].items() if c.get("method") == "ema"}
    assert len(cases) == 2
    for name, case in cases.items():
        history_TP, expected_TP = (torch.from_numpy(reference[f"{name}/{key}"]) for key in ("params", "averaged"))
        params = [torch.full_like(history_TP[0, :3], 7.0), torch.full_like(history_TP[0, 3:].reshape(-1, 1), 7.0)]
        average = Ema(EmaConfig(decay=case["decay"]), params, len(history_TP))
        for w_P, expected_P in zip(history_TP, expected_TP, strict=True):
            params[0].copy_(w_P[:3])
            params[1].copy_(w_P[3:].reshape(-1, 1))
            average.update(params, TAKEN)
            found_P = torch.cat([tensor.reshape(-1) for tensor in average.tensors()])
            assert (found_P - expected_P).abs().max() <= 1e-10
            assert [t.shape for t in average.tensors()] == [p.shape for p in params]


def test_the_function_gives_the_same_values(reference):
    cases = {n: c for n, c in json.loads(str(reference["meta"]))["cases"].items() if c.get("method") == "ema"}
    for name, case in cases.items():
        history_TP, expected_TP = (torch.from_numpy(reference[f"{name}/{key}"]) for key in ("params", "averaged"))
        assert (ema(history_TP, case["decay"]) - expected_TP).abs().max() <= 1e-10


def test_the_first_step_copies_every_bit_and_a_skipped_one_touches_none():
    params = [torch.tensor([0.1, 0.7], dtype=torch.float64)]
    average = Ema(EmaConfig(decay=0.9), params, 3)
    params[0] += 0.3
    average.update(params, SKIPPED)
    assert torch.equal(average.tensors()[0], torch.tensor([0.1, 0.7], dtype=torch.float64))
    average.update(params, TAKEN)
    assert torch.equal(average.tensors()[0], params[0]), "the first that is taken, not the first that is seen"
    before = average.tensors()[0].clone()
    params[0] += torch.nan
    average.update(params, SKIPPED)
    assert torch.isfinite(average.tensors()[0]).all() and torch.equal(average.tensors()[0], before)


def test_tensors_of_several_types_keep_their_order():
    params = [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(1, 4)]
    average = Ema(EmaConfig(decay=0.5), params, 2)
    for _ in range(2):
        for number, p in enumerate(params):
            p += number + 1
        average.update(params, TAKEN)
    assert [t.dtype for t in average.tensors()] == [p.dtype for p in params]
    assert [float(t.mean()) for t in average.tensors()] == [2.5, 4.0, 5.5]


def test_its_state_comes_back_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(5, generator=generator) for _ in range(6)]
    whole, first = (Ema(EmaConfig(decay=0.7), [torch.zeros(5)], 6) for _ in range(2))
    for w in steps[:3]:
        whole.update([w], TAKEN)
        first.update([w], TAKEN)
    second = Ema(EmaConfig(decay=0.7), [torch.ones(5)], 6)
    second.load_state_dict(from_json_and_tensors(*to_json_and_tensors(first.state_dict())))
    for w in steps[3:]:
        whole.update([w], TAKEN)
        second.update([w], TAKEN)
    assert torch.equal(whole.tensors()[0], second.tensors()[0])
