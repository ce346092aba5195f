"""Focal loss: its formula, its limits, and numbers that would break a careless power."""

import math

import pytest
import torch

from disam_peft.config.losses import FocalConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.objectives.focal import focal
from disam_peft.objectives.objective import Objective

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])


def by_definition(logits, gamma, label_smoothing=0.0):
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    share = torch.nn.functional.one_hot(LABELS, 4).double() * (1 - label_smoothing) + label_smoothing / 4
    return (share * (1 - p) ** gamma * -p.log()).sum(dim=1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_value_and_gradient_are_those_of_the_formula(gamma, label_smoothing):
    logits, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
    found, wanted = focal(logits, LABELS, gamma, label_smoothing), by_definition(theirs, gamma, label_smoothing)
    assert (found - wanted).abs().max() <= 1e-12
    found.sum().backward()
    wanted.sum().backward()
    assert (logits.grad - theirs.grad).abs().max() <= 1e-12


def test_by_hand():
    """p = 3/4 of the label: (1/4)^2 (-log 3/4)."""
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()
    assert focal(logits, torch.tensor([1])).item() == pytest.approx(0.28768207245178090 / 16, abs=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_that_is_sure_has_a_loss_and_a_gradient(gamma, dtype):
    logits = torch.tensor([[1000.0, 0.0], [0.0, 1000.0]], dtype=dtype, requires_grad=True)
    for label_smoothing in (0.0, 0.1):
        loss = focal(logits, torch.tensor([0, 0]), gamma, label_smoothing)
        [gradient] = torch.autograd.grad(loss.sum(), logits)
        assert bool(torch.isfinite(loss).all())
        assert bool(torch.isfinite(gradient).all())
    assert focal(logits, torch.tensor([0, 0]), gamma)[0].item() == 0
    assert focal(logits, torch.tensor([0, 0]), gamma)[1].item() == pytest.approx(1000.0)


@pytest.mark.parametrize("logit", [2.0, 5.0, 8.0])
def test_a_sure_sample_keeps_the_digits_of_the_log_softmax(logit):
    """log p is rounded by 6e-8 in float32; what is made of it loses no more."""
    exact = (1 / (1 + math.exp(logit))) ** 2 * math.log1p(math.exp(-logit))
    found = focal(torch.tensor([[logit, 0.0]]), torch.tensor([0]), 2.0).item()
    assert found == pytest.approx(exact, rel=3 * 6e-8 * math.exp(logit), abs=0.0)


def test_half_precision_is_computed_in_float32_and_records_show_the_cross_entropy():
    objective = Objective(ObjectiveConfig(loss=FocalConfig(gamma=1.5, label_smoothing=0.1)))
    logits = LOGITS.to(torch.bfloat16)
    forward = objective.forward(logits, LABELS)
    assert torch.equal(forward.loss_B, focal(logits.float(), LABELS, 1.5, 0.1))
    assert torch.equal(forward.reported_B, torch.nn.functional.cross_entropy(logits.float(), LABELS, reduction="none"))
