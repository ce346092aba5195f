"""Domains that are called as the pooled rows are."""

import pytest
import torch

from disam_peft.config.selection import SelectionConfig
from disam_peft.errors import Notice
from disam_peft.evaluation.metrics import metrics_by_domain, metrics_of_domains, pooled_metrics
from disam_peft.evaluation.predict import Predictions
from disam_peft.evaluation.protocols import validation_score
from disam_peft.evaluation.results import Identity, result_rows
from disam_peft.training.selection import validation


def test_selection_sees_a_domain_called_mean_or_worst():
    logits_NC = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    predictions = Predictions(logits_NC, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), ("mean", "worst"))
    of_domains = metrics_of_domains(predictions)
    assert {name: values["top1"] for name, values in of_domains.items()} == {"mean": 0.5, "worst": 0.0}
    assert validation(SelectionConfig(), of_domains).score[0] == 0.25


def test_row_49_rows_of_domains_called_mean_worst_and_pooled_are_kept_apart_from_pooled_rows():
    """Domain 'mean': one of two right; 'worst': none of one; 'pooled': one of one."""
    logits_NC = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    domains = torch.tensor([0, 0, 1, 2])
    predictions = Predictions(logits_NC, torch.tensor([0, 1, 0, 0]), domains, ("mean", "worst", "pooled"))
    rows = result_rows(Identity("ViT", "lora", "disam", "photo", 3), {"source_validation": predictions})
    found = [(row.domain, row.pooled, row.value, row.n) for row in rows if row.metric == "top1"]
    assert found == [
        ("mean", None, 0.5, 2),
        ("worst", None, 0.0, 1),
        ("pooled", None, 1.0, 1),
        ("mean", "mean", 0.5, 3),
        ("worst", "worst", 0.0, 3),
    ]
    assert validation_score(predictions).mean_top1 == 0.5


def test_row_49_the_dict_for_programs_says_where_a_domain_hides_the_mean():
    predictions = Predictions(torch.eye(2), torch.tensor([0, 0]), torch.tensor([0, 1]), ("mean", "photo"))
    with pytest.warns(Notice, match="a domain of the data is called 'mean'"):
        found = metrics_by_domain(predictions)
    assert found["mean"]["top1"] == 1.0 and found["photo"]["top1"] == 0.0 and found["worst"]["top1"] == 0.0
    assert pooled_metrics(metrics_of_domains(predictions))["mean"]["top1"] == 0.5
