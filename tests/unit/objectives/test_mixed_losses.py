"""Losses of mixed samples: both classes by their shares, in what is descended and in what records show."""

import pytest
import torch
from torch import nn

from disam_peft import DISAM
from disam_peft.config.losses import CrossEntropyConfig
from disam_peft.config.objective import ObjectiveConfig
from disam_peft.config.penalties import FishrConfig, IRMConfig, VRexConfig
from disam_peft.objectives.base import Outputs, mixed
from disam_peft.objectives.fishr import Fishr
from disam_peft.objectives.irm import IRM
from disam_peft.objectives.objective import Objective
from disam_peft.objectives.whole_batch import whole_batch

GENERATOR = torch.Generator().manual_seed(1)
LOGITS = torch.randn(7, 4, generator=GENERATOR, dtype=torch.float64) * 3
LABELS, OTHERS = torch.tensor([0, 3, 1, 1, 2, 0, 3]), torch.tensor([2, 3, 0, 2, 1, 1, 0])
SHARES = torch.tensor([0.9, 0.5, 1.0, 0.75, 0.6, 0.51, 0.8], dtype=torch.float64)
DOMAINS = torch.tensor([0, 0, 1, 1, 1, 0, 1])
ONE_HOT = nn.functional.one_hot(LABELS, 4).double(), nn.functional.one_hot(OTHERS, 4).double()
SOFT = SHARES[:, None] * ONE_HOT[0] + (1 - SHARES[:, None]) * ONE_HOT[1]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_cross_entropy_is_that_of_the_mixed_labels(label_smoothing):
    """Cross entropy is linear in its target, so that torch's own with a target of shares must agree."""
    logits, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
    objective = Objective(ObjectiveConfig(loss=CrossEntropyConfig(label_smoothing=label_smoothing)))
    report = DISAM([logits], 0.0).backward(
        lambda: objective.forward(logits, LABELS, other_labels_B=OTHERS, share_B=SHARES), DOMAINS, objective=objective
    )
    wanted = nn.functional.cross_entropy(theirs, SOFT, label_smoothing=label_smoothing)
    wanted.backward()
    assert (logits.grad - theirs.grad).abs().max() <= 1e-15
    assert report.objective.item() == pytest.approx(wanted.item(), abs=1e-14)
    plain_B = nn.functional.cross_entropy(LOGITS, SOFT, reduction="none")
    assert report.loss.item() == pytest.approx(plain_B.mean().item(), abs=1e-14), "records have no smoothing"
    assert report.domain_losses.tolist() == pytest.approx([plain_B[d == DOMAINS].mean().item() for d in (0, 1)])


def test_a_share_of_one_is_the_image_alone():
    outputs = Outputs(LOGITS, LABELS, other_labels_B=OTHERS, share_B=torch.ones(7))

    def loss(of):
        return nn.functional.cross_entropy(of.logits_BC, of.labels_B, reduction="none")

    assert torch.equal(mixed(loss, outputs), loss(outputs))
    half = mixed(loss, Outputs(LOGITS, LABELS, other_labels_B=OTHERS, share_B=torch.full((7,), 0.25)))
    assert half.dtype == torch.float64
    assert torch.allclose(half, 0.25 * loss(outputs) + 0.75 * loss(Outputs(LOGITS, OTHERS)), atol=1e-15)


def test_targets_are_the_shares_of_the_classes():
    assert torch.equal(Outputs(LOGITS, LABELS).targets_BC, ONE_HOT[0])
    found = Outputs(LOGITS, LABELS, other_labels_B=OTHERS, share_B=SHARES).targets_BC
    assert torch.equal(found, SOFT) and found[1].tolist() == [0, 0, 0, 1], "both images of one class"


@pytest.mark.parametrize("method", [(0.0, 0.0), (0.2, 0.6)])
def test_micro_batches_and_penalties_see_the_mixed_losses(method):
    def step(*micro_batches):
        logits = LOGITS.clone().requires_grad_()
        objective = Objective(ObjectiveConfig(penalties=[VRexConfig(weight=3.0, anneal=0)]))
        forwards = [
            lambda rows=rows: objective.forward(
                logits[rows], LABELS[rows], other_labels_B=OTHERS[rows], share_B=SHARES[rows]
            )
            for rows in micro_batches
        ]
        DISAM([logits], *method).backward_accumulated(
            forwards, [DOMAINS[rows] for rows in micro_batches], objective=objective
        )
        return logits.grad

    rows = torch.arange(7)
    assert (step(rows[:2], rows[2:3], rows[3:]) - step(rows)).abs().max() <= 1e-15


def test_penalties_that_read_labels_are_those_of_the_mixed_losses():
    """IRM: the derivative of each domain's mean loss by a factor of its logits. Fishr: the variance, over a domain, of
    the gradients of single losses by the head's weights."""
    features = torch.nn.functional.normalize(torch.randn(7, 3, generator=GENERATOR, dtype=torch.float64), dim=1)
    head = torch.randn(4, 3, generator=GENERATOR, dtype=torch.float64)
    outputs = Outputs(features @ head.T, LABELS, features, other_labels_B=OTHERS, share_B=SHARES)

    def value(penalty):
        sums = whole_batch(penalty, outputs, DOMAINS)
        penalty.begin_step(sums)
        return penalty.value(sums).item()

    def loss(logits, rows):
        return nn.functional.cross_entropy(logits, SOFT[rows])

    def irm_of(rows):
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(loss(outputs.logits_BC[rows] * factor, rows), factor)[0].item() ** 2

    def variance_of(rows):
        weights = head.clone().requires_grad_()
        of_samples = [torch.autograd.grad(loss(features[[i]] @ weights.T, [i]), weights)[0] for i in rows]
        return torch.stack(of_samples).var(dim=0, unbiased=False)

    of_domains = [[0, 1, 5], [2, 3, 4, 6]]
    assert value(IRM(IRMConfig(variant="v1"))) == pytest.approx(sum(map(irm_of, of_domains)) / 2, rel=1e-12)
    variances = torch.stack([variance_of(rows) for rows in of_domains])
    wanted = (variances - variances.mean(dim=0)).square().mean()
    assert value(Fishr(FishrConfig(ema=0.0))) == pytest.approx(wanted.item(), rel=1e-10)
