"""Rows of results: what each number is called, and of how many it is made."""

import torch

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
