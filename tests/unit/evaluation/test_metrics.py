"""Metrics on numbers worked out by hand."""

import math

import pytest
import torch

from disam_peft.data.splits import held_out_domains
from disam_peft.errors import UserError
from disam_peft.evaluation.metrics import metrics, metrics_by_domain
from disam_peft.evaluation.predict import Predictions
from disam_peft.evaluation.protocols import validation_score


def logits(rows):
    return torch.tensor(rows, dtype=torch.float32).log()


def test_accuracies_and_likelihood_by_hand():
    """Three samples of class 0 (two right), one of class 1 (right), none of class 2, which is predicted once."""
    logits_NC = logits([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.1, 0.7, 0.2]])
    values = metrics(logits_NC, torch.tensor([0, 0, 0, 1]))
    assert values["top1"] == 0.75
    assert values["macro_accuracy"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-7), "class 2 does not occur: n/a, not 0"
    assert values["nll"] == pytest.approx(-sum(map(math.log, (0.8, 0.6, 0.2, 0.7))) / 4, abs=1e-6)


def test_calibration_error_by_hand():
    """Confidence 0.9 in four samples of which two are right: |0.9 - 0.5|; one of 0.6, right: |0.6 - 1|."""
    logits_NC = logits([[0.9, 0.1]] * 4 + [[0.4, 0.6]])
    values = metrics(logits_NC, torch.tensor([0, 0, 1, 1, 1]))
    assert values["ece"] == pytest.approx(0.8 * 0.4 + 0.2 * 0.4, abs=1e-6)


def predictions_of_two_domains():
    """Domain 'b': 1 of 4 right; domain 'd': 2 of 2. 'a' and 'c' have no samples."""
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    return Predictions(
        logits([right, wrong, wrong, wrong, right, right]),
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([1, 1, 1, 1, 3, 3]),
        ("a", "b", "c", "d"),
    )


def test_mean_and_worst_are_over_domains_not_samples():
    by_domain = metrics_by_domain(predictions_of_two_domains())
    assert list(by_domain) == ["b", "d", "mean", "worst"]
    assert by_domain["mean"]["top1"] == (0.25 + 1) / 2
    assert by_domain["worst"]["top1"] == 0.25
    assert by_domain["worst"]["nll"] == by_domain["b"]["nll"] > by_domain["d"]["nll"], "the worst loss is the highest"


def test_selection_prefers_accuracy_then_likelihood():
    score = validation_score(predictions_of_two_domains())
    assert score.mean_top1 == 0.625
    assert score < score._replace(mean_top1=0.63, negative_nll=-9.0)
    assert score < score._replace(negative_nll=score.negative_nll + 0.1)
    assert not score > score


def test_row_06_a_held_out_domain_that_is_not_there_is_named_with_the_close_ones():
    domains = ("art_painting", "cartoon", "photo", "sketch")
    assert held_out_domains("sketch", domains) == ["sketch"]
    assert held_out_domains("all", domains) == list(domains)
    with pytest.raises(UserError, match=r"'skech' is not a domain.*did you mean 'sketch'.*found: art_painting"):
        held_out_domains("skech", domains)
    with pytest.raises(UserError, match="is not a domain"):
        held_out_domains("", domains)
    with pytest.raises(UserError, match="two domains or more"):
        held_out_domains("all", ("photo",))
