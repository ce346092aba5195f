"""A class that the held-out domain does not have: evaluated without it, and the averages say over how many."""

import pytest
import torch
from PIL import Image

from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.splits import leave_out
from disam_peft.evaluation.metrics import class_accuracies, metrics_by_domain
from disam_peft.evaluation.predict import Predictions


def test_row_10_an_absent_class_is_not_available_and_in_no_average():
    """Classes 0 to 3. 'art' has all, one sample each, all right but class 1; 'sketch' lacks 1 and 3."""
    sure = torch.eye(4) * 9
    logits_NC = torch.stack([sure[0], sure[3], sure[2], sure[3], sure[0], sure[1], sure[2]])
    labels_N = torch.tensor([0, 1, 2, 3, 0, 0, 2])
    predictions = Predictions(logits_NC, labels_N, torch.tensor([0, 0, 0, 0, 1, 1, 1]), ("art", "sketch"))
    assert class_accuracies(logits_NC[:4], labels_N[:4]) == [1.0, 0.0, 1.0, 1.0]
    assert class_accuracies(logits_NC[4:], labels_N[4:]) == [0.5, None, 1.0, None]
    by_domain = metrics_by_domain(predictions)
    assert (by_domain["art"]["macro_accuracy"], by_domain["art"]["classes"]) == (0.75, 4)
    # over all four it would be 3/8, or 1/2 with the predicted class 1 as a third
    assert (by_domain["sketch"]["macro_accuracy"], by_domain["sketch"]["classes"]) == (0.75, 2)
    assert by_domain["sketch"]["top1"] == pytest.approx(2 / 3)
    assert by_domain["mean"]["macro_accuracy"] == 0.75


def test_row_10_a_held_out_domain_without_a_class_is_evaluated(tmp_path):
    places = ["art/cat/0", "art/dog/1", "photo/cat/2", "photo/dog/3", "sketch/cat/4", "sketch/cat/5", "sketch/cat/6"]
    for shade, place in enumerate(places):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), shade).save(tmp_path / f"{place}.png")
    sources, target = leave_out(load(DataConfig(root=tmp_path, classes="union")), "sketch")
    assert target.classes == sources.classes == ("cat", "dog"), "the classifier keeps all classes"
    logits_NC = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0]])
    labels_N, domains_N = torch.from_numpy(target.labels), torch.from_numpy(target.domain_ids)
    values = metrics_by_domain(Predictions(logits_NC, labels_N, domains_N, target.domains))
    assert list(values) == ["sketch", "mean", "worst"]
    assert values["sketch"]["classes"] == 1
    assert values["sketch"]["macro_accuracy"] == pytest.approx(2 / 3)
