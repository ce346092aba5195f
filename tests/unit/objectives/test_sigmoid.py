"""SigLIP's loss over classes: its formula, its bias, and large logits."""

import math

import pytest
import torch

from disam_peft.config.losses import SigmoidConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.objectives.objective import Objective
from disam_peft.objectives.sigmoid import from_their_mean, sigmoid

COSINES = torch.rand(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.4 - 0.1
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 3])
SCALE, BIAS = torch.tensor(20.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)


def by_definition(logits):
    """The loop of the paper's algorithm, over classes in the place of texts."""
    losses = []
    for i, label in enumerate(LABELS.tolist()):
        terms = [-torch.log(1 / (1 + torch.exp(-(1 if j == label else -1) * logits[i, j]))) for j in range(4)]
        losses.append(torch.stack(terms).sum())
    return torch.stack(losses)


def loss(**settings):
    return Objective(ObjectiveConfig(loss=SigmoidConfig(**settings)))


def test_value_and_gradient_are_those_of_the_formula():
    logits, theirs = ((SCALE * COSINES).requires_grad_() for _ in range(2))
    found, wanted = sigmoid(logits, LABELS, BIAS), by_definition(theirs + BIAS)
    assert (found - wanted).abs().max() <= 1e-12
    found.sum().backward()
    wanted.sum().backward()
    assert (logits.grad - theirs.grad).abs().max() <= 1e-12


def test_at_logit_0_the_derivative_is_a_half():
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    value = sigmoid(logits, torch.tensor([1]))
    value.sum().backward()
    assert value.item() == pytest.approx(2 * math.log(2), abs=1e-15)
    assert logits.grad.tolist() == [[0.5, -0.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_neither_overflow_nor_lose_their_digits(dtype):
    logits = torch.tensor([[500.0, -500.0], [-500.0, 25.0]], dtype=dtype, requires_grad=True)
    value = sigmoid(logits, torch.tensor([0, 0]))
    value.sum().backward()
    assert value.tolist() == pytest.approx([0.0, 525.0], abs=1e-4)
    assert logits.grad.tolist() == [pytest.approx([0.0, 0.0]), pytest.approx([-1.0, 1.0])]
    of_25 = sigmoid(torch.tensor([[25.0]], dtype=dtype), torch.tensor([0])).item()
    assert of_25 == pytest.approx(math.log1p(math.exp(-25)), rel=1e-6, abs=0.0)


def test_the_bias_of_a_model_is_in_its_logits():
    found = loss().forward(SCALE * COSINES + BIAS, LABELS, scale=SCALE, bias=BIAS).loss_B
    assert (found - by_definition(SCALE * COSINES + BIAS)).abs().max() <= 1e-12


@pytest.mark.parametrize("own", [None, BIAS])
def test_a_bias_of_the_recipe_takes_its_place(own):
    logits = SCALE * COSINES + (0 if own is None else own)
    found = loss(bias=-1.5).forward(logits, LABELS, scale=SCALE, bias=own).loss_B
    assert (found - by_definition(SCALE * COSINES - 1.5)).abs().max() <= 1e-12


def test_a_model_without_a_bias_is_counted_from_the_mean_of_its_logits():
    """What all logits of an image have in common changes nothing, as for a softmax; no preference is one yes in C."""
    logits = 100 * COSINES
    found = loss().forward(logits, LABELS, scale=SCALE).loss_B
    centred = logits - logits.mean(dim=1, keepdim=True) - math.log(3)
    assert (found - by_definition(centred)).abs().max() <= 1e-12
    shifted = logits + torch.arange(7, dtype=torch.float64)[:, None] * 10
    assert (loss().forward(shifted, LABELS, scale=SCALE).loss_B - found).abs().max() <= 1e-12
    assert from_their_mean(torch.full((1, 4), 25.0)).sigmoid().sum().item() == pytest.approx(1.0)
    assert bool(torch.isfinite(from_their_mean(torch.ones(2, 1))).all())
