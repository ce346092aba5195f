"""The metrics against their definitions: worked out by hand, and torchmetrics where it is right."""

from __future__ import annotations

import math

import pytest
import torch

from disam_peft.evaluation.metrics import ECE_BINS, METRIC_NAMES, calibration_error, class_accuracies, metrics

torchmetrics = pytest.importorskip("torchmetrics.functional.classification", reason="a reference for tests alone")


def random_case(seed: int, samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_NC = 3 * torch.randn(samples, classes, generator=generator)
    labels_N = torch.randint(classes, (samples,), generator=generator)
    easy_N = torch.rand(samples, generator=generator) < 0.6
    return logits_NC, torch.where(easy_N, logits_NC.argmax(dim=1), labels_N)


@pytest.mark.parametrize(("samples", "classes"), [(500, 2), (333, 7), (40, 65), (1, 3)])
def test_equal_to_torchmetrics_where_it_is_right(samples: int, classes: int) -> None:
    logits_NC, labels_N = random_case(samples, samples, classes)
    values = metrics(logits_NC, labels_N)
    probability_NC = logits_NC.double().softmax(dim=1)
    accuracy = torchmetrics.multiclass_accuracy(logits_NC, labels_N, classes, average="micro")
    assert values["top1"] == pytest.approx(float(accuracy), abs=1e-7)
    recall_C = torchmetrics.multiclass_accuracy(logits_NC, labels_N, classes, average="none")
    occurs_C = torch.bincount(labels_N, minlength=classes) > 0
    assert values["macro_accuracy"] == pytest.approx(float(recall_C[occurs_C].mean()), abs=1e-6)
    assert values["classes"] == int(occurs_C.sum())
    # it counts in float32
    error = torchmetrics.multiclass_calibration_error(probability_NC, labels_N, classes, n_bins=15)
    assert values["ece"] == pytest.approx(float(error), abs=1e-6)
    likelihood_N = probability_NC[torch.arange(samples), labels_N]
    assert values["nll"] == pytest.approx(-float(likelihood_N.log().mean()), abs=1e-12)


def test_row_73_a_confidence_of_exactly_1_is_in_the_last_bin() -> None:
    """100 samples of confidence 1.0 - 2e-9 (1.0 in float32), of which 80 are right, beside 100 of 0.953, all right: all
    are in the last of 15 bins, so that the two gaps cancel in part before the sign is dropped."""
    logits_NC = torch.zeros(200, 2)
    logits_NC[:100, 0], logits_NC[100:, 0] = 20, 3
    labels_N = torch.zeros(200, dtype=torch.int64)
    labels_N[:20] = 1
    high, low = 1 / (1 + math.exp(-20)), 1 / (1 + math.exp(-3))
    assert metrics(logits_NC, labels_N)["ece"] == pytest.approx(abs(180 / 200 - (high + low) / 2), abs=1e-12)
    assert metrics(logits_NC, labels_N)["ece"] == pytest.approx(0.07629, abs=1e-5)
    logits_NC[:100, 0] = 800  # now exactly 1 in float64, too
    assert metrics(logits_NC, labels_N)["ece"] == pytest.approx(abs(180 / 200 - (1 + low) / 2), abs=1e-12)


def test_bins_are_15_of_equal_width_closed_above() -> None:
    assert ECE_BINS == 15
    # 0.7 lies in (10/15, 11/15] with 0.72, and of 14 bins in (9/14, 10/14] without it
    confidence_N = torch.tensor([0.7, 0.72], dtype=torch.float64)
    right_N = torch.tensor([True, False])
    assert calibration_error(confidence_N, right_N) == pytest.approx(abs(0.3 - 0.72) / 2, abs=1e-12)
    assert calibration_error(confidence_N, right_N, bins=14) == pytest.approx((0.3 + 0.72) / 2, abs=1e-12)
    # 5/15 belongs to the bin that ends there, with 0.3
    edge_N = torch.tensor([5 / 15, 0.3], dtype=torch.float64)
    assert calibration_error(edge_N, right_N) == pytest.approx(abs((1 - 5 / 15) - 0.3) / 2, abs=1e-12)
    edge_N = torch.tensor([5 / 15, 0.35], dtype=torch.float64)
    assert calibration_error(edge_N, right_N) == pytest.approx(((1 - 5 / 15) + 0.35) / 2, abs=1e-12)


def test_a_confidence_just_above_an_edge_is_in_the_next_bin() -> None:
    """Scaled by 15 and rounded up, the number after 1/15 would be 1, as 1/15 is; so for every edge."""
    right_N = torch.tensor([True, False])
    for edge in (number / 15 for number in range(1, 15)):
        above_N = torch.tensor([edge, math.nextafter(edge, 1)], dtype=torch.float64)
        # two bins of one sample each: their gaps do not cancel
        assert calibration_error(above_N, right_N) == pytest.approx(((1 - edge) + edge) / 2, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_no_accuracy(bad: float) -> None:
    """Samples of NaN would count as predicted to be of the class that has the NaN: 40 % right here."""
    logits_NC = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [bad, 0.0], [0.0, bad]])
    labels_N = torch.tensor([0, 1, 0, 0, 0])
    values = metrics(logits_NC, labels_N)
    assert all(math.isnan(values[name]) for name in METRIC_NAMES)
    assert values["not_finite"] == 2 and values["classes"] == 2
    assert "not_finite" not in metrics(logits_NC[:3], labels_N[:3])


def test_a_class_of_probability_0_is_no_fault() -> None:
    values = metrics(torch.tensor([[0.0, -math.inf], [-math.inf, 1.0]]), torch.tensor([0, 0]))
    assert values["top1"] == 0.5 and values["nll"] == math.inf
    assert "not_finite" not in values
    assert metrics(torch.tensor([[-math.inf, -math.inf]]), torch.tensor([0]))["not_finite"] == 1


def test_calibration_is_computed_in_float64() -> None:
    """1 - 1e-9 is 1 in float32: a perfectly right classifier of that confidence is off by 1e-9, not by 0."""
    confidence = 1 / (1 + math.exp(-20))
    logits_NC = torch.tensor([[20.0, 0.0]] * 3)
    value = metrics(logits_NC, torch.zeros(3, dtype=torch.int64))["ece"]
    assert value == pytest.approx(1 - confidence, rel=1e-6)
    assert value > 0


def test_accuracies_of_classes_are_exact_shares() -> None:
    logits_NC = torch.eye(4)[[0, 0, 1, 3, 3, 3, 2]]
    labels_N = torch.tensor([0, 0, 0, 1, 1, 3, 3])
    assert class_accuracies(logits_NC, labels_N) == [2 / 3, 0.0, None, 0.5]
