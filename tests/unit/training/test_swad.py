"""SWAD: values of the published code, the paper's listing written out, skipped steps, its state."""

import json
import math

import numpy as np
import pytest
import torch

from disam_peft.config.average import SwadConfig
from disam_peft.training.averages.swad import Swad, swad
from disam_peft.training.checkpoint.serialization import from_json_and_tensors, to_json_and_tensors
from tests.helpers.paths import REFERENCE

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)
FILE = np.load(REFERENCE / "swad.npz")
CASES = json.loads(str(FILE["meta"]))["cases"]
SETTINGS = ("eval_every", "n_converge", "n_tolerance", "tolerance_ratio")


@pytest.mark.parametrize("name", sorted(CASES))
def test_values_and_windows_of_the_published_code(name):
    case = CASES[name]
    params_TP, losses = (torch.from_numpy(FILE[f"{name}/{key}"]) for key in ("params", "val_loss"))
    found = swad(params_TP, losses, **{key: case[key] for key in SETTINGS}, variant="published")
    assert (found.final - torch.from_numpy(FILE[f"{name}/final"])).abs().max() <= 1e-10
    for key in ("converge_step", "dead_at_step", "start_step", "end_step", "n_averaged"):
        assert getattr(found, key) == case[key], key
    assert found.threshold == pytest.approx(case["threshold"], abs=1e-12, nan_ok=True)


def listing(params_TP, losses, n_converge, n_tolerance, ratio):
    """Algorithm 1 of the paper, with a validation after every step: (mean, first step, last step), or None."""
    start = None
    for i in range(len(params_TP)):
        if start is None:
            recent = losses[i - n_converge + 1 : i + 1] if i + 1 >= n_converge else []
            if recent and recent[0] == min(recent):
                start, threshold = i - n_converge + 1, (1 + ratio) * sum(recent) / n_converge
        elif i + 1 >= n_tolerance and min(losses[i - n_tolerance + 1 : i + 1]) > threshold:
            return params_TP[start : i - n_tolerance + 1].mean(0), start, i - n_tolerance
    return None if start is None else (params_TP[start:].mean(0), start, len(params_TP) - 1)


@pytest.mark.parametrize(("n_converge", "n_tolerance"), [(3, 6), (3, 3), (4, 2), (2, 1), (1, 4)])
def test_the_clean_variant_is_the_papers_listing(n_converge, n_tolerance):
    rng = np.random.default_rng(n_converge)
    ends = set()
    for _ in range(20):
        losses = (1 + 0.02 * (np.arange(40) - rng.integers(3, 45)) ** 2 / 10 + 0.1 * rng.random(40)).tolist()
        params_TP = torch.from_numpy(rng.normal(size=(40, 3)))
        found = swad(params_TP, losses, eval_every=1, n_converge=n_converge, n_tolerance=n_tolerance, variant="clean")
        expected = listing(params_TP, losses, n_converge, n_tolerance, 0.3)
        if expected is None:
            assert found.converge_step == -1 and (found.final - params_TP[-1]).abs().max() < 1e-14
            continue
        mean_P, start, end = expected
        assert (found.start_step, found.end_step, found.n_averaged) == (start, end, end - start + 1)
        assert (found.final - mean_P).abs().max() < 1e-13
        ends.add(end == 39)
    assert ends == {False, True}


def test_between_validations_the_clean_variant_counts_every_iterate_once():
    params_TP = torch.from_numpy(np.random.default_rng(0).normal(size=(31, 4)))
    losses = [3.0, 2.0, 1.0, 1.1, 1.2, 5.0, 5.0]
    found = swad(params_TP, losses, eval_every=5, n_converge=3, n_tolerance=2, variant="clean")
    assert (found.converge_step, found.dead_at_step) == (10, 30)
    assert (found.start_step, found.end_step, found.n_averaged) == (10, 20, 11)
    assert (found.final - params_TP[10:21].mean(0)).abs().max() < 1e-14


def run(average, steps, begin=1):
    """Steps (value, taken?, validation loss or None) of one trained tensor with one entry."""
    for step, (value, applied, loss) in enumerate(steps, begin):
        params = [torch.tensor([value], dtype=torch.float64)]
        average.update(params, TAKEN if applied else SKIPPED)
        if loss is not None:
            average.validated(step, loss, params)
    return average


def new(variant="clean", **settings):
    config = SwadConfig(variant=variant, **{"n_converge": 2, "n_tolerance": 2, **settings})
    return Swad(config, [torch.full((1,), 9.0, dtype=torch.float64)], 100)


@pytest.mark.parametrize(("variant", "expected"), [("clean", 17 / 4), ("published", 21 / 4)])
def test_skipped_steps_give_no_iterates_and_a_segment_without_any_goes_on(variant, expected):
    average = run(
        new(variant),
        [
            (1.0, True, None),
            (2.0, True, 1.0),  # the valley
            (math.nan, False, None),
            (2.0, False, 0.1),  # nothing was trained since: this loss does not count
            (4.0, True, None),
            (math.inf, False, None),
            (5.0, True, 1.1),
            (6.0, True, 1.2),
        ],
    )
    # clean: 2, 4, 5, 6; published: the mean of the segments (4 + 5) / 2 and 6
    assert average.about()["converge_step"] == 2
    assert float(average.tensors()[0]) == pytest.approx(expected, abs=1e-15)


def test_a_loss_that_is_not_finite_is_no_valley_and_is_above_the_threshold():
    steps = [(1.0, True, math.nan), (2.0, True, math.inf), (3.0, True, 1.0), (4.0, True, 1.1)]
    average = run(new(), steps)
    assert average.about() == {
        "converge_step": 3,
        "dead_at_step": None,
        "start_step": 3,
        "end_step": 4,
        "averaged": 2,
    }
    run(average, [(5.0, True, math.nan), (6.0, True, math.nan), (7.0, True, 0.1)], begin=5)
    assert average.about()["dead_at_step"] == 6
    assert float(average.tensors()[0]) == 3.5, "and what comes after the end changes nothing"


@pytest.mark.parametrize("variant", ["clean", "published"])
@pytest.mark.parametrize("cut", [1, 4, 8, 14, 22])
def test_its_state_comes_back_to_the_bit(variant, cut):
    rng = np.random.default_rng(1)
    losses = [2.0, 1.0, math.inf, 0.9, 1.0, 1.1, 0.95, 2.0, 2.0, 0.5]
    steps = [(float(rng.normal()), bool(rng.random() > 0.2), losses[n // 3] if n % 3 == 2 else None) for n in range(30)]
    whole, first = run(new(variant), steps), run(new(variant), steps[:cut])
    second = new(variant)
    second.load_state_dict(from_json_and_tensors(*to_json_and_tensors(first.state_dict())))
    run(second, steps[cut:], begin=cut + 1)
    assert torch.equal(second.tensors()[0], whole.tensors()[0]) and second.about() == whole.about()
    assert whole.about()["dead_at_step"] is not None


@pytest.mark.parametrize(
    ("variant", "kept"), [("clean", [(5, 3, 3), (4, 4, 0)]), ("published", [(5, 5, 0), (5, 5, 0)])]
)
def test_no_more_than_the_segments_that_decide_are_kept(variant, kept):
    """How many segments, how many of their means and how many last iterates: before the valley, in the window."""
    average = new(variant, n_converge=3, n_tolerance=5)

    def tensors():
        recent = average.state_dict()["valley"]["recent"]
        return len(recent), *(sum(bool(segment[name]) for segment in recent) for name in ("mean", "last"))

    run(average, [(float(n), True, 100.0 - n) for n in range(20)])
    assert tensors() == kept[0]
    run(average, [(float(n), True, 100.0 + n / 100) for n in range(20)], begin=21)
    assert tensors() == kept[1]
    run(average, [(float(n), True, 1e6) for n in range(6)], begin=41)
    assert tensors() == (0, 0, 0)


def test_it_is_judged_after_the_last_step_alone_and_holds_the_weights_before_any_validation():
    average = new()
    assert [step for step in range(1, 101) if average.is_judged(step)] == [100]
    assert average.tensors()[0].tolist() == [9.0]
    run(average, [(3.0, True, None), (5.0, True, None)])
    assert average.tensors()[0].tolist() == [4.0]
