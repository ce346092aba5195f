"""Rows of results: what each number is called, and of how many it is made."""

import math

import pytest
import torch

from disam_peft.evaluation.metrics import METRIC_NAMES
from disam_peft.evaluation.predict import Predictions
from disam_peft.evaluation.results import Identity, result_rows


def test_rows_count_samples_for_a_domain_and_domains_for_a_mean():
    """Domain 'b' has four samples, of which one is right; domain 'd' has two, both right; 'a' has none."""
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    predictions = Predictions(
        torch.tensor([right, wrong, wrong, wrong, right, right]).log(),
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([1, 1, 1, 1, 2, 2]),
        ("a", "b", "d"),
    )
    identity = Identity("ViT", "lora", "disam", "photo", 3)
    rows = result_rows(identity, {"source_validation": predictions})
    found = {row.domain: (row.value, row.n) for row in rows if row.metric == "top1"}
    assert found == {"b": (0.25, 4), "d": (1.0, 2), "mean": (0.625, 2), "worst": (0.25, 2)}
    assert {(row.backbone, row.adapter, row.method, row.held_out, row.seed, row.split) for row in rows} == {
        ("ViT", "lora", "disam", "photo", 3, "source_validation")
    }


def test_logits_that_are_not_finite_are_counted_and_said():
    """Of domain 'a' one of two samples has no finite logits; 'b' is right."""
    logits_NC = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [1.0, 0.0]])
    predictions = Predictions(logits_NC, torch.zeros(3, dtype=torch.int64), torch.tensor([0, 0, 1]), ("a", "b"))
    with pytest.warns(UserWarning, match=r"the logits of disam are not finite for 1 of 2 images of 'a' \(held out\)"):
        rows = result_rows(Identity("ViT", "lora", "disam", "a", 3), {"held_out": predictions})
    values = {(row.domain, row.metric): row.value for row in rows}
    for domain in ("a", "mean", "worst"):
        assert all(math.isnan(values[domain, metric]) for metric in METRIC_NAMES), domain
    assert values["a", "not_finite"] == 1 and ("b", "not_finite") not in values
    assert values["b", "top1"] == 1.0
