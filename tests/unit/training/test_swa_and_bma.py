"""The mean of the last iterates and the beta moving average: values, skipped steps, when they are judged, state."""

import json

import numpy as np
import pytest
import torch

from disam_peft.config.average import BmaConfig, SwaConfig
from disam_peft.training.averages.bma import Bma, beta_moving_average, beta_weight
from disam_peft.training.averages.swa import Swa, swa
from disam_peft.training.checkpoint.serialization import from_json_and_tensors, to_json_and_tensors
from tests.helpers.paths import REFERENCE

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)
FILE = np.load(REFERENCE / "averaging.npz")
CASES = {n: c for n, c in json.loads(str(FILE["meta"]))["cases"].items() if c.get("method") == "beta_moving_average"}


def after(average, values, applied=TAKEN):
    for value in values:
        average.update([torch.tensor([value], dtype=torch.float64)], applied)
    return average


def new(kind, steps=8, **settings):
    configs = {"swa": (Swa, SwaConfig), "bma": (Bma, BmaConfig)}
    average, config = configs[kind]
    return average(config(**settings), [torch.full((1,), 3.0, dtype=torch.float64)], steps)


def value(average):
    return float(average.tensors()[0])


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_beta_moving_average_of_clipood(name):
    case = CASES[name]
    params_TP, averaged_TP, weights_T = (
        torch.from_numpy(FILE[f"{name}/{key}"]) for key in ("params", "averaged", "weights")
    )
    found_TP, found_T = beta_moving_average(params_TP, case["beta"], case["total_iter"])
    assert (found_TP - averaged_TP).abs().max() <= 1e-10
    assert (found_T - weights_T).abs().max() <= 1e-10


@pytest.mark.parametrize("beta", [150.0, 1e6])
def test_weights_of_the_first_steps_that_are_no_number_are_zero(beta):
    """A density that falls below the smallest number must not divide 0 by 0: every later average would be NaN."""
    values = [float(step) for step in range(1, 1001)]
    average = new("bma", steps=1000, beta=beta)
    assert beta_weight(0, beta, 1000) == beta_weight(1, beta, 1000) == 0.0
    assert value(after(average, values[:1])) == 1.0
    after(average, [float("nan")], SKIPPED)
    after(average, values[2:])
    log_a = np.array([(beta - 1) * np.log((s + 0.5) * (1000.5 - s)) for s in range(1, 1001) if s != 2])
    a = np.exp(log_a - log_a.max())
    expected = (a * np.array([v for v in values if v != 2])).sum() / a.sum()
    assert value(average) == pytest.approx(expected, rel=1e-9)


def test_the_weight_of_a_skipped_step_is_in_no_sum_and_the_next_step_keeps_its_own():
    average = after(new("bma", steps=4, beta=0.5), [5.0])
    after(average, [float("nan")], SKIPPED)
    after(average, [7.0, 8.0])
    a = [beta_weight(step, 0.5, 4) for step in range(5)]
    expected = (a[0] * 3 + a[1] * 5 + a[3] * 7 + a[4] * 8) / (a[0] + a[1] + a[3] + a[4])
    assert value(average) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("steps", "settings", "entering"),
    [
        (8, {}, [7, 8]),
        (8, {"start": 0.0}, list(range(1, 9))),
        (8, {"start": 0.5, "every": 2}, [6, 8]),
        (8, {"start": 0.5, "every": 3}, [5, 8]),
        (8, {"start": 0.75, "every": 100}, [8]),
        (1, {"start": 0.99}, [1]),
        (3, {"start": 0.75}, [3]),
    ],
)
def test_the_mean_of_the_iterates_that_enter(steps, settings, entering):
    history = np.random.default_rng(0).normal(size=steps)
    average = after(new("swa", steps=steps, **settings), history)
    assert SwaConfig(**settings).first_step(steps) == entering[0]
    expected = history[np.array(entering) - 1].mean()
    assert value(average) == pytest.approx(expected, abs=1e-14)
    rows_TP = torch.from_numpy(history)[:, None]
    assert float(swa(rows_TP, **{"start": 0.75, **settings})) == value(average)


def test_a_skipped_iterate_enters_no_mean_and_of_nothing_but_skipped_ones_the_weights_stay():
    average = new("swa", steps=4, start=0.0)
    after(after(after(average, [1.0]), [float("nan")], SKIPPED), [2.0, 6.0])
    assert value(average) == 3.0
    skipped = after(after(new("swa", steps=4, start=0.5), [1.0, 2.0]), [2.0, 2.0], SKIPPED)
    assert value(skipped) == 2.0, "not what they were before the first step"


def test_both_are_judged_as_the_average_of_the_whole_run_or_always():
    def judged(average):
        return [step for step in range(1, 9) if average.is_judged(step)]

    assert judged(new("swa")) == judged(new("bma")) == [8]
    assert judged(new("swa", judged="always", start=0.5)) == [5, 6, 7, 8]
    assert judged(new("bma", judged="always")) == list(range(1, 9))


@pytest.mark.parametrize("kind", ["swa", "bma"])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_the_state_comes_back_to_the_bit(kind, cut):
    history = np.random.default_rng(1).normal(size=8)
    settings = {"start": 0.25} if kind == "swa" else {}
    whole, first, second = (new(kind, **settings) for _ in range(3))
    after(whole, history)
    after(first, history[:cut])
    second.load_state_dict(from_json_and_tensors(*to_json_and_tensors(first.state_dict())))
    assert torch.equal(after(second, history[cut:]).tensors()[0], whole.tensors()[0])
