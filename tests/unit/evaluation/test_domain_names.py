"""Domains that are called as the pooled rows are."""

import torch

from disam_peft.config.selection import SelectionConfig
from disam_peft.evaluation.metrics import metrics_of_domains
from disam_peft.evaluation.predict import Predictions
from disam_peft.training.selection import validation


def test_selection_sees_a_domain_called_mean_or_worst():
    logits_NC = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    predictions = Predictions(logits_NC, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), ("mean", "worst"))
    of_domains = metrics_of_domains(predictions)
    assert {name: values["top1"] for name, values in of_domains.items()} == {"mean": 0.5, "worst": 0.0}
    assert validation(SelectionConfig(), of_domains).score[0] == 0.25
