"""Label smoothing against torch, and what records show of it."""

from functools import partial

import pytest
import torch
from torch import nn

from disam_peft import DISAM
from disam_peft.config.losses import CrossEntropyConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.objectives.cross_entropy import cross_entropy
from disam_peft.objectives.objective import Objective

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS, DOMAINS = torch.tensor([0, 3, 1, 1, 2, 0, 3]), torch.tensor([0, 0, 1, 1, 1, 0, 1])


def smoothed(label_smoothing):
    return Objective(ObjectiveConfig(loss=CrossEntropyConfig(label_smoothing=label_smoothing)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.6])
def test_value_and_gradient_are_those_of_torch(label_smoothing):
    logits, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
    objective = smoothed(label_smoothing)
    report = DISAM([logits], 0.0).backward(lambda: objective.forward(logits, LABELS), DOMAINS, objective=objective)
    wanted = nn.functional.cross_entropy(theirs, LABELS, label_smoothing=label_smoothing)
    wanted.backward()
    assert (logits.grad - theirs.grad).abs().max() <= 1e-12
    assert report.objective.item() == pytest.approx(wanted.item(), abs=1e-12)
    plain_B = nn.functional.cross_entropy(LOGITS, LABELS, reduction="none")
    assert report.loss.item() == pytest.approx(plain_B.mean().item(), abs=1e-12)
    assert report.domain_losses.tolist() == pytest.approx([plain_B[d == DOMAINS].mean().item() for d in (0, 1)])
    if label_smoothing > 0:
        assert abs(report.objective.item() - report.loss.item()) > 1e-2


def test_by_hand():
    """Logits 0 and log 3 have p = 1/4 and 3/4. Smoothing 0.2 of label 1: 0.9 (-log 3/4) + 0.1 (-log 1/4)."""
    logits = torch.tensor([[0.0, 3.0]], dtype=torch.float64)
    logits[0, 1] = torch.tensor(3.0, dtype=torch.float64).log()
    found = cross_entropy(logits, torch.tensor([1]), 0.2)
    assert found.item() == pytest.approx(0.9 * 0.28768207245178090 + 0.1 * 1.3862943611198906, abs=1e-15)


def test_the_variance_of_the_ascent_is_that_of_the_smoothed_losses():
    """Records show the plain losses, but the perturbation climbs what is descended."""
    weights, logits = [], LOGITS.clone().requires_grad_()
    for label_smoothing in (0.0, 0.3):
        objective = smoothed(label_smoothing)
        forward = partial(objective.forward, logits, LABELS)
        report = DISAM([logits], 0.1, 0.5).backward(forward, DOMAINS, objective=objective)
        loss_B = nn.functional.cross_entropy(LOGITS, LABELS, reduction="none", label_smoothing=label_smoothing)
        mean_D = torch.stack([loss_B[d == DOMAINS].mean() for d in (0, 1)])
        count_D = torch.tensor([3.0, 4.0], dtype=torch.float64)
        wanted_D = count_D / 7 - 0.5 * (mean_D - mean_D.mean())
        assert (report.domain_weights - wanted_D).abs().max() <= 1e-12
        weights.append(wanted_D)
    assert (weights[0] - weights[1]).abs().max() > 1e-2


def test_half_precision_is_computed_in_float32():
    logits = LOGITS.to(torch.bfloat16)
    forward = smoothed(0.1).forward(logits, LABELS)
    assert forward.loss_B.dtype == forward.reported_B.dtype == torch.float32
    assert torch.equal(forward.loss_B, cross_entropy(logits.float(), LABELS, 0.1))
    assert smoothed(0.0).forward(logits, LABELS).reported_B is None, "the loss is what records show"
