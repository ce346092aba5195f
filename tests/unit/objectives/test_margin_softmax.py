"""Margin metric softmax against the values of CLIPood's authors."""

import json

import numpy as np
import pytest
import torch

from disam_peft import DISAM
from disam_peft.config.losses import MarginSoftmaxConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.objectives.margin_softmax import margin_logits, margin_softmax
from disam_peft.objectives.objective import Objective
from tests.helpers.paths import REFERENCE

VALUES = np.load(REFERENCE / "margin_softmax.npz")
CASES = json.loads(str(VALUES["meta"]))["cases"]


def of_case(name, *keys):
    return [torch.from_numpy(np.asarray(VALUES[f"{name}/{key}"])) for key in keys]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_authors(name):
    features, text, labels = of_case(name, "features", "text", "labels")
    features.requires_grad_()
    text.requires_grad_()
    scale, margin = CASES[name]["temperature"], CASES[name]["lam"]
    loss_B = margin_softmax(features, text, labels, scale, margin)
    loss_B.mean().backward()
    per_sample, mean_loss, of_features, of_text, logits, of_logits = of_case(
        name, "per_sample", "mean_loss", "grad_features", "grad_text", "logits", "grad_logits"
    )
    assert (loss_B - per_sample).abs().max() <= 1e-10
    assert (loss_B.mean() - mean_loss).abs() <= 1e-10
    assert (features.grad - of_features).abs().max() <= 1e-10
    assert (text.grad - of_text).abs().max() <= 1e-10
    plain = scale * torch.nn.functional.normalize(features.detach(), dim=-1) @ text.detach().T
    found = margin_logits(plain, text.detach(), labels, scale, margin).requires_grad_()
    assert (found - logits).abs().max() <= 1e-10
    [gradient] = torch.autograd.grad(cross_entropy(found, labels).mean(), found)
    assert (gradient - of_logits).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["lam0.3", "lam1"])
def test_the_member_takes_logits_class_features_and_scale_of_the_forward_pass(name):
    features, text, labels = of_case(name, "features", "text", "labels")
    per_sample, of_features, of_text = of_case(name, "per_sample", "grad_features", "grad_text")
    features.requires_grad_()
    text.requires_grad_()
    scale = torch.tensor(CASES[name]["temperature"], dtype=torch.float64)
    objective = Objective(ObjectiveConfig(loss=MarginSoftmaxConfig(margin=CASES[name]["lam"])))

    def call():
        logits = scale * torch.nn.functional.normalize(features, dim=-1) @ text.T
        return objective.forward(logits, labels, class_features_CE=text, scale=scale)

    report = DISAM([features, text], 0.0).backward(call, torch.zeros(len(labels), dtype=torch.long))
    assert (call().loss_B - per_sample).abs().max() <= 1e-10
    assert (features.grad - of_features).abs().max() <= 1e-10
    assert (text.grad - of_text).abs().max() <= 1e-10
    plain = torch.nn.functional.cross_entropy(_plain(features, text, scale), labels)
    assert report.loss.item() == pytest.approx(plain.item(), abs=1e-12), "records have no margin"
    assert abs(report.objective.item() - report.loss.item()) > 1e-2


def _plain(features, text, scale):
    return scale * torch.nn.functional.normalize(features.detach(), dim=-1) @ text.detach().T


def test_label_smoothing_is_that_of_the_logits_with_their_margins():
    features, text, labels = of_case("lam0.3_temp10", "features", "text", "labels")
    logits = margin_logits(_plain(features, text, 10.0), text, labels, 10.0, 0.3)
    found = margin_softmax(features, text, labels, 10.0, 0.3, 0.2)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    assert (found - wanted).abs().max() <= 1e-12


def test_a_loop_of_ones_own_without_class_features_is_told_so():
    objective = Objective(ObjectiveConfig(loss=MarginSoftmaxConfig()))
    with pytest.raises(ValueError, match=r"needs the class features.*class_features_CE=\.\.\."):
        objective.forward(torch.zeros(2, 3), torch.tensor([0, 1]))
